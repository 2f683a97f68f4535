"""Parts that many rules share: pointwise functions of broadcast inputs, linear maps, chains.

A pointwise y = f(x_1 .. x_k) has slopes f_i and bends f_ij (derivatives at the point, each of a shape that broadcasts to y's):
    y_t    = sum_i f_i x_t_i
    x_g_i  = f_i y_g
    x_gt_i = f_i y_gt + sum_j (f_ij y_g) x_t_j
each summed to the shape of its input where that was broadcast. f_ij y_g is formed once, with the adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.rule import Call, Part, Tangents

Factor = torch.Tensor | float


def lift(t: torch.Tensor, dims: int) -> torch.Tensor:
    """A tangent (b, *shape) as (b, 1 .., *shape) with `dims` dimensions after the first, so that it broadcasts as its primal does."""
    missing = dims + 1 - t.dim()
    return t if missing <= 0 else t.reshape(t.shape[0], *(1,) * missing, *t.shape[1:])


def sum_to(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Adjoint of broadcasting: (b, *broadcast shape) summed to (b, *shape)."""
    lead = t.dim() - 1 - len(shape)
    dims = [*range(1, lead + 1), *(lead + i for i, s in enumerate(shape, 1) if s == 1 and t.shape[lead + i] != 1)]
    return t.sum(dims, keepdim=True).reshape(t.shape[0], *shape) if dims else t


def width(tangents: Tangents) -> int:
    """b of a product, from the first tangent there is."""
    return next(t.shape[0] for t in tangents if t is not None)


class Layout:
    """Shape and strides of a primal. Its tangents are kept in the same order in memory: kernels that like channels last get it."""

    __slots__ = ("dtype", "shape", "strides")

    def __init__(self, primal: torch.Tensor) -> None:
        self.shape = tuple(primal.shape)
        self.dtype = primal.dtype
        self.strides = primal.stride() if _is_dense(primal) else torch.empty(self.shape, device="meta").stride()

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tangent (b, *shape) for the vectors of `like`."""
        strides = (max(math.prod(self.shape), 1), *self.strides)
        return torch.empty_strided((like.shape[0], *self.shape), strides, dtype=self.dtype, device=like.device)

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        return self.empty(like).zero_()

    def like(self, t: torch.Tensor) -> torch.Tensor:
        """The tangent t in this layout, copied only where it has another."""
        pairs = zip(t.shape[1:], t.stride()[1:], self.strides, strict=True)
        return t if all(n == 1 or a == b for n, a, b in pairs) else self.empty(t).copy_(t)


def _is_dense(t: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap."""
    size = 1
    for stride, extent in sorted((st, s) for s, st in zip(t.shape, t.stride(), strict=True) if s != 1):
        if stride != size:
            return False
        size *= extent
    return True


def _times(factor: Factor, t: torch.Tensor) -> torch.Tensor:
    """factor * t without a pass where the factor is one."""
    return t if isinstance(factor, float) and factor == 1.0 else t * factor


def _covers(total: torch.Tensor, t: torch.Tensor) -> bool:
    """Whether t broadcasts to the shape of total, and total is none the larger for it."""
    trailing = zip(reversed(total.shape), reversed(t.shape), strict=False)
    return t.dim() <= total.dim() and all(n == 1 or n == m for m, n in trailing)


def _plus(total: torch.Tensor | None, factor: Factor, t: torch.Tensor, owned: bool) -> torch.Tensor:
    """total + factor * t in one pass, into `total` where the caller owns it and it is large enough."""
    if total is None:
        return _times(factor, t)
    if isinstance(factor, float):
        if owned and _covers(total, t):
            return total.add_(t, alpha=factor)
        return torch.add(total, t, alpha=factor)
    if owned and _covers(total, t) and _covers(total, factor):
        return total.addcmul_(t, factor)
    return torch.addcmul(total, t, factor)


