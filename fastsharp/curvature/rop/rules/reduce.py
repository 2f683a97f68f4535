"""Sums, means, variances, norms and extrema over dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Chain, Constant, Linear, Pointwise
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.curvature.rop.rules.views import dim_of

aten = torch.ops.aten


class Over:
    """The dimensions of a reduction, as they stand in a tangent, and whether they stay as ones."""

    def __init__(self, x: torch.Tensor, dims: int | Sequence[int] | None, keepdim: bool = False) -> None:
        n = x.dim()
        given = [dims] if isinstance(dims, int) else list(dims or range(n))
        self.dims = sorted(dim_of(d, n) for d in given) if n else []
        self.keepdim = keepdim
        self.shape = tuple(x.shape)
        self.ones = tuple(1 if i + 1 in self.dims else s for i, s in enumerate(self.shape))
        self.size = math.prod(self.shape[d - 1] for d in self.dims)

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        return t.sum(self.dims, keepdim=self.keepdim) if self.dims else t

    def spread(self, g: torch.Tensor) -> torch.Tensor:
        """The adjoint of `sum`, as a view of g."""
        return g.reshape(g.shape[0], *self.ones).expand(-1, *self.shape)

    def back(self, y: torch.Tensor) -> torch.Tensor:
        """A primal result with its reduced dimensions as ones."""
        return y.reshape(self.ones)


def _over(call: Call, position: int = 1) -> Over:
    return Over(call.args[0], call.argument(position, "dim"), bool(call.argument(position + 1, "keepdim", False)))


@rule(aten.sum.default, aten.sum.dim_IntList)
def sum_(call: Call) -> Part | None:
    over = Over(call.args[0], None) if call.func is aten.sum.default else _over(call)
    return _linear(call, over, 1.0)


@rule(aten.mean.default, aten.mean.dim)
def mean(call: Call) -> Part | None:
    over = Over(call.args[0], None) if call.func is aten.mean.default else _over(call)
    return _linear(call, over, 1 / max(over.size, 1))


def _linear(call: Call, over: Over, scale: float) -> Part | None:
    x, y = call.inputs[0].dtype, call.outputs[0].dtype
    if not call.inputs[0].is_floating_point():
        return None
    if scale == 1.0:
        return Linear(call, lambda t: over.sum(t.to(y)), lambda g: over.spread(g).to(x))
    return Linear(call, lambda t: over.sum(t.to(y)).mul(scale), lambda g: over.spread(g * scale).to(x))


class Variance(Part):
    """v = sum (x - m)^2 / (n - c), and m where the call returns it too; u = 2 (x - m) / (n - c):

    v_t = sum u x_t;  x_gt = u v_gt + 2/(n - c) v_g (x_t - mean x_t) + m_gt / n
    """

    def __init__(self, call: Call, over: Over, correction: float) -> None:
        x = call.args[0]
        self.over, self.scale = over, 2 / max(over.size - correction, 0.0) if over.size > correction else math.inf
        self.u = (x - x.mean([d - 1 for d in over.dims], keepdim=True) if over.dims else x - x).mul_(self.scale)
        self.with_mean = len(call.outputs) == 2
        self.weight: torch.Tensor | None = None

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        y_t: list[torch.Tensor | None] = [self.over.sum(t * self.u)]
        if self.with_mean:
            y_t.append(self.over.sum(t) / self.over.size)
        return y_t, t

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        self.weight = None if y_g[0] is None else self.over.back(y_g[0]) * self.scale
        return [None if g is None else g.squeeze(0) for g in self.backward([None if g is None else g.unsqueeze(0) for g in y_g], None, ())]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        total = None if y_gt[0] is None else self.over.spread(y_gt[0]) * self.u
        if self.with_mean and y_gt[1] is not None:
            of_mean = self.over.spread(y_gt[1] / self.over.size)
            total = of_mean if total is None else total.add_(of_mean)
        if kept is not None and self.weight is not None:
            centred = kept - kept.mean(self.over.dims, keepdim=True) if self.over.dims else kept - kept
            total = centred.mul_(self.weight) if total is None else total.addcmul_(centred, self.weight)
        return [total]


@rule(aten.var.correction, aten.var_mean.correction, aten.std.correction)
def variance(call: Call) -> Part | None:
    over = Over(call.args[0], call.argument(1, "dim"), bool(call.kwargs.get("keepdim", False)))
    given = call.kwargs.get("correction")
    correction = 1.0 if given is None else float(given)
    if over.size <= correction or call.outputs[0].is_complex():
        return None
    part = Variance(call, over, correction)
    if call.func is not aten.std.correction:
        return part
    return Chain(part, _root(call))


def _root(call: Call) -> Pointwise:
    """sqrt of the variance by its value y: slope 1/(2 y), bend -1/(4 y^3); 0 where y is, as autograd masks it."""
    (y,) = call.outputs
    over = torch.where(y == 0, 0.0, 1 / y)
    root = Call(aten.sqrt.default, (y * y,), {}, y, lambda t: True)
    return Pointwise(root, [0.5 * over], {(0, 0): -0.25 * over**3})


class LogSumExp(Part):
    """y = log sum exp x with p = exp(x - y): y_t = sum p x_t;  x_gt = p (y_gt + y_g (x_t - y_t))."""

    def __init__(self, call: Call) -> None:
        self.over = _over(call)
        y = self.over.back(call.outputs[0])
        self.p = torch.where(y.isinf(), 0.0, (call.args[0] - y).exp())

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        y_t = self.over.sum(t * self.p)
        return [y_t], (t, y_t)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        total = None if y_gt[0] is None else self.over.spread(y_gt[0])
        if kept is not None and self.y_g and self.y_g[0] is not None:
            second = (kept[0] - self.over.spread(kept[1])).mul_(self.over.back(self.y_g[0]))
            total = second if total is None else second.add_(total)
        return [None if total is None else total * self.p]


@rule(aten.logsumexp.default)
def logsumexp(call: Call) -> Part | None:
    return LogSumExp(call)


class Norm(Part):
    """y = |x|_2 with u = x / y, zero where y is: y_t = u x_t;  x_gt = u y_gt + (y_g / y) (x_t - u y_t)."""

    def __init__(self, call: Call, over: Over) -> None:
        y = over.back(call.outputs[0])
        self.over, self.inverse = over, torch.where(y == 0, 0.0, 1 / y)
        self.u = call.args[0] * self.inverse

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        y_t = self.over.sum(t * self.u)
        return [y_t], (t, y_t)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        total = None if y_gt[0] is None else self.over.spread(y_gt[0]) * self.u
        if kept is not None and self.y_g and self.y_g[0] is not None:
            weight = self.over.back(self.y_g[0]) * self.inverse
            second = torch.addcmul(kept[0], self.over.spread(kept[1]), self.u, value=-1).mul_(weight)
            total = second if total is None else total.add_(second)
        return [total]


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar)
def norm(call: Call) -> Part | None:
    order = call.argument(1, "p" if call.func is not aten.linalg_vector_norm.default else "ord", 2)
    x = call.args[0]
    if call.kwargs.get("dtype") is not None or x.is_complex():
        return None
    over = Over(x, None) if call.func is aten.norm.Scalar else _over(call, 2)
    if order is None or order == 2:
        return Norm(call, over)
    if order == 1:
        return _weighted(call, over, x.sgn())
    return None


def _weighted(call: Call, over: Over, weight: torch.Tensor) -> Part:
    """y = sum w x at fixed w."""
    return Linear(call, lambda t, w: over.sum(t * w), lambda g, w: over.spread(g) * w, weight)


@rule(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def extremum(call: Call) -> Part | None:
    """Elements that tie share the slope evenly."""
    over = Over(call.args[0], None) if call.func in (aten.max.default, aten.min.default) else _over(call)
    mask = (call.args[0] == over.back(call.outputs[0])).to(call.outputs[0].dtype)
    count = mask.sum([d - 1 for d in over.dims], keepdim=True) if over.dims else mask
    return _weighted(call, over, mask / count)


@rule(
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.kthvalue.default,
    aten.mode.default,
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.cummax.default,
    aten.cummin.default,
)
def chosen(call: Call) -> Part | None:
    """Values picked along one dimension: the choice is fixed, so that the map is a gather by the indices returned."""
    x, indices = call.args[0], call.outputs[1]
    if x.dim() == 0:
        return Linear(call, lambda t: t, lambda g: g)
    names = call.func._schema.arguments
    where = next(i for i, a in enumerate(names) if a.name == "dim")
    kwargs_only = names[where].kwarg_only
    dim = call.kwargs.get("dim", -1) if kwargs_only else call.argument(where, "dim", -1)
    axis = dim_of(dim, x.dim())
    dropped = indices.dim() < x.dim()
    index = (indices.unsqueeze(axis - 1) if dropped else indices).unsqueeze(0)
    shape = tuple(x.shape)

    def apply(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = t.gather(axis, index.expand(t.shape[0], *index.shape[1:]))
        return y.squeeze(axis) if dropped else y

    def back(g: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        g = g.unsqueeze(axis) if dropped else g
        return g.new_zeros(g.shape[0], *shape).scatter_add_(axis, index.expand(g.shape), g)

    return Linear(call, apply, back, index)


class Product(Part):
    """y = prod x without zeros, r = 1/x, s = sum r x_t: y_t = y s;  x_gt = y r (y_gt + y_g (s - r x_t))."""

    def __init__(self, call: Call, over: Over) -> None:
        self.over, self.y, self.r = over, over.back(call.outputs[0]), call.args[0].reciprocal()

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        relative = t * self.r
        s = relative.sum(self.over.dims, keepdim=True) if self.over.dims else relative
        y_t = s * self.y
        keep = y_t.shape if self.over.keepdim else [n for d, n in enumerate(y_t.shape) if d not in self.over.dims]
        return [y_t.reshape(keep)], (relative, s)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        total = None if y_gt[0] is None else self.over.spread(y_gt[0])
        if kept is not None and self.y_g and self.y_g[0] is not None:
            relative, s = kept
            second = (s - relative).mul_(self.over.back(self.y_g[0]))
            total = second if total is None else second.add_(total)
        return [None if total is None else total * self.y * self.r]


@rule(aten.prod.default, aten.prod.dim_int)
def product(call: Call) -> Part | None:
    x = call.args[0]
    if call.kwargs.get("dtype") is not None or bool((x == 0).any()):
        return None
    return Product(call, Over(x, None) if call.func is aten.prod.default else _over(call))


@rule(aten.argmax.default, aten.argmin.default, aten.all.default, aten.any.default)
def constant(call: Call) -> Part:
    return Constant(call)
