"""A layer's block of the Gauss-Newton matrix in three forms, each a sum over samples s of  J_s' B_s' S_s' D_s S_s B_s J_s.

B_s is dz/dy for the layer's output y, J_s is dy/dtheta, S_s' D_s S_s the Hessian of the loss by z (`loss_root`). With n parameters,
N samples, r rows of S and d numbers of y a sample:

    dense        the matrix itself                 n^2 numbers      a product reads it once
    jacobian     A = S B J, row by row             N r n            reads it twice
    sensitivity  S B, and the layer's own calls    N r d            reads it twice, beside a forward and a backward pass of the layer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastsharp.curvature.rop.split import Segment

Tensor = torch.Tensor


class Factor(ABC):
    """One layer's block, to which batches are added; rows of S come in parts, `signs` (r, samples) with each, None for 1.

    square_norm   sum D ||A||^2 over all rows, the trace, where the rows of A were formed; None elsewhere
    """

    form: str

    def __init__(self) -> None:
        self.square_norm: float | None = 0.0

    @abstractmethod
    def add(self, segment: Segment, y_g: Tensor, signs: Tensor | None, w: Tensor) -> Tensor:
        """Take rows y_g (r, *y's shape) = S B of a batch; returns the sum of w (r, samples) A over rows and samples, (n,)."""

    @abstractmethod
    def product(self, v: Tensor, out: Tensor) -> None:
        """out += A v for one vector (n,)."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    def _see(self, A: Tensor, signs: Tensor | None) -> None:
        squares = torch.linalg.vector_norm(A, dim=1, dtype=torch.float64).square()
        assert self.square_norm is not None
        self.square_norm += float(squares.sum() if signs is None else squares @ signs.reshape(-1).double())


def _rows(segment: Segment, y_g: Tensor, samples: int) -> Tensor:
    """A, (r samples, n)."""
    found = segment.sample_gradients(y_g, samples)
    return found.reshape(-1, found.shape[2])


class Dense(Factor):
    """The block itself, for layers of few parameters."""

    form = "dense"

    def __init__(self, n: int, like: Tensor) -> None:
        super().__init__()
        self._matrix = like.new_zeros(n, n)

    def add(self, segment: Segment, y_g: Tensor, signs: Tensor | None, w: Tensor) -> Tensor:
        A = _rows(segment, y_g, w.shape[1])
        self._see(A, signs)
        self._matrix.addmm_((A if signs is None else A * signs.reshape(-1, 1)).T, A)
        return w.reshape(-1) @ A

    def product(self, v: Tensor, out: Tensor) -> None:
        out.addmv_(self._matrix, v)

    def nbytes(self) -> int:
        return self._matrix.nbytes


class Jacobian(Factor):
    """The rows of A."""

    form = "jacobian"

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[Tensor, Tensor | None]] = []

    def add(self, segment: Segment, y_g: Tensor, signs: Tensor | None, w: Tensor) -> Tensor:
        A = _rows(segment, y_g, w.shape[1])
        self._see(A, signs)
        self._parts.append((A, None if signs is None else signs.reshape(-1)))
        return w.reshape(-1) @ A

    def product(self, v: Tensor, out: Tensor) -> None:
        for A, signs in self._parts:
            u = A @ v
            out.addmv_(A.T, u if signs is None else u.mul_(signs))

    def nbytes(self) -> int:
        return sum(A.nbytes for A, _ in self._parts)


class _Part(NamedTuple):
    segment: Segment
    shape: tuple[int, ...]  # of y
    y_g: Tensor  # (samples, r, d)
    signs: Tensor | None  # (samples, r)


class Sensitivity(Factor):
    """S B by samples, and the segment from the parameters to y. Rows of A are formed for the trace alone, and dropped.

    shapes   of the layer's parameters
    """

    form = "sensitivity"

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._shapes = [tuple(shape) for shape in shapes]
        self._sizes = [torch.Size(shape).numel() for shape in self._shapes]
        self._parts: list[_Part] = []

    def add(self, segment: Segment, y_g: Tensor, signs: Tensor | None, w: Tensor) -> Tensor:
        samples = w.shape[1]
        if self.square_norm is not None and segment.by_sample(samples):
            self._see(_rows(segment, y_g, samples), signs)
        else:
            self.square_norm = None
        by_sample = y_g.reshape(len(y_g), samples, -1).transpose(0, 1).contiguous()  # (samples, r, d)
        part = _Part(segment, tuple(y_g.shape[1:]), by_sample, None if signs is None else signs.T.contiguous())
        self._parts.append(part)
        total = y_g.new_zeros(1, sum(self._sizes))
        self._back(part, w.T[:, None], total)
        return total[0]

    def product(self, v: Tensor, out: Tensor) -> None:
        tangents = self._split(v[None])
        for part in self._parts:
            y_t = part.segment.tangent(tangents)
            if y_t is None:
                continue
            u = part.y_g @ y_t.reshape(len(part.y_g), -1, 1)  # (samples, r, 1)
            if part.signs is not None:
                u.mul_(part.signs[:, :, None])
            self._back(part, u.mT, out[None])

    def nbytes(self) -> int:
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for part in self._parts for t in part.segment.held()}
        return sum(held.values()) + sum(part.y_g.nbytes for part in self._parts)

    def _split(self, v: Tensor) -> list[Tensor]:
        return [part.view(len(v), *shape) for part, shape in zip(v.split(self._sizes, 1), self._shapes, strict=True)]  # type: ignore[no-untyped-call]

    def _back(self, part: _Part, u: Tensor, out: Tensor) -> None:
        """out (1, n) += J' of the sum over rows of u (samples, 1, r) y_g."""
        part.segment.add_adjoint((u @ part.y_g).reshape(1, *part.shape), self._split(out))
