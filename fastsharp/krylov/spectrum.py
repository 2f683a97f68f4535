"""Both ends of the spectrum, its density, trace and Frobenius norm from one Lanczos run and a few probes beside it.

One run from a normal vector z gives V and T. T's extreme eigenvalues are the Ritz values at both ends; the squared first components of
its eigenvectors are the quadrature weights of the density (`quadrature`); tr(V H V') and ||H V'||_F are exact parts of the trace and the
norm (`aware`). What V leaves out is sampled: each probe's one product gives a sample of both (`hutchinson`).
Source: the reuse of a Krylov space for the trace is that of Chen & Hallman 2023 (2205.01736).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastsharp import ops, rng
from fastsharp.errors import ArgumentTypeError, BasisMemoryError, InputError, Interrupted, NotSymmetricError, StaleOperatorError
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.krylov.estimate import Budget, OnStep, Run, report_failure
from fastsharp.krylov.growth import grow
from fastsharp.krylov.hutchinson import Complement, square_samples, trace_samples
from fastsharp.krylov.lanczos import report_failure as report_pairs
from fastsharp.krylov.pairs import pairs
from fastsharp.krylov.plan import Plan, make_plan
from fastsharp.krylov.products import Products
from fastsharp.krylov.request import Request
from fastsharp.krylov.request import check_arguments as check_pairs
from fastsharp.krylov.rows import norm
from fastsharp.krylov.slq import Recurrences, assemble
from fastsharp.krylov.stages import BLOCK, MIN_FINAL, Drawn, Interval, Target
from fastsharp.krylov.stopping import StopRule, Targets, rounding
from fastsharp.krylov.symmetry import PROBE_PRODUCTS, needs_probes, probe
from fastsharp.krylov.trace import LEAST_SQUARES
from fastsharp.krylov.trace import check_arguments as check_estimate
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Density, Eigenpairs, Estimate, Spectrum


def check_arguments(
    n: int,
    *,
    k: int,
    tol: float,
    criterion: str,
    steps: int,
    rtol: float,
    confidence: float,
    max_iter: int | None,
    max_products: int,
    seed: int,
    check: str = "auto",
) -> Request:
    """The arguments of `spectrum`, checked; the Request of its eigenpairs. Raises ArgumentTypeError or InputError."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ArgumentTypeError(f"spectrum: steps is {steps!r}, a {type(steps).__name__}; expected an int.")
    if steps < 1:
        raise InputError(
            f"spectrum: steps is {steps}, expected at least 1: the fewest steps of the run, which set the density's resolution."
        )
    check_estimate(
        "spectrum",
        rtol=rtol,
        atol=None,
        confidence=confidence,
        method="auto",
        max_products=max_products,
        pairs=None,
        seed=seed,
        check=check,
    )
    wanted = min(2 * k, n) if isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= n else k
    if max_iter is None and isinstance(wanted, int):
        max_iter = max(20 * wanted, 300, steps)
    return check_pairs(n, k=wanted, which="BE", tol=tol, criterion=criterion, max_iter=max_iter, method="lanczos", seed=seed, check=check)


