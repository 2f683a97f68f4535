"""Linear algebra on rows of length n: float64 arithmetic in column chunks, no float64 copy of a whole row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_CHUNK = 1 << 15  # columns at a time: 256 KiB of float64 per row


def chunks(n: int) -> Iterator[slice]:
    """[0, n) in pieces whose float64 copies stay in cache."""
    return (slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK))


def normalise_rows(X: torch.Tensor) -> torch.Tensor:
    """x_i / ||x_i|| in place, norms in float64: X (k, n) rows far from the ends of the range. Returns X."""
    square = torch.zeros(X.shape[0], dtype=torch.float64, device=X.device)
    for c in chunks(X.shape[1]):
        square += X[:, c].double().square().sum(1)
    return X.mul_((1.0 / square.sqrt()).to(X.dtype)[:, None])


def rayleigh(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """theta_i = x_i'y_i / x_i'x_i and r_i = ||y_i - theta_i x_i|| / ||x_i|| for rows x_i and y_i = A x_i: both (k,) float64 on the host."""
    xx = torch.zeros(X.shape[0], dtype=torch.float64, device=X.device)
    xy, rr = torch.zeros_like(xx), torch.zeros_like(xx)
    for c in chunks(X.shape[1]):
        x, y = X[:, c].double(), Y[:, c].double()
        xx += x.square().sum(1)
        xy += (x * y).sum(1)
    theta = xy / xx
    for c in chunks(X.shape[1]):
        rr += (Y[:, c].double() - theta[:, None] * X[:, c].double()).square().sum(1)
    return theta.cpu(), (rr / xx).sqrt().cpu()


def dot(u: torch.Tensor, v: torch.Tensor) -> float:
    """u'v in float64."""
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    for c in chunks(u.numel()):
        total += torch.dot(u[c].double(), v[c].double())
    return float(total)


def norm(v: torch.Tensor) -> float:
    """||v|| in float64; v must be far from the ends of float64's range."""
    return math.sqrt(dot(v, v))


def largest(V: torch.Tensor) -> float:
    """max |V_ij|, NaN or Inf if V holds one."""
    return float(torch.linalg.vector_norm(V, ord=math.inf))


def exponent(x: float) -> int:
    """e with 2^(e-1) <= x < 2^e, 0 for x = 0: scaling by 2^-e is exact and brings x to [1/2, 1)."""
    return math.frexp(x)[1]


def scale(w: torch.Tensor, e: int) -> torch.Tensor:
    """2^e w in place, exact unless the result leaves the normal range; in two factors, as 2^e alone may leave it."""
    return w.mul_(2.0 ** (e // 2)).mul_(2.0 ** (e - e // 2))


def scaled(w: torch.Tensor, e: int) -> torch.Tensor:
    """2^e w as a new tensor."""
    return scale(w.clone(), e)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """x / ||x|| as a new tensor, safe at any scale of x."""
    x = scaled(x, -exponent(largest(x)))
    return x.div_(norm(x))
