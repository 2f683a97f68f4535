"""Losses that torch evaluates in one call.

A loss y = reduce f(x, z, ..) has slopes f_i and bends f_ij by elements; with `mean` both carry 1/n:
    y_t = sum f_i x_t_i        x_g_i = f_i y_g        x_gt_i = f_i y_gt + sum_j (f_ij y_g) x_t_j
The negative log-likelihood is linear, -c_i x[target_i], with c_i = 0 at ignored targets. Cross-entropy with rows p of probabilities and
r = dy_i/dz_i = c_i (p_i - e_target):
    y_t = <r, z_t>             z_g = y_g r            z_gt = y_gt r + y_g c_i p (z_t - <p, z_t>)
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.curvature.rop.parts import Factor, Linear, Pointwise
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.ops import dual

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2

Bends = dict[tuple[int, int], Factor]

FUSED_CLASSES = 1000  # from here on the kernel of one pass is faster on a CPU than three passes of torch


class Reduced(Pointwise):
    """An elementwise loss summed with a weight: the reduction is an inner product, its adjoint is a number."""

    def __init__(self, call: Call, slopes: list[torch.Tensor | None], bends: Bends, scale: float) -> None:
        shape = call.inputs[0].shape
        unreduced = Call(call.func, call.args, call.kwargs, call.outputs[0].expand(shape), lambda t: False)
        unreduced.active = call.active
        scaled = [None if f is None else (f * scale).contiguous() for f in slopes]
        super().__init__(unreduced, scaled, {pair: f * scale for pair, f in bends.items()})

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        y_t: torch.Tensor | None = None
        given = [None if t is None else t.to(self.dtype) for t in x_t]
        for slope, t in zip(self.slopes, given, strict=True):
            if t is not None and slope is not None:
                part = t.reshape(len(t), -1) @ slope.reshape(-1)
                y_t = part if y_t is None else y_t.add_(part)
        return [y_t], given if self.second_order else None

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_gt
        return super().backward([None if g is None else g.reshape(-1, *(1,) * self.dims)], kept, into)


def _loss(call: Call, slopes: list[torch.Tensor | None], bends: Bends, reduction: int) -> Part | None:
    """torch.nn.functional makes the shapes equal; where they are not, so that torch itself has no derivative, there is no rule."""
    x, z = call.args[:2]
    if x.shape != z.shape:
        return None
    if reduction == NONE:
        return Pointwise(call, slopes, bends)
    return Reduced(call, slopes, bends, 1 / x.numel() if reduction == MEAN and x.numel() else 1.0)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _difference(call: Call) -> torch.Tensor:
    return _wide(call.args[0]) - _wide(call.args[1])


def _of_difference(call: Call, slope: torch.Tensor, bend: Factor, reduction: int) -> Part | None:
    """f(x - z): the same derivatives by z, with the sign of each order."""
    return _loss(call, [slope, -slope], {(0, 0): bend, (0, 1): -bend, (1, 1): bend}, reduction)


@rule(aten.mse_loss.default)
def mse(call: Call) -> Part | None:
    return _of_difference(call, 2 * _difference(call), 2.0, call.argument(2, "reduction", MEAN))


@rule(aten.smooth_l1_loss.default)
def smooth_l1(call: Call) -> Part | None:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2."""
    d, beta = _difference(call), call.argument(3, "beta", 1.0)
    inside = d.abs() < beta
    bend = inside.to(d.dtype) / beta if beta else torch.zeros_like(d)
    return _of_difference(call, torch.where(inside, d / beta if beta else d, d.sign()), bend, call.argument(2, "reduction", MEAN))


@rule(aten.huber_loss.default)
def huber(call: Call) -> Part | None:
    """d^2 / 2 where |d| < delta, else delta (|d| - delta / 2)."""
    d, delta = _difference(call), call.argument(3, "delta", 1.0)
    return _of_difference(call, d.clamp(-delta, delta), (d.abs() < delta).to(d.dtype), call.argument(2, "reduction", MEAN))


@rule(aten.soft_margin_loss.default)
def soft_margin(call: Call) -> Part | None:
    """log(1 + exp(-z x)), for which torch has no derivative by z."""
    if call.active[1]:
        return None
    x, z = _wide(call.args[0]), _wide(call.args[1])
    s = torch.sigmoid(-z * x)
    return _loss(call, [-z * s, None], {(0, 0): z * z * s * (1 - s)}, call.argument(2, "reduction", MEAN))


@rule(aten.binary_cross_entropy.default)
def bce(call: Call) -> Part | None:
    """-w (z log x + (1 - z) log(1 - x)); near the ends of the interval, where torch bends the derivatives to keep them finite, an island."""
    x, z, w = _wide(call.args[0]), _wide(call.args[1]), call.argument(2, "weight")
    variance = x * (1 - x)
    if any(call.active[2:]) or bool((variance < 1e-12).any()):
        return None
    w = torch.ones_like(x) if w is None else _wide(w)
    bends: Bends = {(0, 0): w * (x * x - 2 * x * z + z) / (variance * variance), (0, 1): -w / variance}
    slopes: list[torch.Tensor | None] = [w * (x - z) / variance, w * (torch.log1p(-x) - x.log())]
    return _loss(call, _fill(call, slopes), bends, call.argument(3, "reduction", MEAN))


