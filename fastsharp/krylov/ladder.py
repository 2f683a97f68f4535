"""Eigenpairs by cheap products, made exact: Lanczos on the cheap operator, Rayleigh-Ritz and residuals on the exact one.

Note on numerical properties
----------------------------
*Why it works.* Noise of relative size d in the products leaves Ritz vectors off by about d, and Rayleigh quotients by d^2. One exact
block product of k + 2 of them gives exact Rayleigh-Ritz values, theta_i <= lambda_i at the upper end, and true residuals; where the
noise was too large, the residuals span what is missing, and one more block (a residual step) brings errors of 1e-3 to 1e-6.
*What is reported* rests on exact products alone: values, residuals, flags. The cheap run decides which vectors are looked at, and with
that whether an eigenvalue is missing from the list, as the start vector does in a plain run.
*Stop test of the cheap run*: that of `krylov.stopping` with the tolerance and the floor which the noise allows: tol >= d, and
d/16 ||T|| in place of 32 eps ||T||, below which values of the cheap operator are noise.
*Fallback.* Where the residual steps do not reach tol, or the cheap products are no symmetric matrix or not this one (a Ritz value and
the exact Rayleigh quotient of its vector differ by more than sqrt(d) ||T||), a run on the exact operator follows.
Sources: Parlett 1998, section 11 (Rayleigh-Ritz); residual steps are block Davidson without a preconditioner, that is block Krylov steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsharp.errors import (
    InputError,
    Interrupted,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotSymmetricError,
    StaleOperatorError,
    stacklevel,
)
from fastsharp.krylov.lanczos import OnStep, begin, lanczos, no_pairs_yet
from fastsharp.krylov.pairs import pairs
from fastsharp.krylov.plan import Plan, make_plan
from fastsharp.krylov.projection import complement, rayleigh_ritz, residual_rows
from fastsharp.krylov.request import Request, check_arguments, check_start
from fastsharp.krylov.rows import rayleigh, scale, scaled
from fastsharp.krylov.stopping import StopRule, Targets, floor_note, rounding, select, value_bounds
from fastsharp.krylov.symmetry import PROBE_PRODUCTS, needs_probes, probe
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

_GUARD_VECTORS = 2  # more than k in the exact block: an eigenvalue that the noise put in the wrong place is still seen
_RESIDUAL_STEPS = 6
_NOISE_FLOOR = 1 / 512  # eps of the cheap run as part of the noise: 32 eps is then a sixteenth of it


def ladder(
    cheap: SymmetricOperator,
    exact: SymmetricOperator,
    *,
    k: int = 5,
    which: str = "LA",
    tol: float = 1e-3,
    criterion: str = "residual",
    max_iter: int | None = None,
    method: str = "auto",
    v0: torch.Tensor | None = None,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
    memory: int | None = None,
    host_memory: int | None = None,
    on_step: OnStep | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Eigenpairs:
    """k eigenpairs of `exact` from a Krylov run on `cheap`, the same matrix with noise: arguments and errors of `krylov.lanczos`.

    ->  Eigenpairs with n_matvec Krylov products (cheap ones, and exact ones of a fallback run) and n_verify exact products of
        Rayleigh-Ritz and residual steps: k + 2, and at most k for each of up to six steps. settings: cheap_products,
        exact_products, residual_steps, fallback.
        Memory: the basis of the cheap run, as `memory` allows, and 2 (k + 2 + 6 k) n elements.
    With method "dense", or "auto" where n <= max(64, 2k), n exact products are taken and no cheap ones.
    """
    arguments: dict[str, Any] = {"k": k, "which": which, "tol": tol, "criterion": criterion, "max_iter": max_iter, "seed": seed}
    request = check_arguments(exact.n, **arguments, method=method, strict=strict, check=check)
    if (cheap.n, cheap.dtype, cheap.device) != (exact.n, exact.dtype, exact.device):
        raise InputError("ladder: the cheap and the exact operator differ in size, dtype or device. Pass two operators of one matrix.")
    if v0 is not None:
        check_start(exact, v0)
    if request.method == "dense":
        result = lanczos(exact, **arguments, method="dense", strict=strict, check=check)
        return _stated(result, cheap=0, exact=result.n_matvec + result.n_verify, steps=0, fallback=False)
    exact.check_unchanged()
    probed = needs_probes(exact, check)
    if probed:
        with no_pairs_yet():
            probe(exact, request.seed, "lanczos")
    plan = make_plan(exact.n, exact.dtype, exact.device, request, memory, host_memory)
    if on_plan is not None:
        on_plan(plan)
    run = _Ladder(cheap, exact, request, plan, v0, PROBE_PRODUCTS if probed else 0)
    try:
        result = run.result(on_step)
    except KeyboardInterrupt as interrupt:
        partial = getattr(interrupt, "partial", None) or run.partial()
        raise Interrupted("ladder: interrupted; .partial holds the pairs so far, unverified.", partial) from interrupt
    except (NotSymmetricError, StaleOperatorError):
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            error.__dict__.setdefault("partial", run.partial())
        raise
    exact.check_unchanged()
    _report_failure(result, request, run.settled)
    return result


class _Ladder:
    """One run: cheap Krylov space, exact Rayleigh-Ritz, residual steps, fallback. Vectors and values in units of 2^shift."""

    def __init__(
        self, cheap: SymmetricOperator, exact: SymmetricOperator, request: Request, plan: Plan, v0: torch.Tensor | None, probes: int
    ) -> None:
        self.exact, self.request, self.plan, self.probes = exact, request, plan, probes
        self._cheap = cheap
        self.state, randomness = begin(cheap, request, plan, v0)
        eps = max(self.state.eps, cheap.noise * _NOISE_FLOOR)
        targets = Targets(max(request.tol, cheap.noise), request.criterion, eps)
        self.rule = StopRule(request.k, request.which, targets, exact.n, randomness=randomness)
        self.targets = Targets(request.tol, request.criterion, self.state.eps)
        self.settled = False
        self.exact_products = 0
        self.steps = 0

    def partial(self) -> Eigenpairs | None:
        """The pairs of the cheap run so far, with its estimates."""
        return pairs(self.state, self.request, self.plan, self.probes, verify=False, settled=False) if self.state.size else None

    def result(self, on_step: OnStep | None) -> Eigenpairs:
        try:
            self._iterate(on_step)
        except (NotSymmetricError, NonFiniteError) as error:
            return self._fall_back(None, f"the cheap products could not be used ({str(error).partition(chr(10))[0]})", on_step)
        X, Y, apart = self._exact_block()
        if apart > math.sqrt(max(self.state.eps, self._cheap.noise)) * self._norm:
            moved = math.ldexp(apart, self._shift)
            return self._fall_back(None, f"cheap and exact products differ: a value moved by {moved:.2g}", on_step)
        X, found = self._correct(X, Y)
        if self.settled and not bool(found["converged"].all()):
            return self._fall_back(X, f"{self.steps} residual steps did not reach tol", on_step)
        result = Eigenpairs(
            eigenvectors=X,
            verified=True,
            n_matvec=self.state.n_matvec,
            n_verify=self.exact_products,
            notes=(*self.exact.notes, *self.plan.notes(), *self._notes(found)),
            settings={**self.exact.settings, **self.request.settings(), "norm": math.ldexp(self._norm, self._shift), **self._record()},
            provenance=self.exact.provenance,
            layout=self.exact.layout,
            **{name: found[name] if name == "converged" else scaled(found[name], self._shift) for name in found},
        )
        return _stated(result, cheap=self.state.n_matvec, exact=self.exact_products, steps=self.steps, fallback=False)

    @property
    def _shift(self) -> int:
        return self.state.shift or 0

    def _iterate(self, on_step: OnStep | None) -> None:
        """Krylov steps on the cheap operator."""
        while not self.settled and self.state.n_matvec < self.request.max_iter:
            self.state.step()
            self.settled = self.rule(*self.state.ritz(), self.state.blocks, self.state.norm)
            if on_step is not None:
                values = tuple(math.ldexp(t, self._shift) for t in self.rule.values)
                on_step(self.state.n_matvec, values, self.rule.expected(self.state.n_matvec, self.request.max_iter))

    def _exact_block(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The k + 2 Ritz vectors X, exact products Y, and by how much the Rayleigh quotients differ from the Ritz values at most."""
        theta, _ = self.state.ritz()
        chosen = select(theta, self.request.which, self.request.k + _GUARD_VECTORS)
        others = torch.ones(theta.numel(), dtype=torch.bool)
        others[chosen] = False
        self._unlisted, self._norm = theta[others], self.state.norm
        X = self.state.combine(self.state.coefficients(chosen))
        Y = self._product(X)
        return X, Y, float((rayleigh(X, Y)[0] - theta[chosen]).abs().max())

    def _correct(self, X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rayleigh-Ritz, then residual steps while a wanted pair misses its target: the wanted vectors and what is known of them."""
        while True:
            values, X, Y = rayleigh_ritz(X, Y)
            values, residuals = rayleigh(X, Y)
            self._norm = max(self._norm, float(values.abs().max()))
            wanted = select(values, self.request.which, self.request.k)
            found = self._judged(values, residuals, wanted)
            if bool(found["converged"].all()) or self.steps == _RESIDUAL_STEPS:
                break
            missed = wanted[~found["converged"]].to(X.device)
            D = complement(residual_rows(values[missed.cpu()], X[missed], Y[missed]), X)
            if not len(D):
                break
            X, Y = torch.cat([X, D]), torch.cat([Y, self._product(D)])
            self.steps += 1
        return X[wanted.to(X.device)], found

    def _product(self, X: torch.Tensor) -> torch.Tensor:
        self.exact_products += len(X)
        return scale(self.exact.apply(X), -self._shift)

    def _judged(self, values: torch.Tensor, residuals: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values, residuals, bounds and flags of the wanted; the cheap run's other Ritz values stand beside them in the gaps."""
        theta, r = torch.cat([values, self._unlisted]), torch.cat([residuals, torch.zeros_like(self._unlisted)])
        bounds = value_bounds(theta, r)[wanted] if self.settled else residuals[wanted]
        bounds = bounds.clamp(min=rounding(self.state.eps, self._norm))
        met = self.targets.met(values[wanted], residuals[wanted], bounds, self._norm)
        return {"eigenvalues": values[wanted], "residuals": residuals[wanted], "error_bounds": bounds, "converged": met}

    def _fall_back(self, X: torch.Tensor | None, why: str, on_step: OnStep | None) -> Eigenpairs:
        """A run on the exact operator, from the sum of the vectors so far. It reports its own failure."""
        r = self.request
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            result = lanczos(
                self.exact,
                k=r.k,
                which=r.which,
                tol=r.tol,
                criterion=r.criterion,
                max_iter=r.max_iter,
                method="lanczos",
                v0=None if X is None else X.sum(0),
                seed=r.seed,
                check="off",
                memory=self.plan.budget,
                on_step=on_step,
            )
        self.settled = not any("settled" in note for note in result.notes)
        exact = self.exact_products + result.n_matvec + result.n_verify
        result = dataclasses.replace(
            result,
            n_matvec=self.state.n_matvec + result.n_matvec,
            n_verify=self.exact_products + result.n_verify,
            notes=(*result.notes, f"{why}; a run on the exact products followed"),
            settings={**result.settings, "probe_products": self.probes},
        )
        return _stated(result, cheap=self.state.n_matvec, exact=exact, steps=self.steps, fallback=True)

    def _record(self) -> dict[str, Any]:
        state = self.state
        return {
            "restarts": len(state.blocks) - 1,
            "thick_restarts": state.thick_restarts,
            "plan": self.plan.record(),
            "breakdowns": state.breakdowns,
            "second_passes": state.second_passes,
            "probe_products": self.probes,
        }

    def _notes(self, found: Mapping[str, torch.Tensor]) -> list[str]:
        notes = []
        if self.probes:
            notes.append(f"symmetry and repeatability of the exact products were tested with {self.probes} further ones")
        if not self.settled:
            notes.append("the cheap run ended before the list of wanted values settled: an eigenvalue may be missing from it")
        met, by_floor = found["converged"], self.targets.by_floor(found["eigenvalues"], found["residuals"], found["error_bounds"])
        if bool((met & by_floor).any()):
            notes.append(floor_note(self.state.eps, self._norm, self._shift))
        return notes


def _stated(result: Eigenpairs, *, cheap: int, exact: int, steps: int, fallback: bool) -> Eigenpairs:
    """The result with the two kinds of products counted in its notes and settings."""
    counts = {"cheap_products": cheap, "exact_products": exact, "residual_steps": steps, "fallback": fallback}
    note = f"{cheap} cheap products chose the vectors, {exact} exact ones gave values and residuals ({steps} residual steps)"
    return dataclasses.replace(result, notes=(*result.notes, note), settings={**result.settings, **counts})


def _report_failure(result: Eigenpairs, request: Request, settled: bool) -> None:
    good = int(result.converged.sum())
    if settled and good == request.k:
        return
    worst = int((result.residuals / result.eigenvalues.abs().clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    message = (
        f"ladder: {good} of {request.k} pairs converged to tol = {request.tol:g} ({request.criterion}); "
        f"worst residual {float(result.residuals[worst]):.2g} at eigenvalue {float(result.eigenvalues[worst]):.6g}.\n"
        + ("" if settled else "The list had not settled: a wanted eigenvalue may be missing from it.\n")
        + f"Raise max_iter (now {request.max_iter}) or tol, or use precision='auto'."
    )
    if request.strict:
        raise NotConvergedError(message, result)
    warnings.warn(NotConvergedWarning(message, result), stacklevel=stacklevel())
