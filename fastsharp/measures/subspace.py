"""How near two eigenspaces and two spectra are: overlap, principal angles, Wasserstein-1 distance, each with what its inputs' errors do to it.

overlap     ||P_a P_b||_F^2 / k = mean cos^2 of the principal angles, P the projectors on k vectors; k / n for random spaces
angles      arccos of the singular values of V_a V_b', V with orthonormal rows
W_1         integral of |F_a - F_b|, F the distribution functions of the eigenvalues
"""

from __future__ import annotations

import math

import torch

from fastsharp.results import Density, Eigenpairs

_CHUNK = 1 << 18  # coordinates taken in float64 at once


def principal_angles(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """(k,) float64 radians, ascending, between the row spaces of A and B (k, n); those below 1e-8 are not told from zero."""
    aa, bb, ab = (_gram(x, y) for x, y in ((A, A), (B, B), (A, B)))
    left = torch.linalg.solve_triangular(torch.linalg.cholesky(aa), ab, upper=False)
    cosines: torch.Tensor = torch.linalg.svdvals(torch.linalg.solve_triangular(torch.linalg.cholesky(bb), left.T, upper=False))
    return cosines.clamp(0.0, 1.0).arccos()


def space_error(pairs: Eigenpairs, k: int, n: int) -> float:
    """Bound of ||P - P_true||_F of the space of the k largest: sqrt(2) ||R||_F / gap; inf where the next eigenvalue may be as large.

    gap   from the k-th value to the next one found and its bound; `pairs` are descending and hold that one. No bound speaks of an
          eigenvalue that the run missed
    Source: Davis and Kahan 1970, the sin Theta theorem.
    """
    if k == n:
        return 0.0
    values, bounds = pairs.eigenvalues, pairs.error_bounds
    gap = float(values[k - 1] - values[k] - bounds[k])
    residual = float(pairs.residuals[:k].norm())
    return math.sqrt(2) * residual / gap if gap > 0 else math.inf


def overlap_error(a: float, b: float, k: int) -> float:
    """What errors ||P - P_true||_F of both spaces can do to tr(P_a P_b) / k: |tr((P - P_true) Q)| <= ||P - P_true||_F sqrt(k); 1 at most."""
    return min(1.0, (a + b) / math.sqrt(k))


def w1(a: Density, b: Density) -> tuple[float, float, float]:
    """(distance, bound of its error, confidence): each spectrum is within its own bound, so by the triangle inequality their distance is."""
    at = torch.cat([a.nodes, b.nodes]).sort().values
    apart = (a.cdf(at[:-1]) - b.cdf(at[:-1])).abs()
    return float(apart @ at.diff()), a.w1_bound + b.w1_bound, max(0.0, a.confidence + b.confidence - 1.0)


def _gram(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    parts = zip(A.split(_CHUNK, 1), B.split(_CHUNK, 1), strict=True)  # type: ignore[no-untyped-call]
    return sum((x.double() @ y.double().T for x, y in parts), torch.zeros(len(A), len(B), dtype=torch.float64, device=A.device)).cpu()