class Pointwise(Part):
    """y = f(inputs), elementwise with broadcasting, by the derivatives at the point.

    slopes    for each input f_i, None where the input is not active
    bends     f_ij by (i, j), i <= j, for active i and j; a pair that is missing is zero
    """

    def __init__(self, call: Call, slopes: Sequence[Factor | None], bends: Mapping[tuple[int, int], Factor] | None = None) -> None:
        y = call.outputs[0]
        self.shape, self.dtype, self.dims = tuple(y.shape), y.dtype, y.dim()
        self.slopes = [_cast(f, y) if a else None for f, a in zip(slopes, call.active, strict=True)]
        self.bends = {pair: _cast(f, y) for pair, f in (bends or {}).items() if call.active[pair[0]] and call.active[pair[1]]}
        self.second_order = bool(self.bends)
        self.weights: dict[tuple[int, int], torch.Tensor] = {}  # f_ij y_g
        self.wants = [(tuple(x.shape), x.dtype) for x in call.inputs]

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        lifted = [None if t is None else lift(t if t.dtype == self.dtype else t.to(self.dtype), self.dims) for t in x_t]
        y_t: torch.Tensor | None = None
        owned = False
        for slope, t in zip(self.slopes, lifted, strict=True):
            if t is not None and slope is not None:
                first = y_t is None
                y_t, owned = _plus(y_t, slope, t, owned), not (first and _is_one(slope))
        if y_t is not None and y_t.shape[1:] != self.shape:
            y_t = y_t.expand(-1, *self.shape)
        return [y_t], lifted if self.second_order else None

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_g
        if g is not None:
            self.weights = {pair: _times(bend, g) for pair, bend in self.bends.items()}
        self.bends = {}
        x_g = self.backward([None if g is None else g.unsqueeze(0)], None, ())
        return [None if x is None else x.squeeze(0) for x in x_g]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        x_gt: list[torch.Tensor | None] = []
        for i, (slope, (shape, dtype)) in enumerate(zip(self.slopes, self.wants, strict=True)):
            total: torch.Tensor | None = None
            if slope is not None:
                owned = False
                if g is not None:
                    total, owned = _times(slope, g), not _is_one(slope)
                for j, t in enumerate(kept or ()):
                    weight = self.weights.get((min(i, j), max(i, j)))
                    if t is not None and weight is not None:
                        total, owned = _plus(total, weight, t, owned), True
                if total is not None:
                    total = sum_to(total, shape)
                    total = total if total.dtype == dtype else total.to(dtype)
            x_gt.append(total)
        return x_gt


def _is_one(factor: Factor) -> bool:
    return isinstance(factor, float) and factor == 1.0


def _cast(factor: Factor | None, y: torch.Tensor) -> Any:
    """A factor in the dtype and on the device of y: masks become float masks once, not in every product."""
    return factor.to(y) if isinstance(factor, torch.Tensor) else None if factor is None else float(factor)


class Linear(Part):
    """y = A x of the input numbered `position`: `apply` and `transpose` take a tangent with b in front, and the tensors to keep."""

    second_order = False

    def __init__(
        self,
        call: Call,
        apply: Callable[..., torch.Tensor],
        transpose: Callable[..., torch.Tensor],
        *keep: torch.Tensor,
        position: int = 0,
    ) -> None:
        self.apply, self.transpose, self.keep = apply, transpose, keep
        self.position, self.inputs = position, len(call.inputs)
        self.outputs = len(call.outputs)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        x = x_t[self.position]
        y_t: list[torch.Tensor | None] = [None] * self.outputs
        y_t[0] = None if x is None else self.apply(x, *self.keep)
        return y_t, None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        if y_gt[0] is not None:
            x_gt[self.position] = self.transpose(y_gt[0], *self.keep)
        return x_gt


class Constant(Part):
    """A result whose derivative is zero wherever there is one: sign, floor, zeros_like, detach."""

    second_order = False

    def __init__(self, call: Call) -> None:
        self.inputs, self.outputs = len(call.inputs), len(call.outputs)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        return [None] * self.outputs, None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        return [None] * self.inputs


class Chain(Part):
    """Parts one after another, each of one output that is the next one's only input."""

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        self.second_order = any(part.second_order for part in parts)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        kept = []
        for part in self.parts:
            out, k = part.tangent(x_t)
            x_t = out
            kept.append(k)
        return list(x_t), kept

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        for part in reversed(self.parts):
            y_g = part.adjoint(y_g)
        return list(y_g)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        kept = kept or [None] * len(self.parts)
        for k, part in zip(reversed(kept), reversed(self.parts), strict=True):
            y_gt = part.backward(y_gt, k, into if part is self.parts[0] else ())
        return list(y_gt)

    def held(self) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from part.held()
