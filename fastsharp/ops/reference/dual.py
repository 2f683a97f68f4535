"""The truth of every dual op, in float64 throughout, whatever the dtype of the tensors.

Shapes are those of `fastsharp.ops.dual`: primal matrices (rows, columns), tangents (b, rows, columns). None is a tangent of zero, or
a result that nobody wants.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Parameters = tuple[float, float, float]


class Norm(NamedTuple):
    """What does not depend on the vectors: x, the weight, (mean, reciprocal deviation) of each row, layer norm or RMS norm."""

    x: Tensor  # (rows, columns)
    w: Tensor | None  # (columns,)
    stats: Tensor  # (rows, 2) float64
    center: bool


class Second(NamedTuple):
    """What the second term of a tangent of the adjoint needs beside the norm itself."""

    y_g: Tensor  # (rows, columns)
    g_sums: Tensor  # (1, rows, 2) float64
    x_t: Tensor | None  # (b, rows, columns)
    x_sums: Tensor  # (b, rows, 2) float64
    w_t: Tensor | None  # (b, columns)


def activation_prepare(kind: str, parameters: Parameters, x: Tensor, bias: Tensor | None, d1: Tensor, d2: Tensor | None) -> None:
    """d1 = f'(x + bias), d2 = f''(x + bias)."""
    a = x.double() if bias is None else x.double() + bias.double()
    first, second = _derivatives(kind, parameters, a)
    d1.copy_(first)
    if d2 is not None:
        d2.copy_(second)


def activation_tangent(d1: Tensor, x_t: Tensor, bias_t: Tensor | None, out: Tensor) -> None:
    """out = d1 (x_t + bias_t)."""
    a_t = x_t.double() if bias_t is None else x_t.double() + bias_t.double()[:, None]
    out.copy_(d1.double() * a_t)


def activation_adjoint(d1: Tensor, y_gt: Tensor, q: Tensor | None, a_t: Tensor | None, out: Tensor, bias_gt: Tensor | None) -> None:
    """out = d1 y_gt + q a_t; bias_gt += the sum of out over rows."""
    g = d1.double() * y_gt.double()
    if q is not None and a_t is not None:
        g += q.double() * a_t.double()
    out.copy_(g)
    if bias_gt is not None:
        bias_gt.copy_(bias_gt.double() + out.double().sum(1))


def norm_prepare(x: Tensor, eps: float, center: bool, stats: Tensor) -> None:
    """stats = (mean, 1 / sqrt(var + eps)) of each row; without center the mean is zero."""
    x = x.double()
    mean = x.mean(1, keepdim=True) if center else torch.zeros_like(x[:, :1])
    stats.copy_(torch.cat([mean, ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()], 1))


def norm_tangent(f: Norm, x_t: Tensor | None, w_t: Tensor | None, bias_t: Tensor | None, out: Tensor | None, sums: Tensor) -> None:
    """out = w h_t + w_t h + bias_t; sums = (mean(x_t), mean(h x_t))."""
    h = _normalised(f)
    t = torch.zeros(sums.shape[0], *h.shape, dtype=torch.float64, device=h.device) if x_t is None else x_t.double()
    sums.copy_(_means(f, h, t))
    y = _tangent(f, h, t, sums) * (1 if f.w is None else f.w.double())
    if w_t is not None:
        y = y + w_t.double()[:, None] * h
    if bias_t is not None:
        y = y + bias_t.double()[:, None]
    if out is not None:
        out.copy_(y)


def norm_adjoint(
    f: Norm,
    y_gt: Tensor | None,
    second: Second | None,
    out: Tensor | None,
    sums: Tensor | None,
    w_gt: Tensor | None,
    bias_gt: Tensor | None,
) -> None:
    """out = r P g_t - r^2 s_1 P g - r (h_t mean(h g) + h mean(h_t g)); sums = (mean(g_t), mean(h g_t)); gradients are added to."""
    h, r = _normalised(f), f.stats[:, 1:]
    w = 1 if f.w is None else f.w.double()
    b = y_gt.shape[0] if y_gt is not None else second.x_sums.shape[0]  # type: ignore[union-attr]
    y_t = torch.zeros(b, *h.shape, dtype=torch.float64, device=h.device) if y_gt is None else y_gt.double()
    g_t, w_sum = w * y_t, y_t * h
    if second is not None and second.w_t is not None:
        g_t = g_t + second.w_t.double()[:, None] * second.y_g.double()
    pair = _means(f, h, g_t)
    x_gt = r * (g_t - pair[..., :1] - h * pair[..., 1:])
    if second is not None:
        y_g = second.y_g.double()
        t = torch.zeros_like(y_t) if second.x_t is None else second.x_t.double()
        h_t = _tangent(f, h, t, second.x_sums)
        g, g_sums = w * y_g, second.g_sums[0]
        cross = (h_t * g).mean(-1, keepdim=True)
        x_gt = x_gt - r * (r * second.x_sums[..., 1:] * (g - g_sums[:, :1] - h * g_sums[:, 1:]) + h_t * g_sums[:, 1:] + h * cross)
        w_sum = w_sum + y_g * h_t
    if sums is not None:
        sums.copy_(pair)
    for target, columns in ((w_gt, w_sum), (bias_gt, y_t)):
        if target is not None:
            target.copy_(target.double() + columns.sum(1))
    if out is not None:
        out.copy_(x_gt)


