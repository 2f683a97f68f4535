"""Arithmetic with broadcasting, and elementary functions of one input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Constant, Factor, Pointwise, lift, sum_to
from fastsharp.curvature.rop.rule import Call, Part, rule

aten = torch.ops.aten


def _pointwise(
    call: Call, operands: Sequence[Any], slopes: Sequence[Factor], bends: dict[tuple[int, int], Factor] | None = None
) -> Part | None:
    """A part from derivatives by position of the operands, of which some may be plain numbers."""
    if call.outputs[0].is_complex():
        return None
    place = {k: i for i, k in enumerate(k for k, x in enumerate(operands) if isinstance(x, torch.Tensor))}
    return Pointwise(
        call,
        [slopes[k] for k in place],
        {(place[i], place[j]): f for (i, j), f in (bends or {}).items() if i in place and j in place},
    )


@rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar)
def add(call: Call) -> Part | None:
    """x + alpha z, x - alpha z, z - alpha x."""
    alpha = call.argument(2, "alpha", 1)
    if isinstance(alpha, complex):
        return None
    name = call.func.overloadpacket
    slopes = (1.0, float(alpha)) if name is aten.add else (1.0, -float(alpha)) if name is aten.sub else (-float(alpha), 1.0)
    return _pointwise(call, call.args[:2], slopes)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(call: Call) -> Part | None:
    x, z = call.args
    return _pointwise(call, (x, z), (z, x), {(0, 1): 1.0})


@rule(aten.div.Tensor, aten.div.Scalar)
def div(call: Call) -> Part | None:
    """y = x / z: slopes 1/z and -y/z, bends -1/z^2 and 2 y/z^2."""
    x, z = call.args
    if not isinstance(z, torch.Tensor):
        return _pointwise(call, (x, z), (1 / z, 0.0))
    over = z.reciprocal() if z.is_floating_point() else z.to(call.outputs[0].dtype).reciprocal()
    if not _is_active(call, z):
        return _pointwise(call, (x, z), (over, 0.0))
    slope = -call.outputs[0] * over
    return _pointwise(call, (x, z), (over, slope), {(0, 1): -over * over, (1, 1): -2 * slope * over})


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(call: Call) -> Part | None:
    return div_plain(call) if call.kwargs.get("rounding_mode") is None else Constant(call)


def div_plain(call: Call) -> Part | None:
    """div.Tensor_mode without a rounding mode is div."""
    return div(Call(aten.div.Tensor, call.args[:2], {}, call.outputs, lambda t: _is_active(call, t), call.module))


def _is_active(call: Call, x: torch.Tensor) -> bool:
    return any(a and t is x for t, a in zip(call.inputs, call.active, strict=True))


@rule(aten.pow.Tensor_Scalar)
def power(call: Call) -> Part | None:
    x, p = call.args
    if isinstance(p, complex):
        return None
    if p == 0:
        return Constant(call)
    if p == 1:
        return _pointwise(call, (x,), (1.0,))
    if p == 2:
        return _pointwise(call, (x,), (2 * x,), {(0, 0): 2.0})
    return _pointwise(call, (x,), (p * x.pow(p - 1),), {(0, 0): p * (p - 1) * x.pow(p - 2)})


@rule(aten.pow.Scalar)
def exponential(call: Call) -> Part | None:
    """a^x with a > 0: slope log(a) a^x."""
    a, x = call.args
    if isinstance(a, complex) or a <= 0:
        return None
    y = call.outputs[0]
    return _pointwise(call, (x,), (math.log(a) * y,), {(0, 0): math.log(a) ** 2 * y})


@rule(aten.pow.Tensor_Tensor)
def power_of_tensors(call: Call) -> Part | None:
    """x^p: slopes p x^(p-1) and y log x; both zero where autograd makes them zero: p = 0, and x = 0 with p >= 0."""
    x, p = call.args
    y = call.outputs[0]
    x, p = x.to(y.dtype), p.to(y.dtype)
    still = p == 0
    in_x = torch.where(still, 0.0, p * x.pow(p - 1))
    if not _is_active(call, call.args[1]):
        bend = torch.where(still | (p == 1), 0.0, p * (p - 1) * x.pow(p - 2))
        return _pointwise(call, call.args, (in_x, 0.0), {(0, 0): bend})
    if bool((x <= 0).any()):
        return None  # on the boundary of the domain: torch's own double backward decides
    log = x.log()
    bends = {(0, 0): p * (p - 1) * x.pow(p - 2), (0, 1): x.pow(p - 1) * (1 + p * log), (1, 1): y * log * log}
    return _pointwise(call, call.args, (p * x.pow(p - 1), y * log), bends)


@rule(aten.atan2.default)
def atan2(call: Call) -> Part | None:
    """atan2(x, z): slopes z/r^2 and -x/r^2."""
    x, z = call.args
    over = (x * x + z * z).reciprocal()
    u, v = z * over, -x * over
    return _pointwise(call, call.args, (u, v), {(0, 0): 2 * u * v, (0, 1): v * v - u * u, (1, 1): -2 * u * v})


@rule(aten.maximum.default, aten.minimum.default)
def extremum(call: Call) -> Part | None:
    """The larger (smaller) input has slope 1; where both are equal, each one half."""
    x, z = call.args
    first = (x > z) if call.func is aten.maximum.default else (x < z)
    slope = torch.where(x == z, 0.5, first.to(call.outputs[0].dtype))
    return _pointwise(call, call.args, (slope, 1 - slope))


@rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)
def clamp(call: Call) -> Part | None:
    """Slope 1 inside. Whether the ends count differs between versions of torch, so that torch is asked."""
    with torch.enable_grad():
        x = call.args[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(call.func(x, *call.args[1:], **call.kwargs).sum(), x)
    return _pointwise(call, (x,), (slope,))


@rule(aten.addcmul.default)
def addcmul(call: Call) -> Part | None:
    """x + value u v."""
    value = float(call.kwargs.get("value", 1))
    _, u, v = call.args
    return _pointwise(call, call.args, (1.0, value * v, value * u), {(1, 2): value})


@rule(aten.addcdiv.default)
def addcdiv(call: Call) -> Part | None:
    """x + value u / v."""
    value = float(call.kwargs.get("value", 1))
    _, u, v = call.args
    over = value / v
    slope = -u * over / v
    return _pointwise(call, call.args, (1.0, over, slope), {(1, 2): -over / v, (2, 2): -2 * slope / v})


@rule(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(call: Call) -> Part | None:
    """x + w (z - x)."""
    x, z, w = call.args
    return _pointwise(call, call.args, (1 - w, w, z - x), {(0, 2): -1.0, (1, 2): 1.0})


@rule(aten.where.self)
class Where(Part):
    """x where the condition holds, z elsewhere. Selected and not multiplied: what is not chosen may be infinite."""

    second_order = False

    def __init__(self, call: Call) -> None:
        condition, self.places = call.args[0], []
        i = 0
        for k, operand in enumerate(call.args):
            if isinstance(operand, torch.Tensor):
                if k and call.active[i]:
                    self.places.append((i, k == 1, tuple(operand.shape), operand.dtype))
                i += 1
        self.inputs, self.dims = len(call.inputs), call.outputs[0].dim()
        self.shape, self.dtype = tuple(call.outputs[0].shape), call.outputs[0].dtype
        self.condition = condition

    def tangent(self, x_t: Any) -> tuple[list[torch.Tensor | None], Any]:
        sides: dict[bool, Any] = {True: 0.0, False: 0.0}
        for i, first, _, _ in self.places:
            if x_t[i] is not None:
                sides[first] = lift(x_t[i].to(self.dtype), self.dims)
        y_t = torch.where(self.condition, sides[True], sides[False])
        return [y_t.expand(-1, *self.shape)], None

    def backward(self, y_gt: Any, kept: Any, into: Any) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        (g,) = y_gt
        if g is not None:
            for i, first, shape, dtype in self.places:
                mine = torch.where(self.condition, g, 0.0) if first else torch.where(self.condition, 0.0, g)
                x_gt[i] = sum_to(mine, shape).to(dtype)
        return x_gt


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
class MaskedFill(Part):
    """x where the mask is False, the value elsewhere."""

    second_order = False

    def __init__(self, call: Call) -> None:
        self.mask, self.inputs = call.args[1], len(call.inputs)
        self.x, self.value = call.active[0], len(call.active) > 2 and call.active[2]
        self.shape, self.wants, self.dims = tuple(call.outputs[0].shape), tuple(call.args[0].shape), call.outputs[0].dim()

    def tangent(self, x_t: Any) -> tuple[list[torch.Tensor | None], Any]:
        x = 0.0 if x_t[0] is None else lift(x_t[0], self.dims)
        value = 0.0 if len(x_t) < 3 or x_t[2] is None else lift(x_t[2], self.dims)
        return [torch.where(self.mask, value, x).expand(-1, *self.shape)], None

    def backward(self, y_gt: Any, kept: Any, into: Any) -> list[torch.Tensor | None]:
        x_gt: list[torch.Tensor | None] = [None] * self.inputs
        (g,) = y_gt
        if g is not None and self.x:
            x_gt[0] = sum_to(g.masked_fill(self.mask, 0.0), self.wants)
        if g is not None and self.value:
            x_gt[2] = sum_to(torch.where(self.mask, g, 0.0), ())
        return x_gt


Derivatives = Callable[[torch.Tensor, torch.Tensor], "tuple[Factor, Factor | None]"]

UNARY: dict[Any, Derivatives] = {  # x, y -> first and second derivative
    aten.neg.default: lambda x, y: (-1.0, None),
    aten.abs.default: lambda x, y: (x.sgn(), None),
    aten.sqrt.default: lambda x, y: (0.5 / y, -0.25 / (x * y)),
    aten.rsqrt.default: lambda x, y: (-0.5 * y / x, 0.75 * y / (x * x)),
    aten.reciprocal.default: lambda x, y: (-y * y, 2 * y * y * y),
    aten.exp.default: lambda x, y: (y, y),
    aten.exp2.default: lambda x, y: (math.log(2) * y, math.log(2) ** 2 * y),
    aten.expm1.default: lambda x, y: (y + 1, y + 1),
    aten.log.default: lambda x, y: (1 / x, -1 / (x * x)),
    aten.log2.default: lambda x, y: (1 / (x * math.log(2)), -1 / (x * x * math.log(2))),
    aten.log10.default: lambda x, y: (1 / (x * math.log(10)), -1 / (x * x * math.log(10))),
    aten.log1p.default: lambda x, y: (1 / (1 + x), -1 / (1 + x).square()),
    aten.sin.default: lambda x, y: (x.cos(), -y),
    aten.cos.default: lambda x, y: (-x.sin(), -y),
    aten.tan.default: lambda x, y: (1 + y * y, 2 * y * (1 + y * y)),
    aten.asin.default: lambda x, y: ((1 - x * x).rsqrt(), x * (1 - x * x).pow(-1.5)),
    aten.acos.default: lambda x, y: (-(1 - x * x).rsqrt(), -x * (1 - x * x).pow(-1.5)),
    aten.atan.default: lambda x, y: (1 / (1 + x * x), -2 * x / (1 + x * x).square()),
    aten.sinh.default: lambda x, y: (x.cosh(), y),
    aten.cosh.default: lambda x, y: (x.sinh(), y),
    aten.asinh.default: lambda x, y: ((1 + x * x).rsqrt(), -x * (1 + x * x).pow(-1.5)),
    aten.acosh.default: lambda x, y: ((x * x - 1).rsqrt(), -x * (x * x - 1).pow(-1.5)),
    aten.atanh.default: lambda x, y: (1 / (1 - x * x), 2 * x / (1 - x * x).square()),
    aten.erf.default: lambda x, y: _erf(x, 1),
    aten.erfc.default: lambda x, y: _erf(x, -1),
    aten.frac.default: lambda x, y: (1.0, None),
}


def _erf(x: torch.Tensor, sign: int) -> tuple[Factor, Factor | None]:
    slope = sign * 2 / math.sqrt(math.pi) * (-x * x).exp()
    return slope, -2 * x * slope


@rule(*UNARY)
def unary(call: Call) -> Part | None:
    x, y = call.args[0], call.outputs[0]
    slope, bend = UNARY[call.func](x, y)
    return _pointwise(call, (x,), (slope,), {} if bend is None else {(0, 0): bend})


@rule(aten.nan_to_num.default)
def nan_to_num(call: Call) -> Part | None:
    return _pointwise(call, call.args[:1], (call.args[0].isfinite(),))


@rule(aten.remainder.Scalar, aten.fmod.Scalar)
def remainder(call: Call) -> Part | None:
    return _pointwise(call, call.args[:1], (1.0,))


@rule(
    aten.sign.default,
    aten.sgn.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.trunc.default,
    aten.detach.default,
    aten.floor_divide.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.fill.Scalar,
    aten.zero.default,
)
def constant(call: Call) -> Part:
    return Constant(call)