@rule(aten.binary_cross_entropy_with_logits.default)
def bce_with_logits(call: Call) -> Part | None:
    """w ((1 - z) x + (1 + (v - 1) z) log(1 + exp(-x))) with the weight v of the positive class."""
    x, z = _wide(call.args[0]), _wide(call.args[1])
    w, v = call.argument(2, "weight"), call.argument(3, "pos_weight")
    if any(call.active[2:]):
        return None
    w = torch.ones_like(x) if w is None else _wide(w)
    extra = torch.zeros_like(x) if v is None else _wide(v) - 1
    s, other = torch.sigmoid(x), torch.sigmoid(-x)
    steep = 1 + extra * z
    bends: Bends = {(0, 0): w * steep * s * other, (0, 1): -w * (1 + extra * other)}
    slopes: list[torch.Tensor | None] = [w * (1 - z - steep * other), w * (extra * torch.nn.functional.softplus(-x) - x)]
    return _loss(call, _fill(call, slopes), bends, call.argument(4, "reduction", MEAN))


def _fill(call: Call, slopes: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """None for the weights, which are not active."""
    return slopes + [None] * (len(call.inputs) - len(slopes))


def _coefficients(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(index, c): targets, 0 where they are ignored, and c_i, 0 there; both in the shape of the targets."""
    x, target, weight = call.args[0], call.args[1].long(), call.argument(2, "weight")  # labels may be uint8, indices may not
    ignored = target == call.argument(4, "ignore_index", -100)
    index = target.masked_fill(ignored, 0)
    c = torch.ones(target.shape, dtype=x.dtype, device=x.device) if weight is None else weight[index].to(x.dtype)
    if call.argument(3, "reduction", MEAN) == MEAN:
        c = c / call.outputs[1]  # the total weight
    return index, c.masked_fill(ignored, 0.0)


@rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll(call: Call) -> Part | None:
    if any(call.active[1:]):
        return None
    x, dim = call.args[0], 2 if call.args[0].dim() > 1 else 1
    index, c = _coefficients(call)
    index, c = index.unsqueeze(dim - 1).unsqueeze(0), c.neg().unsqueeze(0)
    each, shape, dims = call.argument(3, "reduction", MEAN) == NONE, tuple(x.shape), list(range(1, c.dim()))

    def apply(t: torch.Tensor, index: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y = t.gather(dim, index.expand(len(t), *index.shape[1:])).squeeze(dim).mul_(c)
        return y if each or not dims else y.sum(dims)

    def back(g: torch.Tensor, index: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        g = (g if each else g.reshape(-1, *(1,) * len(dims))) * c
        return g.new_zeros(len(g), *shape).scatter_(dim, index.expand(len(g), *index.shape[1:]), g.unsqueeze(dim))

    return Linear(call, apply, back, index, c)


def softmax_ce(
    logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of rows of logits, and the total weight: what `fold_softmax_ce` makes of log-softmax and negative log-likelihood."""
    loss, total = aten.nll_loss_forward.default(aten._log_softmax.default(logits, 1, False), target, weight, reduction, ignore_index)
    return loss, total


@rule(softmax_ce)
class CrossEntropy(Part):
    def __init__(self, call: Call) -> None:
        z = call.inputs[0]
        index, c = _coefficients(call)
        self.each = call.argument(3, "reduction", MEAN) == NONE
        self.inputs = len(call.inputs)
        self.c = c.unsqueeze(1)
        self.p = z.softmax(1)
        target = index.unsqueeze(1)
        missing = self.p.scatter(1, target, 0.0).sum(1, keepdim=True)  # 1 - p_target, without cancellation where the net is sure
        self.r = (self.p * self.c).scatter_(1, target, -self.c * missing)
        self.top = self.p.argmax(1, keepdim=True)
        self.weight: torch.Tensor | None = None  # y_g c, (rows, 1)
        self.curved: torch.Tensor | None = None  # y_g c p, where torch's own passes take the product
        self.fused = dual.fused(z) and (not z.is_cpu or z.shape[1] >= FUSED_CLASSES)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        t = x_t[0]
        assert t is not None
        y_t = (t * self.r).sum(2) if self.each else t.reshape(len(t), -1) @ self.r.reshape(-1)
        return [y_t, None], t

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        g = y_g[0]
        assert g is not None
        factor = g.unsqueeze(1) if self.each else g
        self.weight = factor * self.c
        self.curved = None if self.fused else self.weight * self.p
        return [self.r * factor, *[None] * (self.inputs - 1)]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        total: torch.Tensor | None = None
        if kept is not None and self.weight is not None:
            total = self._curvature(kept)
        if y_gt[0] is not None:
            g = y_gt[0].unsqueeze(2) if self.each else y_gt[0].reshape(-1, 1, 1)
            total = g * self.r if total is None else total.addcmul_(g, self.r)
        return [total, *[None] * (self.inputs - 1)]

    def _curvature(self, t: torch.Tensor) -> torch.Tensor:
        """y_g c p (t - <p, t>). A constant added to a row of t changes nothing; with t zero at the largest p, nothing cancels where p is near 1."""
        assert self.weight is not None
        t = (t - t.gather(2, self.top.expand(len(t), -1, -1))).contiguous()
        if self.curved is None:
            return dual.softmax_product(self.p, t, out=torch.empty_like(t), weight=self.weight.squeeze(1))
        out = t * self.curved
        return out.addcmul_(self.p, out.sum(2, keepdim=True), value=-1)
