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
from fastsharp.krylov.quadrature import Rule, combined, rule
from fastsharp.krylov.rows import norm, scaled
from fastsharp.krylov.stopping import rounding
from fastsharp.krylov.symmetry import CHECKS, PROBE_PRODUCTS, needs_probes, probe
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
    on_step: OnStep | None = None,
) -> Density:
    """sum_i w_i delta(theta_i) ~ (1/n) sum_i delta(lambda_i), from `probes` Lanczos runs of `steps` steps in lockstep.

    kind     "normal": the bounds of `cdf` hold for every matrix, since the direction of a normal vector is uniform. "rademacher":
             a little less variance, exactly none on diagonal matrices, and no bounds: it may miss an eigenvector
    check    "auto" probes the symmetry of every operator but a DenseOperator (4 matvecs), "on" of all, "off" of none
    on_step  called after every step as on_step(products so far, (), products in all)
    ->       Density; cost: n_matvec <= probes * min(steps, n) matvecs (settings["probe_products"] apart), fewer when a space
             becomes invariant; memory probes * (steps + 3) * n elements

    Ctrl-C raises Interrupted with `.partial`, the Density of the steps so far (None before the first); any other exception from
    inside the run except NotSymmetricError and StaleOperatorError gets the same. Also raised: InputError, ArgumentTypeError,
    NonFiniteError, NotSymmetricError, NondeterministicOperatorError.
    Sources: Ubaru, Chen & Saad 2017; Chen, Trogdon & Ubaru 2105.06595; `batch`, `quadrature` and `cdf`.
    """
    check_arguments(operator.n, probes=probes, steps=steps, kind=kind, seed=seed, check=check)
    request = {"probes": probes, "steps": steps, "kind": kind, "seed": seed}
    state: Batch | None = None
    squares: list[float] = []

    def result() -> Density | None:
        done = state is not None and all(block.alpha for block in state.blocks)
        return assemble(Recurrences.of(state), squares, request, extra) if state is not None and done else None

    extra = PROBE_PRODUCTS if needs_probes(operator, check) else 0
    try:
        operator.check_unchanged()
        if extra:
            probe(operator, seed, "density")
        starts = torch.empty((probes, operator.n), dtype=operator.dtype, device=operator.device)
        ops.probes(kind, out=starts, seed=seed)
        squares = [norm(z) ** 2 for z in starts]
        state = Batch(operator, starts, steps)
        del starts
        while state.live and state.size < state.steps:
            state.step()
            if on_step is not None:
                on_step(state.n_matvec, (), state.n_matvec + state.live * (state.steps - state.size))
        operator.check_unchanged()
        return assemble(Recurrences.of(state), squares, request, extra)
    except KeyboardInterrupt as interrupt:  # a second one, while the partial result is assembled, passes through
        taken = state.n_matvec if state is not None else 0
        raise Interrupted(f"density: interrupted after {taken} products; .partial holds the density so far.", result()) from interrupt
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

    @staticmethod
    def of(state: Batch) -> Recurrences:
        return Recurrences(
            state.operator, state.blocks, state.n, state.eps, state.norms, state.shift, state.n_matvec, sum(state.second_passes)
        )


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
        notes=(*operator.notes, *_notes(state, rules, fixed, extra, request["kind"] == "normal")),
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


def _notes(state: Recurrences, rules: list[Rule], fixed: int, extra: int, bounded: bool) -> list[str]:
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
    if not bounded:
        notes.append("Rademacher probes give no bounds: one may be orthogonal to an eigenvector")
    return notes
