"""What every Lanczos run must satisfy, as functions that return a ratio or raise AssertionError; used on the solver and on mutants.

All ratios are LAPACK's: scaled by n eps ||A||, so that one threshold serves every size, scale and precision.
"""

from __future__ import annotations

import numpy as np
import torch

from fastsharp.results import Eigenpairs
from tests.oracles.matrices import Case


def eps_of(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def unit(case: Case, dtype: torch.dtype) -> float:
    """n eps ||A||, the unit of rounding; the smallest positive number for A = 0, so that 0 <= 10 units holds and x > 0 does not."""
    return max(case.A.shape[0] * eps_of(dtype) * case.norm, float(np.finfo(float).tiny))


def orthogonality_ratio(X: torch.Tensor) -> float:
    """max|XX' - I| / (n eps)."""
    Z = X.double()
    return float((Z @ Z.T - torch.eye(len(Z), dtype=torch.float64)).abs().max()) / (X.shape[1] * eps_of(X.dtype))


def assert_no_ghosts(theta: torch.Tensor, exact: np.ndarray, tolerance: float) -> None:
    """Cauchy interlacing: the i-th largest Ritz value is at most the i-th largest eigenvalue, and so from below.

    A ghost, a second copy of a simple eigenvalue, pushes all values after it past this bound.
    """
    up, truth = np.sort(theta.numpy()), np.sort(exact)
    m = up.size
    assert np.all(up[::-1] <= truth[::-1][:m] + tolerance), "more Ritz values above some eigenvalue than there are eigenvalues"
    assert np.all(up >= truth[:m] - tolerance), "more Ritz values below some eigenvalue than there are eigenvalues"


def true_residuals(result: Eigenpairs, A: np.ndarray) -> torch.Tensor:
    """||Ax - lambda x|| / ||x|| in float64, A scaled by a power of two against overflow."""
    e = -int(np.frexp(np.abs(A).max(initial=0.0))[1])
    X = result.eigenvectors.double().numpy()
    R = X @ np.ldexp(A, e) - np.ldexp(result.eigenvalues.numpy(), e)[:, None] * X
    return torch.from_numpy(np.ldexp(np.linalg.norm(R, axis=1) / np.linalg.norm(X, axis=1), -e))


def assert_sound(result: Eigenpairs, case: Case, dtype: torch.dtype, tol: float) -> tuple[float, float]:
    """P5-P7 of one result, whatever it converged to; returns the residual and orthogonality ratios."""
    u, eps = unit(case, dtype), eps_of(dtype)
    residuals = true_residuals(result, case.A)
    values = result.eigenvalues.numpy()
    assert bool(torch.isfinite(result.eigenvalues).all()) and bool(torch.isfinite(result.eigenvectors).all())
    if result.verified:
        assert float((result.residuals - residuals).abs().max()) <= 10 * u, "reported and true residuals differ"
    gate = np.maximum(tol * np.abs(values), 32 * eps * case.norm)
    flags = result.converged.numpy()
    assert np.all(residuals.numpy()[flags] <= gate[flags] * (1 + 1e-6) + 10 * u), "falsely converged"
    nearest = np.abs(values[:, None] - case.exact[None, :]).min(1)
    assert np.all(nearest <= residuals.numpy() + u), "no eigenvalue within the residual"
    assert_bounds_hold(result, case, nearest, u)
    assert_no_ghosts(result.eigenvalues, case.exact, float(result.error_bounds.max()) + u)
    orthogonality = orthogonality_ratio(result.eigenvectors)
    assert orthogonality <= 10, "eigenvectors are not orthonormal"
    return float((result.residuals - residuals).abs().max()) / u if result.verified else 0.0, orthogonality


def assert_bounds_hold(result: Eigenpairs, case: Case, nearest: np.ndarray, u: float) -> None:
    """error <= min(r, r^2/gap) wherever no eigenvalue lies closer than the gap that the bound was computed with.

    The bound's own gap is r^2/bound; an eigenvalue that the Krylov space does not resolve may lie inside it, and then
    only the residual bounds the error (asserted by the caller for every pair).
    """
    r, bound = result.residuals.numpy(), result.error_bounds.numpy()
    for i, value in enumerate(result.eigenvalues.numpy()):
        distances = np.sort(np.abs(case.exact - value))
        others = distances[distances > distances[0] + u]
        if others.size == 0 or bound[i] == 0.0 or r[i] / bound[i] * r[i] <= others[0] * (1 + 1e-9):
            assert nearest[i] <= bound[i] * (1 + 1e-9) + u, f"error {nearest[i]:.2g} above its bound {bound[i]:.2g}"


def wanted(exact: np.ndarray, which: str, k: int) -> np.ndarray:
    """The k wanted eigenvalues in the order of a result."""
    down = np.sort(exact)[::-1]
    if which == "LM":
        return down[np.argsort(-np.abs(down), kind="stable")][:k]
    return {"LA": down[:k], "SA": down[len(down) - k :], "BE": np.r_[down[: (k + 1) // 2], down[len(down) - k // 2 :]]}[which]
