"""Activations: pointwise functions of one input, by their first and second derivative at the point.

    y_t = f' x_t        x_g = f' y_g        x_gt = f' y_gt + (f'' y_g) x_t
f'' y_g is formed once. Where f is piecewise linear f' is a mask or a step and there is no second term. Ties at a kink go the way torch's
own backward takes. Derivatives of half-precision activations are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Pointwise
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule

aten = torch.ops.aten

Slopes = tuple[torch.Tensor, torch.Tensor | None]  # f', f'' (None: zero)


def _step(mask: torch.Tensor, there: torch.Tensor | float, elsewhere: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """`there` where the mask holds, in the dtype of `like`: two numbers alone would be rounded to the default dtype."""
    return torch.where(mask, torch.as_tensor(there, dtype=like.dtype, device=like.device), elsewhere)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _unary(*funcs: Any) -> Callable[[Callable[..., Slopes]], Callable[..., Slopes]]:
    """Enter `derivatives(x, y, *arguments)` as the rule of activations with one tensor argument, the first."""

    def enter(derivatives: Callable[..., Slopes]) -> Callable[..., Slopes]:
        @rule(*funcs)
        def make(call: Call) -> Part:
            slope, bend = derivatives(_wide(call.inputs[0]), _wide(call.outputs[0]), *call.args[1:], **call.kwargs)
            return Pointwise(call, [slope], {} if bend is None else {(0, 0): bend})

        return derivatives

    return enter


@_unary(aten.relu.default)
def _relu(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    return y > 0, None


@_unary(aten.threshold.default)
def _threshold(x: torch.Tensor, y: torch.Tensor, threshold: float, value: float) -> Slopes:
    return x > threshold, None


@_unary(aten.leaky_relu.default)
def _leaky_relu(x: torch.Tensor, y: torch.Tensor, negative_slope: float = 0.01) -> Slopes:
    return _step(x > 0, 1.0, negative_slope, x), None


@_unary(aten.hardshrink.default, aten.softshrink.default)
def _shrink(x: torch.Tensor, y: torch.Tensor, lambd: float = 0.5) -> Slopes:
    return x.abs() > lambd, None


@_unary(aten.hardsigmoid.default)
def _hardsigmoid(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    return _step(x.abs() < 3, 1 / 6, 0.0, x), None


@_unary(aten.hardswish.default)
def _hardswish(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    inside = x.abs() < 3
    return torch.where(inside, (2 * x + 3) / 6, (x >= 3).to(x.dtype)), _step(inside, 1 / 3, 0.0, x)


@_unary(aten.elu.default)
def _elu(x: torch.Tensor, y: torch.Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Slopes:
    falling = input_scale * scale * alpha * torch.exp(input_scale * x.clamp(max=0))
    return torch.where(x > 0, scale, falling), torch.where(x > 0, 0.0, input_scale * falling)


@_unary(aten.celu.default)
def _celu(x: torch.Tensor, y: torch.Tensor, alpha: float = 1.0) -> Slopes:
    return _elu(x, y, alpha, 1, 1 / alpha)


@_unary(aten.gelu.default)
def _gelu(x: torch.Tensor, y: torch.Tensor, *, approximate: str = "none") -> Slopes:
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, density * (2 - x * x)
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (x + c * x**3))
    u, v = k * (1 + 3 * c * x * x), 6 * k * c * x  # first and second derivative of tanh's argument
    sech = 1 - t * t
    return 0.5 * (1 + t + x * sech * u), sech * (u + 0.5 * x * (v - 2 * t * u * u))


@_unary(aten.silu.default)
def _silu(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


@_unary(aten.mish.default)
def _mish(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    s, t = torch.sigmoid(x), torch.tanh(torch.nn.functional.softplus(x))
    slope = (1 - t * t) * s  # of t
    return t + x * slope, 2 * slope + x * slope * (1 - s - 2 * t * s)


@_unary(aten.tanh.default)
def _tanh(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    slope = 1 - y * y
    return slope, -2 * y * slope


@_unary(aten.sigmoid.default)
def _sigmoid(x: torch.Tensor, y: torch.Tensor) -> Slopes:
    slope = y * (1 - y)
    return slope, slope * (1 - 2 * y)


@_unary(aten.softplus.default)
def _softplus(x: torch.Tensor, y: torch.Tensor, beta: float = 1, threshold: float = 20) -> Slopes:
    s = torch.sigmoid(beta * x)
    straight = beta * x > threshold
    return torch.where(straight, 1.0, s), torch.where(straight, 0.0, beta * s * (1 - s))


class LogSigmoid(Pointwise):
    """log sigmoid(x), whose call also returns a workspace: f' = sigmoid(-x), f'' = -sigmoid(x) sigmoid(-x)."""

    def __init__(self, call: Call) -> None:
        s = torch.sigmoid(-_wide(call.inputs[0]))
        super().__init__(call, [s], {(0, 0): s * (s - 1)})

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        y_t, kept = super().tangent(x_t)
        return [*y_t, None], kept

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        return super().adjoint(y_g[:1])

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        return super().backward(y_gt[:1], kept, into)


