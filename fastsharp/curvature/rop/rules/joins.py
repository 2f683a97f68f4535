"""Splits, joins, and writes into a part of a tensor: the tangents are cut and pasted as the values are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Constant, Layout, Linear, lift, sum_to
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.curvature.rop.rules.views import dim_of, window_of

aten = torch.ops.aten


def _paste(values: Tangents, places: Sequence[torch.Tensor]) -> None:
    """Each value into its place, None as zero."""
    for t, place in zip(values, places, strict=True):
        if t is None:
            place.zero_()
        else:
            place.copy_(t)


class Split(Part):
    """One input in several outputs along a dimension."""

    second_order = False

    def __init__(self, call: Call, cut: Callable[[torch.Tensor], Any]) -> None:
        self.cut, self.layout = cut, Layout(call.inputs[0])

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        return list(self.cut(t)), None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        some = next((g for g in y_gt if g is not None), None)
        if some is None:
            return [None]
        x_gt = self.layout.empty(some)
        _paste(y_gt, self.cut(x_gt))
        return [x_gt]


@rule(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.split_copy.Tensor,
    aten.unbind_copy.int,
)
def split(call: Call) -> Part | None:
    name, n = call.func.overloadpacket, call.inputs[0].dim()
    if name in (aten.unbind, aten.unbind_copy):
        dim = dim_of(call.argument(1, "dim", 0), n)
        return Split(call, lambda t: t.unbind(dim))
    dim = dim_of(call.argument(2, "dim", 0), n)
    sizes = [y.shape[dim - 1] for y in call.outputs]
    return Split(call, lambda t: torch.split_with_sizes(t, sizes, dim))


class Join(Part):
    """Several inputs in one output along a dimension: cat and stack."""

    second_order = False

    def __init__(self, call: Call, cut: Callable[[torch.Tensor], Any]) -> None:
        self.cut, self.layout = cut, Layout(call.outputs[0])
        self.active, self.dtypes = call.active, [x.dtype for x in call.inputs]

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        some = next(t for t in x_t if t is not None)
        y_t = self.layout.empty(some)
        _paste(x_t, self.cut(y_t))
        return [y_t], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        if g is None:
            return [None] * len(self.active)
        pieces = self.cut(g)
        return [p.to(d) if a else None for p, a, d in zip(pieces, self.active, self.dtypes, strict=True)]


@rule(aten.cat.default)
def cat(call: Call) -> Part | None:
    n = call.outputs[0].dim()
    if any(x.dim() != n for x in call.inputs):
        return None  # the empty 1-d tensors that cat skips
    dim = dim_of(call.argument(1, "dim", 0), n)
    sizes = [x.shape[dim - 1] for x in call.inputs]
    return Join(call, lambda t: torch.split_with_sizes(t, sizes, dim))


@rule(aten.stack.default)
def stack(call: Call) -> Part | None:
    dim = dim_of(call.argument(1, "dim", 0), call.outputs[0].dim())
    return Join(call, lambda t: t.unbind(dim))


class Scattered(Part):
    """y = x with a window of it replaced by src: an in-place write made functional."""

    second_order = False

    def __init__(self, call: Call, window: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.window, self.layout = window, Layout(call.outputs[0])
        self.x, self.src = call.active
        self.shape, self.dtype = tuple(call.inputs[1].shape), call.inputs[1].dtype

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        x, src = x_t
        some = x if x is not None else src
        assert some is not None
        y_t = self.layout.zeros(some) if x is None else self.layout.empty(some).copy_(x)
        place = self.window(y_t)
        _paste([None if src is None else lift(src, place.dim() - 1)], [place])
        return [y_t], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        if g is None:
            return [None, None]
        x_gt = None
        if self.x:
            x_gt = self.layout.empty(g).copy_(g)
            self.window(x_gt).zero_()
        return [x_gt, sum_to(self.window(g), self.shape).to(self.dtype) if self.src else None]


@rule(aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)
def scattered(call: Call) -> Part | None:
    packets = {
        aten.slice_scatter.default: aten.slice,
        aten.select_scatter.default: aten.select,
        aten.diagonal_scatter.default: aten.diagonal,
    }
    window = window_of(packets[call.func], call, 2)
    return None if window is None else Scattered(call, window)


@rule(aten.copy.default)
def copy(call: Call) -> Part | None:
    """y = src in the shape, dtype and layout of x, whose own values are gone."""
    layout, shape, dtype = Layout(call.outputs[0]), tuple(call.inputs[1].shape), call.inputs[1].dtype
    if not call.active[1]:
        return Constant(call)
    return Linear(
        call,
        lambda t: layout.empty(t).copy_(lift(t, len(layout.shape))),
        lambda g: sum_to(g, shape).to(dtype),
        position=1,
    )