def softmax_gradient(z: Tensor, target: Tensor | None, weight: Tensor | None, smoothing: float, p: Tensor | None, g: Tensor | None) -> None:
    """p = softmax(z); g = weight (p - (1 - smoothing) e_target - smoothing / columns); rows of weight zero are zero."""
    dead = None if weight is None else (weight == 0)[:, None]
    x = torch.softmax(z.double(), 1)
    if dead is not None:
        x = x.masked_fill(dead, 0)
    if p is not None:
        p.copy_(x)
    if g is not None and target is not None:
        d = x - smoothing / z.shape[1]
        if dead is not None:
            target = target.masked_fill(dead[:, 0], 0)
        d.scatter_add_(1, target[:, None], torch.full_like(d[:, :1], smoothing - 1))
        g.copy_(d if weight is None else (d * weight.double()[:, None]).masked_fill(dead, 0))  # type: ignore[arg-type]


def softmax_product(p: Tensor, weight: Tensor | None, u: Tensor, out: Tensor) -> None:
    """out = weight (p u - p (p'u)); rows of weight zero are zero."""
    x = p.double()
    y = x * (u.double() - (x * u.double()).sum(-1, keepdim=True))
    if weight is not None:
        y = (weight.double()[:, None] * y).masked_fill((weight == 0)[:, None], 0)
    out.copy_(y)


def _normalised(f: Norm) -> Tensor:
    return (f.x.double() - f.stats[:, :1]) * f.stats[:, 1:]


def _means(f: Norm, h: Tensor, v: Tensor) -> Tensor:
    """(mean(v), mean(h v)) over the columns; the first is zero for RMS norm."""
    first = v.mean(-1) if f.center else torch.zeros_like(v[..., 0])
    return torch.stack([first, (h * v).mean(-1)], -1)


def _tangent(f: Norm, h: Tensor, x_t: Tensor, sums: Tensor) -> Tensor:
    return f.stats[:, 1:] * (x_t - sums[..., :1] - h * sums[..., 1:])


def _derivatives(kind: str, parameters: Parameters, a: Tensor) -> tuple[Tensor, Tensor]:
    p0, p1, p2 = parameters
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    if kind == "relu":
        return torch.where(a > 0, one, p0 * one) + (a - a), zero
    if kind == "gelu":
        density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(a) + a * density, density * (2 - a * a)
    if kind == "gelu_tanh":
        c, k = math.sqrt(2 / math.pi), 0.044715
        v, u1 = 2 * c * (a + k * a**3), c * (1 + 3 * k * a * a)
        t, steep = torch.tanh(v / 2), 4 * torch.sigmoid(v) * torch.sigmoid(-v)
        t1, t2 = steep * u1, steep * (6 * c * k * a - 2 * t * u1 * u1)
        return (1 + t + a * t1) / 2, t1 + a * t2 / 2
    if kind == "tanh":
        steep = 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)
        return steep, -2 * torch.tanh(a) * steep
    if kind == "elu":
        e = p0 * p1 * p2 * torch.exp(p2 * a.clamp(max=0))
        return torch.where(a > 0, p1 * one, e), torch.where(a > 0, zero, p2 * e)
    v = p0 * a if kind == "softplus" else a
    s, s1 = torch.sigmoid(v), torch.sigmoid(v) * torch.sigmoid(-v)
    if kind == "silu":
        return s + a * s1, s1 * (2 + a * (1 - 2 * s))
    if kind == "sigmoid":
        return s1, s1 * (1 - 2 * s)
    linear = p0 * a > p1
    return torch.where(linear, one, s), torch.where(linear, zero, p0 * s1)
