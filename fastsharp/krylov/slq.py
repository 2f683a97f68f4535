"""The density of a symmetric operator's eigenvalues by stochastic Lanczos quadrature: drive the recurrences, stop, and say what is known."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastsharp import ops
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, NotSymmetricError, StaleOperatorError
from fastsharp.krylov.batch import Batch
from fastsharp.krylov.block import Block
from fastsharp.krylov.cdf import cdf_bounds, w1_bound
from fastsharp.krylov.density_plan import DensityPlan, make_density_plan
from fastsharp.krylov.quadrature import Rule, combined, rule
from fastsharp.krylov.rows import norm, scaled
from fastsharp.krylov.stopping import rounding
from fastsharp.krylov.symmetry import CHECKS, PROBE_PRODUCTS, needs_probes, probe
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Density, spacing

KINDS = ("normal", "rademacher")
CONFIDENCE = 0.95

OnStep = Callable[[int, tuple[float, ...], float], None]


def density(
    operator: SymmetricOperator,
    *,
    probes: int = 1,
    steps: int = 80,
    kind: str = "normal",
    seed: int = 0,
    check: str = "auto",
    memory: int | None = None,
    host_memory: int | None = None,
    on_step: OnStep | None = None,
    on_plan: Callable[[DensityPlan], None] | None = None,
) -> Density:
    """sum_i w_i delta(theta_i) ~ (1/n) sum_i delta(lambda_i), from `probes` Lanczos runs of `steps` steps in lockstep.

    kind     "normal": the bounds of `cdf` hold for every matrix, since the direction of a normal vector is uniform. "rademacher":
             a little less variance, exactly none on diagonal matrices, and no bounds: it may miss an eigenvector
    check    "auto" probes the symmetry of every operator but a DenseOperator (4 matvecs), "on" of all, "off" of none
    memory, host_memory  bytes for bases on the device, and beside it; `density_plan` says what is done to keep to them. None: no limit
    on_step  called after every step as on_step(products so far, (), products in all)
    ->       Density; cost: n_matvec <= probes * min(steps, n) matvecs (settings["probe_products"] apart), fewer when a space
             becomes invariant; memory (probes * (steps + 2) + 2) n elements, or what the plan in settings["plan"] says
    on_plan  called with the plan before the first product

    Ctrl-C raises Interrupted with `.partial`, the Density of the steps so far (None before the first); any other exception from
    inside the run except NotSymmetricError and StaleOperatorError gets the same. Also raised: InputError, ArgumentTypeError,
    NonFiniteError, NotSymmetricError, NondeterministicOperatorError.
    Sources: Ubaru, Chen & Saad 2017; Chen, Trogdon & Ubaru 2105.06595; `batch`, `quadrature` and `cdf`.
    """
    check_arguments(operator.n, probes=probes, steps=steps, kind=kind, seed=seed, check=check)
    request = {"probes": probes, "steps": steps, "kind": kind, "seed": seed}
    plan = make_density_plan(operator.n, operator.dtype, operator.device, probes, steps, memory, host_memory)
    if on_plan is not None:
        on_plan(plan)
    runs = Runs(operator, plan, probes, kind, seed)

    def result() -> Density | None:
        return assemble(runs.recurrences(), runs.squares, {**request, "plan": plan.record()}, extra) if runs.begun else None

    extra = PROBE_PRODUCTS if needs_probes(operator, check) else 0
    try:
        operator.check_unchanged()
        if extra:
            probe(operator, seed, "density")
        runs.iterate(on_step)
        operator.check_unchanged()
        done = result()
        assert done is not None
        return done
    except KeyboardInterrupt as interrupt:  # a second one, while the partial result is assembled, passes through
        raise Interrupted(
            f"density: interrupted after {runs.n_matvec} products; .partial holds the density so far.", result()
        ) from interrupt
    except (NotSymmetricError, StaleOperatorError):  # there is no one matrix that a density would belong to
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            error.__dict__["partial"] = result()
        raise


def check_arguments(n: int, *, probes: int, steps: int, kind: str, seed: int, check: str = "auto") -> None:
    """Raises ArgumentTypeError or InputError, naming the argument, its value and what is possible; costs nothing."""
    for name, value in (("probes", probes), ("steps", steps), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"density: {name} is {value!r}, a {type(value).__name__}; expected an int.")
        if name != "seed" and value < 1:
            raise InputError(f"density: {name} is {value}, expected at least 1. The defaults, probes=1 and steps=80, suit most networks.")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"density: seed is {seed}, expected a 64-bit integer.")
    for name, choice, choices in (("kind", kind, KINDS), ("check", check, CHECKS)):
        if choice not in choices:
            raise InputError(f"density: {name} is {choice!r}, expected one of {', '.join(map(repr, choices))}.")


@dataclass(frozen=True)
class Recurrences:
    """What a density is assembled from: one T a probe, and the run behind them."""

    operator: SymmetricOperator
    blocks: list[Block]
    n: int
    eps: float
    norms: list[float]
    shift: int | None
    n_matvec: int
    second_passes: int


class Runs:
    """The Lanczos runs of all probes, as many at once as the plan says; bases of finished groups are given up, their T are kept."""

    def __init__(self, operator: SymmetricOperator, plan: DensityPlan, probes: int, kind: str, seed: int) -> None:
        self.operator, self.plan, self.probes, self.kind, self.seed = operator, plan, probes, kind, seed
        self._finished: list[Recurrences] = []
        self._squares: list[float] = []
        self._current: Batch | Tridiagonal | None = None

    def iterate(self, on_step: OnStep | None) -> None:
        """All steps of all groups."""
        steps = self.plan.rows
        for first in range(0, self.probes, self.plan.at_once):
            count = min(self.plan.at_once, self.probes - first)
            waiting = (self.probes - first - count) * steps
            self._current = run = self._begin(first, count)
            while (live := _live(run)) and _size(run) < steps:
                run.step()
                if on_step is not None:
                    on_step(self.n_matvec, (), self.n_matvec + live * (steps - _size(run)) + waiting)
            self._finished.append(self._of(run))
            self._current = None
            del run  # before the next group takes its memory

    def _begin(self, first: int, count: int) -> Batch | Tridiagonal:
        operator, shift = self.operator, self._finished[0].shift if self._finished else None
        starts = torch.empty((count, operator.n), dtype=operator.dtype, device=operator.device)
        ops.probes(self.kind, out=starts, seed=self.seed, first=first)
        self._squares += [norm(z) ** 2 for z in starts]
        if not self.plan.apart:
            return Batch(operator, starts, self.plan.rows, shift=shift, upfront=self.plan.budget is not None)
        basis = self.plan.basis(operator.n, operator.dtype, operator.device)
        run = Tridiagonal(
            operator, starts[0], lambda: starts[0], basis, call="density"
        )  # a closed block ends the run, so nothing is ever drawn
        run.shift = shift
        return run

    def _of(self, run: Batch | Tridiagonal) -> Recurrences:
        if isinstance(run, Batch):
            norms, passes = run.norms, sum(run.second_passes)
        else:
            norms, passes = [run.norm], run.second_passes
        return Recurrences(self.operator, run.blocks, run.n, run.eps, norms, run.shift, run.n_matvec, passes)

    def _all(self) -> list[Recurrences]:
        current = self._current
        return [*self._finished, *([self._of(current)] if current is not None and all(b.alpha for b in current.blocks) else [])]

    @property
    def begun(self) -> bool:
        """Whether there is anything to assemble."""
        return bool(self._all())

    @property
    def n_matvec(self) -> int:
        """Products so far."""
        return sum(r.n_matvec for r in self._finished) + (self._current.n_matvec if self._current is not None else 0)

    @property
    def squares(self) -> list[float]:
        """||z||^2 of the probes in `recurrences`."""
        return self._squares[: sum(len(r.blocks) for r in self._all())]

    def recurrences(self) -> Recurrences:
        """Those of all groups so far as one."""
        found = self._all()
        shift = next((r.shift for r in found if r.shift is not None), None)
        blocks = [block for r in found for block in r.blocks]
        norms = [x for r in found for x in r.norms]
        passes = sum(r.second_passes for r in found)
        return Recurrences(self.operator, blocks, self.operator.n, found[0].eps, norms, shift, self.n_matvec, passes)


def _live(run: Batch | Tridiagonal) -> int:
    return run.live if isinstance(run, Batch) else int(not run.blocks[0].closed)


def _size(run: Batch | Tridiagonal) -> int:
    return run.size if isinstance(run, Batch) else len(run.blocks[0].alpha)


def assemble(state: Recurrences, squares: list[float], request: dict[str, object], extra: int) -> Density:
    """Quadratures, their combination and its bounds, in units of 2^shift, and then scaled back."""
    operator, shift = state.operator, state.shift or 0
    rules = [rule(block, square) for block, square in zip(state.blocks, squares, strict=True)]
    (nodes, weights), fixed = combined(rules, state.n)
    empty = torch.empty(0, dtype=torch.float64)
    bounds, bound = (empty, empty, empty), math.inf
    if request["kind"] == "normal":
        bounds = cdf_bounds(rules, state.n, CONFIDENCE)
        dropped = max((block.beta[-1] for block in state.blocks if block.closed), default=0.0)
        bound = w1_bound((nodes, weights), bounds) + dropped + rounding(state.eps, max(state.norms))
    return Density(
        nodes=scaled(nodes, shift),
        weights=weights,
        widths=scaled(_widths(rules, nodes), shift) if float(nodes.abs().max()) else _widths(rules, nodes),
        probes=tuple((scaled(r.nodes, shift), r.weights) for r in rules),
        edges=scaled(bounds[0], shift),
        lower=bounds[1],
        upper=bounds[2],
        w1_bound=math.ldexp(bound, shift) if math.isfinite(bound) else bound,
        confidence=CONFIDENCE,
        n=state.n,
        n_matvec=state.n_matvec,
        notes=(*operator.notes, *_notes(state, rules, fixed, extra, request["kind"] == "normal", request.get("plan"))),
        settings={
            **operator.settings,
            **request,
            "norm": math.ldexp(max(state.norms), shift),
            "second_passes": state.second_passes,
            "fixed_at_1_over_n": fixed,
            "probe_products": extra,
        },
        provenance=operator.provenance,
    )


def _widths(rules: list[Rule], nodes: torch.Tensor) -> torch.Tensor:
    """Half the local spacing of the Ritz values at each node, the mean over the probes."""
    return torch.stack([spacing(r.nodes, nodes) for r in rules]).mean(0) / 2


def _notes(state: Recurrences, rules: list[Rule], fixed: int, extra: int, bounded: bool, plan: object) -> list[str]:
    notes = []
    if extra:
        notes.append(f"symmetry and repeatability were tested with {extra} further products")
    exact = sum(r.exact for r in rules)
    if exact:
        notes.append(
            f"the Krylov space of {exact} of {len(rules)} probes became invariant: its quadrature is exact, and the run ended early"
        )
    if fixed:
        notes.append(f"{fixed} outlying Ritz values were given the weight 1/n of a simple eigenvalue; one probe cannot see multiplicity")
    if isinstance(plan, dict) and plan["storage"] == "float16":
        notes.append("the bases were stored in scaled float16 to fit the memory budget")
    if not bounded:
        notes.append("Rademacher probes give no bounds: one may be orthogonal to an eigenvector")
    return notes
