"""Views, copies and joins: the tangent of a view is the same view of the tangent, and nothing is copied where torch copies nothing."""

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
        for g, place in zip(y_gt, self.cut(x_gt), strict=True):
            if g is None:
                place.zero_()
            else:
                place.copy_(g)
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
        for t, place in zip(x_t, self.cut(y_t), strict=True):
            if t is None:
                place.zero_()
            else:
                place.copy_(t)
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
        if src is None:
            place.zero_()
        else:
            place.copy_(lift(src, place.dim() - 1))
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


def _twice(
    func: Callable[..., torch.Tensor], *args: Any
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    return (lambda t: func(t, *args)), (lambda g: func(g, *args))


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Part | None:
    return Linear(call, *_twice(torch.tril if call.func is aten.tril.default else torch.triu, call.argument(1, "diagonal", 0)))


@rule(aten.flip.default)
def flip(call: Call) -> Part | None:
    return Linear(call, *_twice(torch.flip, [dim_of(d, call.inputs[0].dim()) for d in call.args[1]]))


@rule(aten.roll.default)
def roll(call: Call) -> Part | None:
    shifts, dims, n = call.args[1], call.argument(2, "dims", ()), call.inputs[0].dim()
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    if not dims:
        shape, (shift,) = tuple(call.inputs[0].shape), shifts
        return Linear(
            call,
            lambda t: t.reshape(t.shape[0], -1).roll(shift, 1).view(-1, *shape),
            lambda g: g.reshape(g.shape[0], -1).roll(-shift, 1).view(-1, *shape),
        )
    places = [dim_of(d, n) for d in ([dims] if isinstance(dims, int) else dims)]
    return Linear(call, lambda t: t.roll(shifts, places), lambda g: g.roll([-s for s in shifts], places))


@rule(aten.cumsum.default)
def cumsum(call: Call) -> Part | None:
    dim = dim_of(call.args[1], max(call.inputs[0].dim(), 1))
    if call.inputs[0].dim() == 0 or call.outputs[0].dtype != call.inputs[0].dtype:
        return None
    return Linear(call, lambda t: t.cumsum(dim), lambda g: g.flip(dim).cumsum(dim).flip(dim))


@rule(aten.repeat.default)
def repeat(call: Call) -> Part | None:
    """Copies side by side; the adjoint sums over them."""
    repeats, before = list(call.args[1]), tuple(call.inputs[0].shape)
    padded = (1,) * (len(repeats) - len(before)) + before
    parted = [s for pair in zip(repeats, padded, strict=True) for s in pair]
    copies = list(range(1, 2 * len(repeats), 2))

    def back(g: torch.Tensor) -> torch.Tensor:
        return g.reshape(g.shape[0], *parted).sum(copies).reshape(g.shape[0], *before) if copies else g

    return Linear(call, lambda t: lift(t, len(repeats)).repeat(1, *repeats), back)


@rule(aten.unfold.default)
def unfold(call: Call) -> Part | None:
    """Sliding windows; the adjoint is torch's unfold_backward."""
    dim, size, step = call.args[1:4]
    if call.inputs[0].dim() == 0:
        return None
    dim, shape = dim_of(dim, call.inputs[0].dim()), tuple(call.inputs[0].shape)
    return Linear(
        call,
        lambda t: t.unfold(dim, size, step),
        lambda g: aten.unfold_backward(g, [g.shape[0], *shape], dim, size, step),
    )