def spectrum(
    operator: SymmetricOperator,
    *,
    k: int = 5,
    tol: float = 1e-3,
    criterion: str = "residual",
    steps: int = 80,
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_iter: int | None = None,
    max_products: int = 2000,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
    memory: int | None = None,
    host_memory: int | None = None,
    on_step: OnStep | None = None,
    warn: bool = True,
) -> Spectrum:
    """k eigenpairs at each end, sum_i w_i delta(theta_i), tr H and ||H||_F from one Krylov space and probes beside it.

    k, tol, criterion, max_iter  of the eigenpairs, as in `lanczos` with which="BE": min(2 k, n) pairs
    steps          fewest Krylov steps: the resolution of the density
    rtol, confidence, max_products  of trace and norm, as in `trace`: intervals of at most rtol |value| (or rtol ||H||_F) to each side
    ->             Spectrum; cost n_matvec = Krylov products + 2 k to verify + probes (+ 4 that test symmetry); memory as in `lanczos`,
                   without float16 or restarts, since the quadrature needs the whole of T
    warn           False: missed tolerances show in `converged` alone

    Warnings and errors as in `lanczos` and `trace`; Ctrl-C raises Interrupted whose `.partial` is a Spectrum of what there is.
    """
    given = {"k": k, "tol": tol, "criterion": criterion, "steps": steps, "rtol": rtol, "confidence": confidence}
    given |= {"max_iter": max_iter, "max_products": max_products, "seed": seed}
    request = check_arguments(operator.n, check=check, **given)  # type: ignore[arg-type]
    plan = make_plan(operator.n, operator.dtype, operator.device, request, memory, host_memory)
    if plan.storage == "float16" or plan.place == "host" or plan.rows <= request.k:
        raise BasisMemoryError(
            f"spectrum: the whole basis of a run for {request.k} pairs does not fit the memory budget ({plan}).\n"
            "Raise memory=, ask for fewer pairs, or call lanczos, density and trace one by one: those can do with less."
        )
    run = _Spectrum(operator, request, plan, given)
    try:
        operator.check_unchanged()
        if needs_probes(operator, check):
            probe(operator, seed, "spectrum")
            run.probed = PROBE_PRODUCTS
        run.iterate(on_step)
        run.estimate(Target(rtol, None, confidence), max_products, on_step)
        operator.check_unchanged()
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"spectrum: interrupted after {run.count} products; .partial holds what there is.", run.result()) from interrupt
    except (NotSymmetricError, StaleOperatorError):
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            error.__dict__["partial"] = run.result()
        raise
    result = run.result()
    assert result is not None and result.trace is not None and result.frobenius is not None
    if not (warn or strict):
        return result
    report_pairs(result.eigenpairs, Request(**{**vars(request), "strict": strict}), run.settled)
    report_failure("spectrum: trace", result.trace, strict)
    report_failure("spectrum: Frobenius norm", result.frobenius, strict)
    return result


