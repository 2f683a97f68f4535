"""(A + c I) x = b by conjugate gradients, for several right-hand sides that share every block product."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastsharp.errors import InputError, NotSymmetricError
from fastsharp.operator import SymmetricOperator

_REFRESH = 50  # steps after which residuals are computed afresh: the recurrence drifts from the truth by rounding


class Solution(NamedTuple):
    """Rows x_i, their true relative residuals ||b_i - (A + cI) x_i|| / ||b_i||, and the products spent."""

    X: torch.Tensor
    residuals: torch.Tensor  # (b,) float64
    n_matvec: int


def solve(operator: SymmetricOperator, B: torch.Tensor, shift: float, *, rtol: float = 1e-3, max_iter: int = 500) -> Solution:
    """X with (A + shift I) X' = B' for rows B (b, n), A positive semidefinite, shift > 0.

    rtol       of ||b - (A + shift I) x|| / ||b|| for every row
    max_iter   steps at most; rows that have not converged are returned as they are, their residuals say so

    Cost: one product a row and step, sqrt((lambda_max + c) / c) log(2 / rtol) / 2 steps at most, fewer where few eigenvalues lie above c. Scalars
    in float64. Raises NotSymmetricError where v'(A + cI)v <= 0 for a direction: the matrix is not positive semidefinite, or not symmetric.
    Source: Hestenes and Stiefel 1952.
    """
    if not 0.0 < shift < float("inf"):
        raise InputError(f"solve: shift is {shift!r}, expected a positive number.")
    X, R = torch.zeros_like(B), B.clone()
    P = R.clone()
    size = _dots(B, B).sqrt()
    rho = _dots(R, R)
    active = size > 0
    spent = 0
    for step in range(1, max_iter + 1):
        active = active & (rho.sqrt() > rtol * size)
        rows = active.nonzero()[:, 0]
        if not len(rows):
            break
        on = rows.to(B.device)
        AP = operator.apply(P[on]).add_(P[on], alpha=shift)
        spent += len(rows)
        curvature = _dots(P[on], AP)
        if bool((curvature <= 0).any()):
            raise NotSymmetricError(
                f"solve: v'(A + cI)v is {float(curvature.min()):.3g} for a direction v, with c = {shift:.3g}: A is not positive semidefinite.\n"
                "Use the Gauss-Newton matrix of a convex loss, or a larger c."
            )
        alpha = (rho[rows] / curvature).to(B.device, B.dtype)[:, None]
        X[on] += alpha * P[on]
        if step % _REFRESH == 0:
            R[on] = B[on] - operator.apply(X[on]).add_(X[on], alpha=shift)
            spent += len(rows)
        else:
            R[on] -= alpha * AP
        fresh = _dots(R[on], R[on])
        P[on] = R[on] + (fresh / rho[rows]).to(B.device, B.dtype)[:, None] * P[on]
        rho[rows] = fresh
    true = B - operator.apply(X).add_(X, alpha=shift)
    return Solution(X, _dots(true, true).sqrt() / size.clamp_min(torch.finfo(torch.float64).tiny), spent + len(B))


def _dots(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """<a_i, b_i> in float64 on the host."""
    return (A.double() * B.double()).sum(1).cpu()
