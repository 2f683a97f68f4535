"""Rayleigh-Ritz on a few rows that a block product is known of, and the rows by which residuals enlarge them."""

from __future__ import annotations

import torch

from fastsharp import ops

_CHUNK = 1 << 15  # columns at a time: 256 KiB of float64 per row
_DEPENDENT = 1e-6  # squared length, of 1, below which a row is rounding of the others: eps^2 of float32 times 1e8


def rayleigh_ritz(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """theta (q,) float64 ascending on the host, and rows X, Y rotated so that X A X' = diag(theta), XX' = I; Y = A X (q, n).

    The Gram matrix is part of the problem, so X need be independent only, not orthonormal. Costs no matvec: products of the
    rotated rows are the rotated products. Two passes over X and Y, 2 q n elements of memory.
    """
    M, G = gram(X, X), gram(X, Y)
    size, Q = torch.linalg.eigh(M)
    whiten = Q / size.sqrt()
    theta, S = torch.linalg.eigh(whiten.T @ ((G + G.T) / 2) @ whiten)
    rotation = (whiten @ S).T.contiguous().to(X.device)
    return theta, _combined(rotation, X), _combined(rotation, Y)


def residual_rows(theta: torch.Tensor, X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Rows y_i - theta_i x_i, (q, n)."""
    return torch.addcmul(Y, theta.to(X.device, X.dtype)[:, None], X, value=-1)


def complement(R: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (b, n), b <= len(R), of the rows R without their part in the span of the orthonormal rows X.

    Rows are brought to length one first, so that small residuals count as much as large ones; twice projected and whitened, since
    the first projection leaves eps |R| / |R - R X'X| of X behind. Rows that are rounding of the others are left out; b may be 0.
    """
    for _ in range(2):
        size = gram(R, R).diagonal().sqrt()
        R = R[(size > 0.0).to(R.device)] / size[size > 0.0].to(R.device, R.dtype)[:, None]
        if not len(R):
            return R
        R = R - _combined(gram(R, X).to(R.device), X)
        size, Q = torch.linalg.eigh(gram(R, R))
        kept = size > _DEPENDENT
        if not bool(kept.any()):
            return R[:0]
        R = _combined((Q[:, kept] / size[kept].sqrt()).T.contiguous().to(R.device), R)
    return R


def gram(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """X Y' (q, p) in float64 on the host."""
    total = torch.zeros((X.shape[0], Y.shape[0]), dtype=torch.float64, device=X.device)
    for x, y in zip(X.split(_CHUNK, 1), Y.split(_CHUNK, 1), strict=True):  # type: ignore[no-untyped-call]
        total += x.double() @ y.double().T
    return total.cpu()


def _combined(S: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """S V as new rows."""
    return ops.combine(S, V, out=torch.empty((S.shape[0], V.shape[1]), dtype=V.dtype, device=V.device))
