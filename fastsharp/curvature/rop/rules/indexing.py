"""Reads and writes by index: embedding, gather, scatter, advanced indexing. The indices are constants, so that all are linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Constant, Layout, Linear, lift, sum_to
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.curvature.rop.rules.views import dim_of

aten = torch.ops.aten


class Rows(Part):
    """y = x[.., index, ..] along one dimension; the adjoint adds into the rows, straight into the result where it can.

    present   0 where a row counts for nothing (the padding of an embedding), None where all count
    """

    second_order = False

    def __init__(self, call: Call, dim: int, index: torch.Tensor, position: int = 0, present: torch.Tensor | None = None) -> None:
        x = call.inputs[position]
        self.dim, self.index, self.layout, self.present = dim, index.reshape(-1), Layout(x), present
        shape = tuple(x.shape)
        self.after = (*shape[: dim - 1], *index.shape, *shape[dim:])
        self.flat = (*shape[: dim - 1], index.numel(), *shape[dim:])
        self.position, self.inputs = position, len(call.inputs)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        t = x_t[self.position]
        assert t is not None
        y_t = t.index_select(self.dim, self.index)
        if self.present is not None:
            y_t.mul_(self.present)
        return [y_t.view(len(y_t), *self.after)], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        (g,) = y_gt
        if g is None:
            return x_gt
        rows = g.reshape(len(g), *self.flat)
        if self.present is not None:
            rows = rows * self.present
        target = into[self.position] if into else None
        total = self.layout.zeros(g) if target is None else target
        if g.shape[0] == 1:  # without the dimension of b torch takes its fast path over whole rows
            total[0].index_add_(self.dim - 1, self.index, rows[0])
        else:
            total.index_add_(self.dim, self.index, rows)
        if target is None:
            x_gt[self.position] = total
        return x_gt


@rule(aten.embedding.default)
def embedding(call: Call) -> Part | None:
    """The row of the padding has no derivative, as in torch; scaling by frequency is left to torch."""
    weight, index = call.args[:2]
    padding = call.argument(2, "padding_idx", -1)
    if call.argument(3, "scale_grad_by_freq", False) or call.argument(4, "sparse", False):
        return None
    kept = index.reshape(-1) != padding
    present = None if padding < 0 or bool(kept.all()) else kept.to(weight.dtype).unsqueeze(1)
    return Rows(call, 1, index, present=present)


@rule(aten.index_select.default)
def index_select(call: Call) -> Part | None:
    x, dim, index = call.args
    if x.dim() == 0:
        return None
    return Rows(call, dim_of(dim, x.dim()), index)


def _indices(given: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Boolean masks as the integers they stand for."""
    indices: list[torch.Tensor | None] = []
    for index in given:
        if index is None:
            indices.append(None)
        elif index.dtype in (torch.bool, torch.uint8):
            indices.extend(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return indices


class Places:
    """Advanced indexing of a tangent: dimension b is whole, and comes first in the result too."""

    def __init__(self, given: Sequence[torch.Tensor | None]) -> None:
        self.indices = [None, *_indices(given)]
        used = [i for i, index in enumerate(self.indices) if index is not None]
        self.apart = used != list(range(used[0], used[-1] + 1))  # then torch puts the indexed dimensions in front of b
        self.dims = max(index.dim() for index in self.indices if index is not None)

    def take(self, t: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = aten.index.Tensor(t, self.indices)
        return y.movedim(self.dims, 0) if self.apart else y

    def put(self, t: torch.Tensor, values: torch.Tensor, accumulate: bool) -> torch.Tensor:
        aten.index_put_.default(t, self.indices, values.movedim(0, self.dims) if self.apart else values, accumulate)
        return t


@rule(aten.index.Tensor)
def index_(call: Call) -> Part | None:
    x, given = call.args
    indices = _indices(given)
    used = [i for i, index in enumerate(indices) if index is not None]
    if len(used) == 1:
        (i,) = used
        index = indices[i]
        assert index is not None
        return Rows(call, i + 1, torch.where(index < 0, index + x.shape[i], index).long())
    return Gathered(call, Places(given))


class Gathered(Part):
    """y = x[indices]; the adjoint adds g at the places they name."""

    second_order = False

    def __init__(self, call: Call, places: Places) -> None:
        self.places, self.indices, self.layout, self.inputs = places, places.indices, Layout(call.inputs[0]), len(call.inputs)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        assert x_t[0] is not None
        return [self.places.take(x_t[0])], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        (g,) = y_gt
        if g is not None:
            x_gt[0] = self.places.put(self.layout.zeros(g), g, True)
        return x_gt


class Put(Part):
    """y = x with values written (or added) at the places; the values broadcast to x[indices]."""

    second_order = False

    def __init__(self, call: Call, places: Places, accumulate: bool) -> None:
        self.places, self.indices, self.accumulate = places, places.indices, accumulate
        self.layout, self.inputs = Layout(call.outputs[0]), len(call.inputs)
        self.active = call.active[0], call.active[-1]
        values = call.inputs[-1]
        self.shape, self.dtype = tuple(values.shape), values.dtype
        self.dims = aten.index.Tensor(call.inputs[0], call.args[1]).dim()

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        x, values = x_t[0], x_t[-1]
        some = x if x is not None else values
        assert some is not None
        y_t = self.layout.zeros(some) if x is None else self.layout.empty(some).copy_(x)
        if values is not None:
            self.places.put(y_t, lift(values, self.dims), self.accumulate)
        elif not self.accumulate:
            aten.index_put_.default(y_t, self.indices, y_t.new_zeros(()))
        return [y_t], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        (g,) = y_gt
        if g is None:
            return x_gt
        if self.active[1]:
            x_gt[-1] = sum_to(self.places.take(g), self.shape).to(self.dtype)
        if self.active[0]:
            x_gt[0] = g if self.accumulate else aten.index_put_.default(self.layout.empty(g).copy_(g), self.indices, g.new_zeros(()))
        return x_gt


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(call: Call) -> Part | None:
    """Written twice at one place without accumulation, which value stays is not defined: left to torch."""
    accumulate = bool(call.argument(3, "accumulate", False))
    places = Places(call.args[1])
    if not accumulate and _repeats(call.args[0], places):
        return None
    return Put(call, places, accumulate)


def _repeats(x: torch.Tensor, places: Places) -> bool:
    count = x.new_zeros((1, *x.shape), dtype=torch.int32)
    aten.index_put_.default(count, places.indices, count.new_ones(()), True)
    return bool((count > 1).any())


def _wide(index: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return index.unsqueeze(0).expand(t.shape[0], *index.shape)


@rule(aten.gather.default)
def gather(call: Call) -> Part | None:
    x, dim, index = call.args[:3]
    if x.dim() == 0 or index.dim() == 0:
        return None
    axis, layout = dim_of(dim, x.dim()), Layout(x)
    return Linear(
        call,
        lambda t, i: t.gather(axis, _wide(i, t)),
        lambda g, i: layout.zeros(g).scatter_add_(axis, _wide(i, g), g),
        index,
    )


class Scatter(Part):
    """y = x with src written (or added) at the index along one dimension."""

    second_order = False

    def __init__(self, call: Call, adds: bool) -> None:
        x, dim, self.index = call.args[:3]
        self.axis, self.adds, self.layout = dim_of(dim, x.dim()), adds, Layout(call.outputs[0])
        self.inputs, self.x = len(call.inputs), call.active[0]
        self.src = Layout(call.inputs[2]) if len(call.inputs) > 2 and call.active[2] else None
        self.window = (slice(None), *(slice(0, n) for n in self.index.shape))  # src may be larger than the index

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        x, src = x_t[0], x_t[2] if len(x_t) > 2 else None
        some = x if x is not None else src
        assert some is not None
        y_t = self.layout.zeros(some) if x is None else self.layout.empty(some).copy_(x)
        index = _wide(self.index, some)
        if src is not None:
            (y_t.scatter_add_ if self.adds else y_t.scatter_)(self.axis, index, src)
        elif not self.adds:
            y_t.scatter_(self.axis, index, 0.0)
        return [y_t], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        (g,) = y_gt
        if g is None:
            return x_gt
        index = _wide(self.index, g)
        if self.src is not None:
            read = g.gather(self.axis, index)
            if self.src.shape == tuple(self.index.shape):
                x_gt[2] = read
            else:
                whole = self.src.zeros(g)
                whole[self.window] = read
                x_gt[2] = whole
        if self.x:
            x_gt[0] = g if self.adds else self.layout.empty(g).copy_(g).scatter_(self.axis, index, 0.0)
        return x_gt


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def scatter(call: Call) -> Part | None:
    """As with index_put, a place written twice is left to torch."""
    x, dim, index = call.args[:3]
    adds = call.func is aten.scatter_add.default
    if x.dim() == 0 or index.dim() == 0:
        return None
    if call.func is aten.scatter.src:
        count = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
        if bool((count.scatter_add_(dim, index, torch.ones_like(index, dtype=torch.int32)) > 1).any()):
            return None
    return Scatter(call, adds)


@rule(aten.index_add.default)
def index_add(call: Call) -> Part | None:
    x, dim, index = call.args[:3]
    if x.dim() == 0 or call.inputs[2].dim() != x.dim() or call.argument(4, "alpha", 1) != 1:
        return None
    return IndexAdd(call, dim_of(dim, x.dim()), index)


class IndexAdd(Part):
    """y = x with the rows of src added at the index."""

    second_order = False

    def __init__(self, call: Call, dim: int, index: torch.Tensor) -> None:
        self.dim, self.index, self.layout = dim, index, Layout(call.outputs[0])
        self.x, _, self.src = call.active

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        x, _, src = x_t
        some = x if x is not None else src
        assert some is not None
        y_t = self.layout.zeros(some) if x is None else self.layout.empty(some).copy_(x)
        return [y_t if src is None else y_t.index_add_(self.dim, self.index, src)], None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        if g is None:
            return [None] * 3
        return [g if self.x else None, None, g.index_select(self.dim, self.index) if self.src else None]


@rule(aten.masked_select.default)
def masked_select(call: Call) -> Part | None:
    x, mask = call.args
    if mask.shape != x.shape or x.dim() == 0:
        return None
    return Gathered(call, Places([mask]))


@rule(aten.one_hot.default, aten.bincount.default)
def constant(call: Call) -> Part:
    return Constant(call)
