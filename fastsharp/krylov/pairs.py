"""From the state of a Lanczos run to Eigenpairs: Ritz vectors, true residuals, flags and notes."""

from __future__ import annotations

import math
from typing import Any

from fastsharp.krylov.plan import Plan
from fastsharp.krylov.request import Request
from fastsharp.krylov.rows import rayleigh, scale, scaled
from fastsharp.krylov.stopping import Targets, floor_note, result_order, rounding, select, value_bounds
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.results import Eigenpairs


def pairs(state: Tridiagonal, request: Request, plan: Plan, probes: int, *, verify: bool, settled: bool) -> Eigenpairs:
    """X = S V, theta_i = x_i'A x_i, r_i = ||A x_i - theta_i x_i||: the min(k, size) wanted pairs of the run so far.

    Costs one block product (k matvecs) with `verify`, none without; then the values and residuals are those of T.
    Rayleigh quotients of the single vectors, no k x k Rayleigh-Ritz: the Ritz vectors already diagonalise A on the whole Krylov space.
    Estimates from a basis stored in float16 are raised by its rounding. The gap in min(r, r^2/gap) is that to all other Ritz values; before the list has settled an eigenvalue may hide in that gap, and
    the bound is r. A bound is never below 8 eps ||A||, the rounding of the product itself.
    """
    theta, estimates = state.ritz()
    chosen = select(theta, request.which, request.k)
    X = state.combine(state.coefficients(chosen))
    values, residuals = theta[chosen], estimates[chosen] + state.noise * theta[chosen].abs()
    if verify:
        Y = state.operator.apply(X)
        scale(Y, -(state.shift or 0))
        values, residuals = rayleigh(X, Y)
        order = result_order(values, request.which)
        chosen, values, residuals = chosen[order], values[order], residuals[order]
        if order.tolist() != sorted(order.tolist()):
            X = X[order.to(X.device)]
        theta, estimates = theta.clone(), estimates.clone()
        theta[chosen], estimates[chosen] = values, residuals

    bounds = (value_bounds(theta, estimates)[chosen] if settled else residuals).clamp(min=rounding(state.eps, state.norm))
    targets = Targets(request.tol, request.criterion, state.eps)
    converged = targets.met(values, residuals, bounds, state.norm)
    by_floor = bool((converged & targets.by_floor(values, residuals, bounds)).any())
    shift = state.shift or 0
    return Eigenpairs(
        eigenvalues=scaled(values, shift),
        eigenvectors=X,
        residuals=scaled(residuals, shift),
        error_bounds=scaled(bounds, shift),
        converged=converged,
        verified=verify,
        n_matvec=state.n_matvec,
        n_verify=chosen.numel() if verify else 0,
        notes=(*state.operator.notes, *plan.notes(), *_notes(state, verify, settled, by_floor, probes)),
        settings={**state.operator.settings, **request.settings(), **_record(state, plan, probes)},
        provenance=state.operator.provenance,
        layout=state.operator.layout,
    )


def _record(state: Tridiagonal, plan: Plan, probes: int) -> dict[str, Any]:
    return {
        "norm": math.ldexp(state.norm, state.shift or 0),
        "restarts": len(state.blocks) - 1,
        "breakdowns": state.breakdowns,
        "thick_restarts": state.thick_restarts,
        "plan": plan.record(),
        "second_passes": state.second_passes,
        "probe_products": probes,
    }


def _notes(state: Tridiagonal, verify: bool, settled: bool, by_floor: bool, probes: int) -> list[str]:
    notes = []
    if probes:
        notes.append(f"symmetry and repeatability were tested with {probes} further products")
    if len(state.blocks) > 1:
        notes.append(f"the Krylov space became invariant and was restarted with a random vector, {len(state.blocks) - 1} times")
    if state.thick_restarts:
        notes.append(f"the basis was full {state.thick_restarts} times and was restarted from its Ritz vectors")
    if not settled:
        notes.append("the run ended before the list of wanted values settled: an eigenvalue may be missing from it")
    if not verify:
        notes.append("residuals are the recurrence's estimates, not verified by products")
    if by_floor:
        notes.append(floor_note(state.eps, state.norm, state.shift or 0))
    return notes
