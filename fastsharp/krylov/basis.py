"""Where the Krylov basis lives: in the vectors' own dtype, as scaled float16 rows, or in host memory.

All three offer the same few moves, so the recurrence does not know which one it runs on. Working vectors (the row being made and
the two before it) are in the operator's dtype on its device; the scalars of a step stay there too, in float64.

Note on numerical properties. A float16 row stands for 2^e w, with 2^e ||w|| near sqrt(n), so that entries are of order one; the
factor that makes it the unit vector is kept in float64. Reorthogonalisation coefficients are of the size of rounding, so a row
that is off by 2^-11 spoils orthogonality to a few 1e-6 and Ritz values by its square. Ritz vectors assembled from such rows have
residuals of a few 1e-4 |theta|: for tolerances of 1e-3 or more, or of values, alone (Aliaga et al. 2020, 2009.12101).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from fastsharp import ops
from fastsharp.krylov.rows import chunks, normalise_rows

_RING = 3  # the row being made and the two before it
_HOST_GROUP = 8  # rows on their way from host memory at a time


class Basis(ABC):
    """Rows v_0, v_1, ... of R^n, orthonormal as far as the recurrence made them so; `capacity` rows at most, the one in work included."""

    noise = 0.0  # relative error of a stored row

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.n = n
        self.dtype = dtype
        self.device = device
        self.capacity = capacity

    @abstractmethod
    def vector(self, i: int) -> torch.Tensor:
        """Row i as a contiguous (n,) view in working precision: the row being made (writable), or one of the two before it."""

    @abstractmethod
    def project(self, j: int, ab: torch.Tensor | None, c: torch.Tensor, after: torch.Tensor) -> None:
        """w <- (I - V'V)(w - ab[0] v_{j-1} - ab[1] v_{j-2}) for w = vector(j) and the j rows before it.

        c (j + 1,) receives V w of the w between and its square; after (1,) the square of the new w. float64 on the device.
        """

    @abstractmethod
    def subtract(self, first: int, c: list[float], w: torch.Tensor) -> None:
        """w <- w - sum_i c_i v_{first + i}."""

    @abstractmethod
    def accept(self, j: int, norm: float) -> None:
        """v_j = w / norm for the w = vector(j) that `project` left."""

    @abstractmethod
    def place(self, i: int, v: torch.Tensor) -> None:
        """v_i = v, a unit vector."""

    @abstractmethod
    def rows(self, j: int) -> torch.Tensor:
        """The first j rows (j, n) in working precision; a view where that is how they are stored, else a copy."""

    @abstractmethod
    def combine(self, S: torch.Tensor) -> torch.Tensor:
        """X (k, n) = S V with rows scaled to norm one; S (k, j) float64 on the host."""

    @abstractmethod
    def compress(self, S: torch.Tensor) -> None:
        """v_i <- (S V)_i for the l rows of S (l, j), l < j, and v_l <- v_j. Not to be interrupted."""


class Rows(Basis):
    """Rows of one storage (capacity, ldv) in the operator's dtype, ldv = n padded to 16 elements.

    Grows by half, so that memory follows the steps taken; `upfront` takes all of it at once, where the copy of a growth has no room.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, capacity: int, *, upfront: bool = False) -> None:
        super().__init__(n, dtype, device, capacity)
        first = capacity if upfront else min(32, capacity)
        self._storage = torch.empty((first, padded(n)), dtype=dtype, device=device)

    def vector(self, i: int) -> torch.Tensor:
        rows = self._storage.shape[0]
        if i >= rows:
            grown = self._storage.new_empty((min(self.capacity, max(i + 1, rows + rows // 2)), self._storage.shape[1]))
            grown[:rows] = self._storage
            self._storage = grown  # one assignment: an interrupt leaves either the old or the new storage, both whole
        return self._storage[i, : self.n]

    def project(self, j: int, ab: torch.Tensor | None, c: torch.Tensor, after: torch.Tensor) -> None:
        V, w = self._storage[:j, : self.n], self.vector(j)
        ops.dots(V, w, ab, out=c)
        ops.update(V, w, c[:j], out=after)

    def subtract(self, first: int, c: list[float], w: torch.Tensor) -> None:
        _subtract(self._storage[first : first + len(c), : self.n], torch.tensor(c, dtype=torch.float64, device=self.device), w)

    def accept(self, j: int, norm: float) -> None:
        self.vector(j).div_(norm)

    def place(self, i: int, v: torch.Tensor) -> None:
        self.vector(i).copy_(v)

    def rows(self, j: int) -> torch.Tensor:
        return self._storage[:j, : self.n]

    def combine(self, S: torch.Tensor) -> torch.Tensor:
        X = torch.empty((S.shape[0], self.n), dtype=self.dtype, device=self.device)
        return normalise_rows(ops.combine(S.to(self.device).contiguous(), self.rows(S.shape[1]), out=X))

    def compress(self, S: torch.Tensor) -> None:
        (kept, j), S = S.shape, S.to(self.device)
        for c in chunks(self.n):
            self._storage[:kept, c] = (S @ self._storage[:j, c].double()).to(self.dtype)
        self._storage[kept] = self._storage[j]


class _Ring(Basis):
    """Working vectors apart from the stored rows."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        super().__init__(n, dtype, device, capacity)
        self._ring = torch.empty((_RING, padded(n)), dtype=dtype, device=device)

    def vector(self, i: int) -> torch.Tensor:
        return self._ring[i % _RING, : self.n]

    def _last(self, j: int, ab: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        return None if ab is None else (self.vector(j - 1), self.vector(j - 2) if j > 1 else None)

    def _move_working_row(self, source: int, target: int) -> None:
        if source % _RING != target % _RING:
            self._ring[target % _RING] = self._ring[source % _RING]


class HalfRows(_Ring):
    """Scaled float16 rows under float32 working vectors: half the memory and half the traffic of reorthogonalisation."""

    noise = 2.0**-11

    def __init__(self, n: int, device: torch.device, capacity: int, *, upfront: bool = False) -> None:
        super().__init__(n, torch.float32, device, capacity)
        self._storage = torch.empty((capacity if upfront else min(32, capacity), padded(n)), dtype=torch.float16, device=device)
        self._scales = torch.ones(capacity, dtype=torch.float64, device=device)  # v_i = scales[i] * storage[i]
        self._raw = torch.empty(capacity + 1, dtype=torch.float64, device=device)
        self._factor = torch.ones(1, dtype=torch.float64, device=device)
        # 2^15 at most: the entries of a unit vector stay below float16's 65504
        self._size = 2.0 ** min(15, round(math.log2(n) / 2))

    def _grow(self, i: int) -> None:
        rows = self._storage.shape[0]
        if i >= rows:
            grown = self._storage.new_empty((min(self.capacity, max(i + 1, rows + rows // 2)), self._storage.shape[1]))
            grown[:rows] = self._storage
            self._storage = grown

    def project(self, j: int, ab: torch.Tensor | None, c: torch.Tensor, after: torch.Tensor) -> None:
        self._grow(j)
        V, w, scales, raw = self._storage[:j, : self.n], self.vector(j), self._scales[:j], self._raw[: j + 1]
        ops.dots(V, w, ab, out=raw, last=self._last(j, ab))
        torch.mul(raw[:j], scales, out=c[:j])
        c[j:] = raw[j:]
        # a power of two, so that it costs no rounding; the row behind a breakdown is never used, whatever its factor
        torch.exp2((self._size * raw[j:].clamp(min=1e-300).rsqrt()).log2().round(), out=self._factor)
        ops.update(V, w, c[:j] * scales, out=after, row=self._storage[j, : self.n], factor=self._factor)

    def subtract(self, first: int, c: list[float], w: torch.Tensor) -> None:
        scales = self._scales[first : first + len(c)]
        _subtract(self._storage[first : first + len(c), : self.n], torch.tensor(c, dtype=torch.float64, device=self.device) * scales, w)

    def accept(self, j: int, norm: float) -> None:
        self.vector(j).div_(norm)
        torch.reciprocal(self._factor * norm, out=self._scales[j : j + 1])

    def place(self, i: int, v: torch.Tensor) -> None:
        self._grow(i)
        self.vector(i).copy_(v)
        self._storage[i, : self.n] = self._size * v
        self._scales[i] = 1.0 / self._size

    def rows(self, j: int) -> torch.Tensor:
        V = torch.empty((j, self.n), dtype=self.dtype, device=self.device)
        return V.copy_(self._scales[:j, None] * self._storage[:j, : self.n])

    def combine(self, S: torch.Tensor) -> torch.Tensor:
        j = S.shape[1]
        X = torch.empty((S.shape[0], self.n), dtype=self.dtype, device=self.device)
        return normalise_rows(ops.combine((S.to(self.device) * self._scales[:j]).contiguous(), self._storage[:j, : self.n], out=X))

    def compress(self, S: torch.Tensor) -> None:
        kept, j = S.shape
        D = S.to(self.device) * self._scales[:j] * self._size
        for c in chunks(self.n):
            self._storage[:kept, c] = (D @ self._storage[:j, c].double()).to(torch.float16)
        self._scales[:kept] = 1.0 / self._size
        self._storage[kept] = self._storage[j]
        self._scales[kept] = self._scales[j]
        self._move_working_row(j, kept)


class HostRows(_Ring):
    """Rows in host memory (page-locked where the device is a GPU), brought to the device a few at a time for each pass.

    Limited by the bus, not by device memory: for what a thick restart cannot make fit either.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        super().__init__(n, dtype, device, capacity)
        self._blocks: list[torch.Tensor] = []  # of _HOST_GROUP rows each, made when the first of them is stored
        self._buffer = torch.empty((_HOST_GROUP, padded(n)), dtype=dtype, device=device)
        self._raw = torch.empty(_HOST_GROUP + 1, dtype=torch.float64, device=device)

    def _row(self, i: int) -> torch.Tensor:
        while i >= len(self._blocks) * _HOST_GROUP:
            shape, pin = (_HOST_GROUP, self._buffer.shape[1]), self.device.type == "cuda"
            self._blocks.append(torch.empty(shape, dtype=self.dtype, pin_memory=pin))
        return self._blocks[i // _HOST_GROUP][i % _HOST_GROUP, : self.n]

    def _group(self, first: int, count: int) -> torch.Tensor:
        block = self._blocks[first // _HOST_GROUP]
        return self._buffer[:count].copy_(block[:count], non_blocking=True)[:, : self.n]

    def _groups(self, j: int) -> list[tuple[int, int]]:
        return [(i, min(_HOST_GROUP, j - i)) for i in range(0, j, _HOST_GROUP)]

    def project(self, j: int, ab: torch.Tensor | None, c: torch.Tensor, after: torch.Tensor) -> None:
        w = self.vector(j)
        for first, count in self._groups(j):
            V, raw = self._group(first, count), self._raw[: count + 1]
            removal = ab if first == 0 else None
            ops.dots(V, w, removal, out=raw, last=self._last(j, removal))
            c[first : first + count] = raw[:count]
            c[j:] = raw[count:]
        for first, count in self._groups(j):
            ops.update(self._group(first, count), w, c[first : first + count], out=after)

    def subtract(self, first: int, c: list[float], w: torch.Tensor) -> None:
        whole = torch.zeros(first + len(c), dtype=torch.float64, device=self.device)
        whole[first:] = torch.tensor(c, dtype=torch.float64)
        for i, count in self._groups(len(whole)):
            _subtract(self._group(i, count), whole[i : i + count], w)

    def accept(self, j: int, norm: float) -> None:
        self._row(j).copy_(self.vector(j).div_(norm))

    def place(self, i: int, v: torch.Tensor) -> None:
        self._row(i).copy_(self.vector(i).copy_(v))

    def rows(self, j: int) -> torch.Tensor:
        return torch.stack([self._row(i) for i in range(j)]) if j else self._buffer.cpu()[:0, : self.n]

    def combine(self, S: torch.Tensor) -> torch.Tensor:
        X = torch.zeros((S.shape[0], self.n), dtype=torch.float64, device=self.device)
        part = torch.empty((S.shape[0], self.n), dtype=self.dtype, device=self.device)
        for first, count in self._groups(S.shape[1]):
            X += ops.combine(S[:, first : first + count].contiguous().to(self.device), self._group(first, count), out=part)
        return normalise_rows(X.to(self.dtype))

    def compress(self, S: torch.Tensor) -> None:
        kept, j = S.shape
        for c in chunks(self.n):
            V = torch.stack([self._row(i)[c] for i in range(j)]).double()
            for i, x in enumerate((S @ V).to(self.dtype)):
                self._row(i)[c] = x
        self._row(kept).copy_(self._row(j))
        self._move_working_row(j, kept)


def padded(n: int) -> int:
    """n rounded up to 16 elements, so that every row starts on a multiple of 64 bytes in float32."""
    return -(-n // 16) * 16


def _subtract(V: torch.Tensor, c: torch.Tensor, w: torch.Tensor) -> None:
    ops.update(V, w, c, out=torch.empty(1, dtype=torch.float64, device=w.device))
