"""From the state of a Lanczos run to Eigenpairs: Ritz vectors, true residuals, flags and notes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastsharp.krylov.plan import Plan
from fastsharp.krylov.request import Request
from fastsharp.krylov.rows import rayleigh, scale, scaled
from fastsharp.krylov.stopping import Targets, floor_note, result_order, rounding, select, value_bounds
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs


@dataclass(frozen=True)
class Found:
    """The min(k, size) wanted Ritz pairs of a run that is over, in units of 2^shift, and what a result says of the run."""

    operator: SymmetricOperator
    theta: torch.Tensor  # all Ritz values (size,) and the estimates of their residuals, on the host
    estimates: torch.Tensor
    chosen: torch.Tensor  # positions of the wanted ones
    X: torch.Tensor  # (k, n) their vectors
    noise: float
    eps: float
    norm: float
    shift: int
    n_matvec: int
    blocks: int
    breakdowns: int
    thick_restarts: int
    second_passes: int


def pairs(state: Tridiagonal, request: Request, plan: Plan, probes: int, *, verify: bool, settled: bool) -> Eigenpairs:
    """X = S V, theta_i = x_i'A x_i, r_i = ||A x_i - theta_i x_i||: the min(k, size) wanted pairs of the run so far.

    Costs one block product (k matvecs) with `verify`, none without.
    """
    theta, estimates = state.ritz()
    chosen = select(theta, request.which, request.k)
    found = Found(
        state.operator,
        theta,
        estimates,
        chosen,
        state.combine(state.coefficients(chosen)),
        state.noise,
        state.eps,
        state.norm,
        state.shift or 0,
        state.n_matvec,
        len(state.blocks),
        state.breakdowns,
        state.thick_restarts,
        state.second_passes,
    )
    return assembled(found, request, plan, probes, state.operator.apply(found.X) if verify else None, settled=settled)


def assembled(found: Found, request: Request, plan: Plan, probes: int, Y: torch.Tensor | None, *, settled: bool) -> Eigenpairs:
    """The result for products Y = A X (k, n), overwritten; None: values and residuals are those of T.

    Rayleigh quotients of the single vectors, no k x k Rayleigh-Ritz: the Ritz vectors already diagonalise A on the whole Krylov space.
    Estimates from a basis stored in float16 are raised by its rounding. The gap in min(r, r^2/gap) is that to all other Ritz values;
    before the list has settled an eigenvalue may hide in that gap, and the bound is r. A bound is never below 8 eps ||A||, the rounding
    of the product itself.
    """
    theta, estimates, chosen, X = found.theta, found.estimates, found.chosen, found.X
    values, residuals = theta[chosen], estimates[chosen] + found.noise * theta[chosen].abs()
    if Y is not None:
        if found.shift:
            scale(Y, -found.shift)
        values, residuals = rayleigh(X, Y)
        order = result_order(values, request.which)
        chosen, values, residuals = chosen[order], values[order], residuals[order]
        if order.tolist() != sorted(order.tolist()):
            X = X[order.to(X.device)]
        theta, estimates = theta.clone(), estimates.clone()
        theta[chosen], estimates[chosen] = values, residuals

    bounds = (value_bounds(theta, estimates)[chosen] if settled else residuals).clamp(min=rounding(found.eps, found.norm))
    targets = Targets(request.tol, request.criterion, found.eps)
    converged = targets.met(values, residuals, bounds, found.norm)
    by_floor = bool((converged & targets.by_floor(values, residuals, bounds)).any())
    operator, verified = found.operator, Y is not None
    return Eigenpairs(
        eigenvalues=scaled(values, found.shift),
        eigenvectors=X,
        residuals=scaled(residuals, found.shift),
        error_bounds=scaled(bounds, found.shift),
        converged=converged,
        verified=verified,
        n_matvec=found.n_matvec,
        n_verify=chosen.numel() if verified else 0,
        notes=(*operator.notes, *plan.notes(), *_notes(found, verified, settled, by_floor, probes)),
        settings={**operator.settings, **request.settings(), **_record(found, plan, probes)},
        provenance=operator.provenance,
        layout=operator.layout,
    )


def _record(found: Found, plan: Plan, probes: int) -> dict[str, Any]:
    return {
        "norm": math.ldexp(found.norm, found.shift),
        "restarts": found.blocks - 1,
        "breakdowns": found.breakdowns,
        "thick_restarts": found.thick_restarts,
        "plan": plan.record(),
        "second_passes": found.second_passes,
        "probe_products": probes,
    }


def _notes(found: Found, verify: bool, settled: bool, by_floor: bool, probes: int) -> list[str]:
    notes = []
    if probes:
        notes.append(f"symmetry and repeatability were tested with {probes} further products")
    if found.blocks > 1:
        notes.append(f"the Krylov space became invariant and was restarted with a random vector, {found.blocks - 1} times")
    if found.thick_restarts:
        notes.append(f"the basis was full {found.thick_restarts} times and was restarted from its Ritz vectors")
    if not settled:
        notes.append("the run ended before the list of wanted values settled: an eigenvalue may be missing from it")
    if not verify:
        notes.append("residuals are the recurrence's estimates, not verified by products")
    if by_floor:
        notes.append(floor_note(found.eps, found.norm, found.shift))
    return notes