rule(aten.log_sigmoid_forward.default)(LogSigmoid)


@rule(aten._prelu_kernel.default)
def _prelu(call: Call) -> Part:
    """y = x where x > 0, else w x: the slopes are one or w and zero or x, and both inputs meet in one second derivative."""
    x, weight = call.inputs
    rising = x > 0
    return Pointwise(call, [torch.where(rising, 1.0, weight), torch.where(rising, 0.0, x)], {(0, 1): ~rising})


@rule(aten.rrelu_with_noise.default)
def _rrelu(call: Call) -> Part | None:
    """Leaky with the mean slope in evaluation; slopes drawn in training are not the same in the next pass and have no rule."""
    if call.argument(4, "training", False):
        return None
    slope = (call.argument(2, "lower", 0.125) + call.argument(3, "upper", 1 / 3)) / 2
    return Pointwise(call, [_step(call.inputs[0] > 0, 1.0, slope, call.inputs[0]), None])


@rule(aten.glu.default)
class Gated(Part):
    """y = a s(c) for the halves a, c of x along one dimension, s the sigmoid:

    y_t = s a_t + (a s') c_t
    a_gt = s y_gt + (s' y_g) c_t
    c_gt = a s' y_gt + (s' y_g) a_t + (a s'' y_g) c_t
    """

    def __init__(self, call: Call) -> None:
        (x,) = call.inputs
        dim = call.argument(1, "dim", -1) % x.dim()
        self.dim = dim - x.dim()  # from the end: the same with b in front
        a, c = x.chunk(2, dim)
        self.s = torch.sigmoid(c)
        self.slope = self.s * (1 - self.s)  # s'
        self.cross = a * self.slope
        self.mixed = self.bend = self.cross  # until the adjoint is known

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        a_t, c_t = t.chunk(2, self.dim)
        return [(self.s * a_t).addcmul_(self.cross, c_t)], (a_t, c_t)

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_g
        assert g is not None
        self.mixed = self.slope * g
        self.bend = self.cross * (1 - 2 * self.s) * g
        return [torch.cat([self.s * g, self.cross * g], self.dim)]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        if kept is None and g is None:
            return [None]
        lead = g if g is not None else kept[0]
        shape = list(lead.shape)
        shape[self.dim] *= 2
        out = lead.new_empty(shape) if g is not None else lead.new_zeros(shape)
        a_gt, c_gt = out.chunk(2, self.dim)
        if g is not None:
            torch.mul(self.s, g, out=a_gt)
            torch.mul(self.cross, g, out=c_gt)
        if kept is not None:
            a_t, c_t = kept
            a_gt.addcmul_(self.mixed, c_t)
            c_gt.addcmul_(self.mixed, a_t).addcmul_(self.bend, c_t)
        return [out]