class _Spectrum:
    """One run on its way."""

    def __init__(self, operator: SymmetricOperator, request: Request, plan: Plan, given: dict[str, Any]) -> None:
        self.operator, self.request, self.plan, self.given = operator, request, plan, given
        self.probed = 0
        self.settled = False
        self.verified: Eigenpairs | None = None
        self.estimates: list[Estimate] = []
        g = rng.generator(request.seed)
        z = torch.empty((1, operator.n), dtype=operator.dtype, device=operator.device)
        ops.probes("normal", out=z, seed=request.seed)
        self.square = norm(z[0]) ** 2

        def draw() -> torch.Tensor:
            return rng.normal(operator.n, g, operator.dtype, operator.device)

        self.state = Tridiagonal(operator, z[0], draw, plan.basis(operator.n, operator.dtype, operator.device), call="spectrum")
        self.products = Products(operator, "spectrum")
        self.lengthened = 0  # Krylov steps that `products` has counted: those for the estimates

    @property
    def count(self) -> int:
        """Products so far."""
        verified = self.verified.n_verify if self.verified else 0
        return self.probed + self.state.n_matvec + verified + self.products.count - self.lengthened

    def iterate(self, on_step: OnStep | None) -> None:
        """Krylov steps until both ends are settled and the density is resolved, then the verifying block."""
        state, request = self.state, self.request
        rule = StopRule(request.k, request.which, Targets(request.tol, request.criterion, state.eps), state.n)
        least, most = min(self.given["steps"], state.n), min(request.max_iter, self.plan.rows - 1)
        while not (self.settled and state.n_matvec >= least) and state.n_matvec < most and not state.exhausted:
            state.step()
            self.settled = rule(*state.ritz(), state.blocks, state.norm)
            if on_step is not None:
                values = tuple(t * 2.0 ** (state.shift or 0) for t in rule.values)
                on_step(self.count, values, max(rule.expected(state.n_matvec, most), float(least)))
        self.verified = pairs(state, request, self.plan, self.probed, verify=True, settled=self.settled)

    def estimate(self, target: Target, most: int, on_step: OnStep | None) -> None:
        """Trace and norm: the Krylov space exactly, the rest from probes that serve both."""
        products = self.products
        products.shift = self.state.shift or 0
        if self.state.exhausted:
            self.estimates = [self._exact(self._space(), squares) for squares in (False, True)]
            return
        pool = _Pool()
        for squares in (False, True):
            sampler = _Shared(products, self._space(), (self.request.seed + 1) % 2**63, pool, squares=squares)
            ours = Run(
                products,
                sampler,
                target,
                Budget(most, None),
                least=LEAST_SQUARES if squares else MIN_FINAL,
                root=squares,
                absorb=None if squares else partial(self._lengthen, sampler),
                on_step=on_step,
                notes=("the whole basis of the Lanczos run enters exactly",),
                settings=self.given,
            )
            self.estimates.append(ours())

    def _space(self) -> KrylovSpace:
        """The whole basis so far, in units of `products`."""
        return KrylovSpace.of_run(self.state).scaled(-self.products.unit)

    def _lengthen(self, sampler: _Shared, samples: float, energy: float, left: float) -> bool:
        """Further steps of the run while they pay (`growth`), and room for them in the basis."""
        state = self.state

        def block() -> float:
            before = self._space().squares
            for _ in range(BLOCK):
                if state.n_matvec >= self.plan.rows - 1 or state.exhausted:
                    break
                state.step()
                self.lengthened += 1
                self.products.count += 1
            return self._space().squares - before

        grown, _ = grow(block, samples, energy, left)
        if grown:
            sampler.begin_anew(self._space())
        return grown

    def _exact(self, space: KrylovSpace, squares: bool) -> Estimate:
        """The run spans the whole space: nothing is left to chance."""
        value = space.squares**0.5 if squares else space.trace
        off = rounding(self.state.eps, self.state.norm) * self.state.n
        at = Interval(value, 0.0, value - off, value + off)
        ours = Run(
            self.products,
            Complement(self.products, space, 0, squares=squares),
            Target(self.given["rtol"], None, self.given["confidence"]),
            Budget(0, None),
            root=squares,
            notes=("the Krylov space is the whole space: nothing is left to chance",),
            settings=self.given,
        )
        return ours.estimate(at, converged=True)

    def result(self) -> Spectrum | None:
        """What there is; None before the first step."""
        state = self.state
        if not state.size:
            return None
        found = self.verified or pairs(state, self.request, self.plan, self.probed, verify=False, settled=False)
        trace, frobenius = (*self.estimates, None, None)[:2]
        return Spectrum(
            eigenpairs=found,
            density=self._density(),
            trace=trace,
            frobenius=frobenius,
            n_matvec=self.count,
            notes=self.operator.notes,
            settings={**self.operator.settings, **self.given, "plan": self.plan.record(), "krylov_products": state.n_matvec},
            provenance=self.operator.provenance,
        )

    def _density(self) -> Density:
        """The quadrature of the start vector: that of the first block, whatever followed a breakdown."""
        state = self.state
        first = Recurrences(
            self.operator, state.blocks[:1], state.n, state.eps, [state.norm], state.shift, len(state.blocks[0].alpha), state.second_passes
        )
        request = {"probes": 1, "steps": self.given["steps"], "kind": "normal", "seed": self.request.seed}
        return assemble(first, [self.square], request, self.probed)


@dataclass
class _Pool:
    """Samples of both quantities by block, with the largest ||Hz||, and the probes drawn for them and for blocks that were dropped."""

    blocks: list[tuple[Drawn, Drawn, float]] = field(default_factory=list)
    drawn: int = 0


class _Shared(Complement):
    """Samples of the trace and of the square from the same products: each reader goes through all blocks from the first."""

    def __init__(self, products: Products, space: KrylovSpace, seed: int, pool: _Pool, *, squares: bool) -> None:
        super().__init__(products, space, seed, squares=squares)
        self._pool, self._read = pool, 0

    def begin_anew(self, space: KrylovSpace) -> None:
        """Another space: samples beside the one before are dropped."""
        self.space, self._read = space, 0
        self._pool.blocks.clear()

    def draw(self) -> Drawn:
        pool = self._pool
        if self._read == len(pool.blocks):
            self.drawn = pool.drawn
            z, u, size = self.block()
            pool.drawn = self.drawn
            pool.blocks.append((trace_samples(z, u), square_samples(z, u), size))
        of_trace, of_square, size = pool.blocks[self._read]
        self._read += 1
        self.see(size)
        return of_square if self.squares else of_trace
