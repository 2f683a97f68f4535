"""XTrace: every probe serves the basis of all others and is itself sampled outside of theirs; with an unbiased variance.

With Y = B Omega = Q R, s_i the unit vector along column i of R^-T, and Q_i the basis without probe i, spanned by Q less Q s_i:
    t_i = tr(Q_i'B Q_i) + (r - m + 1) / ||P_i w_i||^2 (P_i w_i)'B(P_i w_i),   P_i = I - Q_i Q_i',   r the dimension of B's space.
Each t_i is unbiased for Gaussian w_i; the estimate is their mean. Source: Epperly, Tropp and Webber 2024 (arXiv 2301.07825).

Note on numerical properties
----------------------------
*Variance.* The t_i share their bases and are not independent: s^2 / m, the error estimate of the source, is 0.5 to 0.95 of the
variance (matrices of tests/krylov/test_trace_coverage.py, m = 8 to 24), and t intervals from it cover 82 to 95 % in place of 95 %;
the jackknife over probes errs to the other side, by up to 2.9 in width. Let t_ij be t_i with probe j left out of its basis as well.
With all probes but i and j fixed, t_i has mean tr B whatever w_j is, and t_ij does not depend on w_j, so of
    E (t_i - t_ij)(t_j - t_ji)
only cov(t_i, t_j) is left. Its mean over the pairs, C, is unbiased for the covariance, and s^2 / m + C for the variance of the mean.
It takes no products: Q_ij is Q less the span of s_i and s_j. A negative C counts as zero.
*Rank.* Where R is singular to rounding, the basis holds the whole range of B, and tr(Q'BQ) is tr B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsharp import ops
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.krylov.products import Products


@dataclass(frozen=True)
class Exchange:
    """One XTrace run of m probes outside of a space: mean and variance of the mean of tr B, and the space with its basis in it."""

    mean: float
    variance: float
    probes: int
    space: KrylovSpace


def xtrace(products: Products, space: KrylovSpace, m: int, seed: int, first: int) -> Exchange:
    """tr B for B = P H P by m Gaussian probes, numbers `first` and on of the stream: at most 2 m products, 2 m n elements.

    m at most half the dimension that `space` leaves.
    """
    operator = products.operator
    omega = torch.empty((m, operator.n), dtype=operator.dtype, device=operator.device)
    ops.probes("normal", out=omega, seed=seed, first=first)
    space.project(omega)
    Y = space.project(products(omega))
    if not bool(Y.any()):
        return Exchange(0.0, 0.0, m, space)
    Q, R = torch.linalg.qr(Y.T)
    singular = torch.linalg.svdvals(R.double())
    if float(singular[-1]) <= m * products.eps * float(singular[0]):
        grown = space.grown(Y, products)
        return Exchange(grown.trace - space.trace, 0.0, m, grown)
    rows = Q.T.contiguous()
    images = products(rows)
    W, H = _inner(rows, omega), _inner(rows, images)
    t, C = leave_one_out(R.double().cpu(), (H + H.T) / 2, W, _squares(omega), operator.n - space.size)
    return Exchange(float(t.mean()), float(t.var() / m + C.clamp(min=0.0)), m, space.extended(rows, images))


def leave_one_out(R: torch.Tensor, H: torch.Tensor, W: torch.Tensor, squares: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The m estimates t_i and the mean covariance C of two of them, from small matrices alone.

    R, H, W  (..., m, m) float64: Y = Q R, Q'B Q and Q'Omega
    squares  (..., m): ||w_i||^2
    dim      dimension of the space of B
    """
    m = R.shape[-1]
    S = torch.linalg.inv(R).mT
    S = S / S.norm(dim=-2, keepdim=True)
    whole = H.diagonal(dim1=-2, dim2=-1).sum(-1)
    less = (S * (H @ S)).sum(-2)
    p = W - S * (S * W).sum(-2, keepdim=True)  # coefficients of Q_i'w_i
    quadratic = (W * R).sum(-2) - 2 * (p * R).sum(-2) + (p * (H @ p)).sum(-2)
    t = whole[..., None] - less + (dim - m + 1) / (squares - p.square().sum(-2)) * quadratic
    moved = torch.zeros(*R.shape, dtype=torch.float64)  # t_i - t_ij
    for i in range(m):
        s, r, q = (x[..., i, None] for x in (S, R, p))
        D = S - s * (s.mT @ S)
        D = D / D.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        q = q - D * (D.mT @ q).mT
        quadratic = (W[..., i, None] * r).sum(-2) - 2 * (q * r).sum(-2) + (q * (H @ q)).sum(-2)
        basis = whole[..., None] - less[..., i, None] - (D * (H @ D)).sum(-2)
        moved[..., i, :] = t[..., i, None] - basis - (dim - m + 2) / (squares[..., i, None] - q.square().sum(-2)) * quadratic
    both = moved * moved.mT
    C = (both.sum((-2, -1)) - both.diagonal(dim1=-2, dim2=-1).sum(-1)) / (m * (m - 1))
    return t, C


def _inner(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B' (m, m) float64 on the host for rows (m, n)."""
    out = torch.empty((B.shape[0], A.shape[0] + 1), dtype=torch.float64, device=A.device)
    return ops.dots(A, B, out=out)[:, :-1].T.cpu()


def _squares(A: torch.Tensor) -> torch.Tensor:
    """||a_i||^2 (m,) float64 on the host."""
    return torch.stack([row.double().square().sum() for row in A]).cpu()
