"""Views and copies: the tangent of a view is the same view of the tangent, and nothing is copied where torch copies nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Constant, Layout, Linear, lift, sum_to
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule

aten = torch.ops.aten


def dim_of(dim: int, dims: int) -> int:
    """A dimension of a primal, counted from the front, as it stands in a tangent."""
    return (dim + dims if dim < 0 else dim) + 1


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
    aten.alias.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.view_copy.default,
    aten.unsqueeze_copy.default,
    aten.squeeze_copy.default,
    aten.alias_copy.default,
    aten.lift.default,
)
def reshape(call: Call) -> Part | None:
    """The same elements under another shape."""
    before, after = tuple(call.inputs[0].shape), tuple(call.outputs[0].shape)
    return Linear(call, lambda t: t.reshape(t.shape[0], *after), lambda g: g.reshape(g.shape[0], *before))


@rule(aten.clone.default, aten.contiguous.default)
def clone(call: Call) -> Part | None:
    """The identity; a clone that changes the layout is made of the tangent too, for what follows wants it."""
    return Linear(call, Layout(call.outputs[0]).like, _same)


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


@rule(aten._to_copy.default)
def to_copy(call: Call) -> Part | None:
    """Another dtype, device or layout."""
    x, y = call.inputs[0], call.outputs[0]
    if not y.is_floating_point():
        return Constant(call)
    if y.layout != torch.strided:
        return None
    layout, before, after = Layout(y), (x.dtype, x.device), (y.dtype, y.device)
    if before == after:
        return Linear(call, layout.like, _same)
    return Linear(call, lambda t: t.to(dtype=after[0], device=after[1]), lambda g: g.to(dtype=before[0], device=before[1]))


@rule(aten.permute.default, aten.permute_copy.default)
def permute(call: Call) -> Part | None:
    n = call.inputs[0].dim()
    order = [0, *(dim_of(d, n) for d in call.args[1])]
    back = [order.index(i) for i in range(n + 1)]
    return Linear(call, lambda t: t.permute(order), lambda g: g.permute(back))


@rule(aten.transpose.int, aten.t.default, aten.transpose_copy.int)
def transpose(call: Call) -> Part | None:
    n = call.inputs[0].dim()
    if n < 2:
        return Linear(call, _same, _same)
    i, j = (dim_of(d, n) for d in (call.args[1:3] if call.func is not aten.t.default else (0, 1)))
    return Linear(call, lambda t: t.transpose(i, j), lambda g: g.transpose(i, j))


@rule(aten.expand.default, aten.expand_copy.default)
def expand(call: Call) -> Part | None:
    before, after = tuple(call.inputs[0].shape), tuple(call.outputs[0].shape)
    return Linear(call, lambda t: lift(t, len(after)).expand(-1, *after), lambda g: sum_to(g, before))


class Window(Part):
    """y = a window of x (a view that takes each element at most once). Its adjoint writes into the same window of a zero tensor."""

    second_order = False

    def __init__(self, call: Call, window: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.window, self.layout = window, Layout(call.inputs[0])
        self.whole = call.inputs[0].shape == call.outputs[0].shape

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        return [self.window(t)], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        if g is None:
            return [None]
        if into and into[0] is not None:
            self.window(into[0]).add_(g)
            return [None]
        if self.whole:
            return [g]
        x_gt = self.layout.zeros(g)
        self.window(x_gt).copy_(g)
        return [x_gt]


def window_of(func: Any, call: Call, first: int = 1) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The window that a call of slice, select, diagonal or as_strided takes, of a tangent; the arguments begin at number `first`."""
    n = call.inputs[0].dim()

    def argument(k: int, name: str, default: Any) -> Any:
        return call.argument(first + k, name, default)

    if func is aten.select:
        dim, index = dim_of(argument(0, "dim", 0), n), argument(1, "index", 0)
        return lambda t: t.select(dim, index)
    if func is aten.slice:
        dim = dim_of(argument(0, "dim", 0), n)
        start, end, step = argument(1, "start", None), argument(2, "end", None), argument(3, "step", 1)
        return lambda t: aten.slice.Tensor(t, dim, start, end, step)
    if func is aten.diagonal:
        offset, i, j = argument(0, "offset", 0), dim_of(argument(1, "dim1", 0), n), dim_of(argument(2, "dim2", 1), n)
        return lambda t: t.diagonal(offset, i, j)
    return None


@rule(aten.select.int, aten.select_copy.int)
def select(call: Call) -> Part | None:
    window = window_of(aten.select, call)
    return None if window is None else Window(call, window)


@rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def slice_(call: Call) -> Part | None:
    window = window_of(aten.slice, call)
    return None if window is None else Window(call, window)


@rule(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(call: Call) -> Part | None:
    window = window_of(aten.diagonal, call)
    return None if window is None else Window(call, window)


@rule(aten.as_strided.default)
def as_strided(call: Call) -> Part | None:
    """By the places, in x read in logical order, that the strides reach; refused where x does not own those places."""
    x, y = call.inputs[0], call.outputs[0]
    places = torch.full((x.untyped_storage().nbytes() // x.element_size(),), -1, dtype=torch.int64, device=x.device)
    x_places = places.as_strided(x.shape, x.stride(), x.storage_offset())
    x_places.copy_(torch.arange(x.numel(), device=x.device).view(x.shape))
    if bool((x_places.reshape(-1) != torch.arange(x.numel(), device=x.device)).any()):
        return None  # x overlaps itself
    index = places.as_strided(y.shape, y.stride(), y.storage_offset()).reshape(-1)
    if index.numel() and int(index.min()) < 0:
        return None
    before, after = tuple(x.shape), tuple(y.shape)

    def apply(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return t.reshape(t.shape[0], -1).index_select(1, index).view(-1, *after)

    def back(g: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        zero = g.new_zeros(g.shape[0], x_size)
        return zero.index_add_(1, index, g.reshape(g.shape[0], -1)).view(-1, *before)

    x_size = x.numel()
    return Linear(call, apply, back, index)
