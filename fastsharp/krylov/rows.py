"""Tall-skinny linear algebra on rows of length n: float64 arithmetic in column chunks, no float64 copy of a whole row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_CHUNK = 1 << 15  # columns at a time: 256 KiB of float64 per row


class Basis:
    """Rows of one storage (capacity, ldv), ldv = n padded to 16 elements, grown by half: memory follows the steps taken."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, max_rows: int) -> None:
        self.n = n
        self._max_rows = max_rows
        self._storage = torch.empty((min(32, max_rows), -(-n // 16) * 16), dtype=dtype, device=device)

    def row(self, i: int) -> torch.Tensor:
        """Row i as a view (n,), contiguous. May move the storage: fetch other rows afterwards."""
        rows = self._storage.shape[0]
        if i >= rows:
            grown = self._storage.new_empty((min(self._max_rows, max(i + 1, rows + rows // 2)), self._storage.shape[1]))
            grown[:rows] = self._storage
            self._storage = grown  # one assignment: an interrupt leaves either the old or the new storage, both whole
        return self._storage[i, : self.n]

    def rows(self, j: int) -> torch.Tensor:
        """The first j rows as a view (j, n) with row stride ldv."""
        return self._storage[:j, : self.n]


def _chunks(n: int) -> Iterator[slice]:
    return (slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK))


def combine(S: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """X = D S V with D such that every row of X has norm one: S (k, j) float64, V (j, n) -> X (k, n) in V's dtype.

    Summed and normalised in float64, rounded once; costs two reads of V.
    """
    S = S.to(V.device)
    square = torch.zeros(S.shape[0], dtype=torch.float64, device=V.device)
    for c in _chunks(V.shape[1]):
        square += (S @ V[:, c].double()).square().sum(1)
    S = S / square.sqrt()[:, None]
    X = V.new_empty((S.shape[0], V.shape[1]))
    for c in _chunks(V.shape[1]):
        X[:, c] = (S @ V[:, c].double()).to(V.dtype)
    return X


def rayleigh(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """theta_i = x_i'y_i / x_i'x_i and r_i = ||y_i - theta_i x_i|| / ||x_i|| for rows x_i and y_i = A x_i: both (k,) float64 on the host."""
    xx = torch.zeros(X.shape[0], dtype=torch.float64, device=X.device)
    xy, rr = torch.zeros_like(xx), torch.zeros_like(xx)
    for c in _chunks(X.shape[1]):
        x, y = X[:, c].double(), Y[:, c].double()
        xx += x.square().sum(1)
        xy += (x * y).sum(1)
    theta = xy / xx
    for c in _chunks(X.shape[1]):
        rr += (Y[:, c].double() - theta[:, None] * X[:, c].double()).square().sum(1)
    return theta.cpu(), (rr / xx).sqrt().cpu()


def dot(u: torch.Tensor, v: torch.Tensor) -> float:
    """u'v in float64."""
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    for c in _chunks(u.numel()):
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
