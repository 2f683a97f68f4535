"""Normalisation of channels: the part of group and batch norm, and the places of x, weight and bias that all norms share."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastsharp.curvature.rop.memory import Unrecorded
from fastsharp.curvature.rop.parts import width
from fastsharp.curvature.rop.rule import Call, Part, Tangents

Tensor = torch.Tensor


class Places:
    """Where x, w and c stand among the inputs of a call, and which of them are active."""

    def __init__(self, call: Call, *positions: int) -> None:
        self.inputs, self.outputs = len(call.inputs), len(call.outputs)
        self.at: list[int] = []
        for position in positions:
            given = isinstance(call.argument(position, ""), Tensor)
            self.at.append(sum(isinstance(t, Tensor) for t in call.args[:position]) if given else -1)
        self.on = [i >= 0 and call.active[i] for i in self.at]
        self.others = any(active for i, active in enumerate(call.active) if i not in self.at)

    def take(self, tangents: Tangents) -> list[Tensor | None]:
        return [tangents[i] if on and tangents else None for i, on in zip(self.at, self.on, strict=True)]

    def put(self, *values: Tensor | None) -> list[Tensor | None]:
        placed: list[Tensor | None] = [None] * self.inputs
        for i, on, value in zip(self.at, self.on, values, strict=True):
            if on:
                placed[i] = value
        return placed


def alone(y_g: Tangents) -> None:
    """The statistics that a call also returns have no tangents: a function that goes on with them is left to autograd."""
    if any(g is not None for g in y_g[1:]):
        raise Unrecorded("a norm whose statistics are used as values")


class ChannelNorm(Part):
    """Normalisation whose coefficients belong to (sample, channel): with <v> the mean over places (and over samples where those are
    normalised together), E the mean of <v> over the channels of a group,

        y_t  = (w r) x_t + (w_t - w r a) h + (c_t - w r E x_t)
        x_gt = (w r) y_gt + r (w_t - w r a) y_g - r^2 q x_t + r [2 r a q - E(h g_t) - E(h_t w y_g)] h + r [r a E(w y_g) + r q E x_t - E g_t]

    so that beside the means each is one pass a term, and <y_g h_t> = r (<y_g x_t> - E(x_t) <y_g> - a <y_g h>) needs no h_t.

    groups     of channels that are normalised together; 0: the statistics are constants
    samples    whether all samples are normalised together
    """

    def __init__(
        self,
        call: Call,
        places: Places,
        view: tuple[int, int, int],
        *,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        groups: int,
        samples: bool,
        center: bool = True,
    ) -> None:
        x = call.inputs[0]
        self.places, self.shape, self.view = places, tuple(x.shape), view
        self.groups, self.samples, self.center = groups, samples, center
        w = call.inputs[places.at[1]] if places.at[1] >= 0 else None
        self.weights_shape = [tuple(call.inputs[i].shape) if i >= 0 else () for i in places.at[1:]]
        x = self._split(x.unsqueeze(0))
        if mean is not None and var is not None:
            mean, var = (t.to(x.dtype).view(1, 1, -1, 1) for t in (mean, var))
            x = x - mean
        else:
            x = x - self._spread(self._mean(x)) if center else x
            var = self._spread(self._mean(x * x))
        self.r = (var + eps).rsqrt()
        self.h = x * self.r
        self.w = torch.ones((), dtype=x.dtype, device=x.device) if w is None else w.reshape(1, 1, -1, 1)
        self.slope = self.w * self.r
        self.g: tuple[Tensor, ...] | None = None  # y_g, <y_g>, <y_g h>, E(w y_g), q

    def _split(self, t: Tensor) -> Tensor:
        """(b, *shape) as (b, samples, channels, places); a view of a tensor in channels-last order as well."""
        return t.reshape(len(t), *self.view)

    def _mean(self, t: Tensor) -> Tensor:
        over = [1, 3] if self.samples else [3]
        return t if all(t.shape[i] == 1 for i in over) else t.mean(over, keepdim=True)

    def _spread(self, t: Tensor) -> Tensor:
        """E of what <v> is."""
        if self.groups == t.shape[2]:
            return t
        grouped = t.reshape(*t.shape[:2], self.groups, -1, t.shape[3])
        return grouped.mean(3, keepdim=True).expand_as(grouped).reshape(t.shape)

    def _lift(self, t: Tensor) -> Tensor:
        return t.reshape(len(t), 1, -1, 1)

    def tangent(self, x_t: Tangents) -> tuple[list[Tensor | None], Any]:
        b = width(x_t)
        t, w_t, c_t = self.places.take(x_t)
        on_h = None if w_t is None else self._lift(w_t)
        on_one = None if c_t is None else self._lift(c_t)
        w_t, m, a = on_h, None, None
        if t is not None:
            t = self._split(t)
            if self.groups:
                a = self._spread(self._mean(t * self.h))
                on_h = _less(on_h, self.slope * a)
                if self.center:
                    m = self._spread(self._mean(t))
                    on_one = _less(on_one, self.slope * m)
        y = _sum(on_one, (self.slope, t), (on_h, self.h))
        assert y is not None
        y_t: list[Tensor | None] = [None] * self.places.outputs
        y_t[0] = y.expand(b, *self.view).reshape(b, *self.shape)
        return y_t, None if t is None and w_t is None else (t, w_t, m, a)

    def adjoint(self, y_g: Tangents) -> list[Tensor | None]:
        alone(y_g)
        if y_g[0] is None:
            return [None] * self.places.inputs
        x_g = self.backward([y_g[0].unsqueeze(0), *[None] * (self.places.outputs - 1)], None, ())
        g = self._split(y_g[0].unsqueeze(0))
        ones, hs = self._mean(g), self._mean(g * self.h)
        self.g = (g, ones, hs, self._spread(self.w * ones), self._spread(self.w * hs)) if self.groups else (g, ones, hs)
        return [None if t is None else t.squeeze(0) for t in x_g]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[Tensor | None]:
        x_on, w_on, c_on = self.places.on
        g_t = None if y_gt[0] is None else self._split(y_gt[0])
        t, w_t, m, a = (None,) * 4 if kept is None or self.g is None else kept
        if g_t is None and t is None and w_t is None:
            return [None] * self.places.inputs
        by_w = by_c = gh = None  # <y_gt h + y_g h_t>, <y_gt>, <y_g h_t>
        if g_t is not None and (w_on or (x_on and self.groups)):
            by_w = self._mean(g_t * self.h)
        if g_t is not None and (c_on or (x_on and self.groups and self.center)):
            by_c = self._mean(g_t)
        if t is not None and (w_on or self.groups):
            gh = self._second_mean(t, m, a)
        results: list[Tensor | None] = [None]
        if x_on:
            x_gt = self._on_x(g_t, t, w_t, m, a, by_w, by_c, gh)
            results = [None if x_gt is None else x_gt.expand(x_gt.shape[0], *self.view).reshape(x_gt.shape[0], *self.shape)]
        count = math.prod(self.view) // self.view[1] if self.samples else self.view[2]
        totals = (_plus(by_w, gh) if w_on else None, by_c if c_on else None)
        for total, shape in zip(totals, self.weights_shape, strict=True):
            results.append(None if total is None else (total.sum([1, 3]) * count).view(-1, *shape))
        return self.places.put(*results)

    def _second_mean(self, t: Tensor, m: Tensor | None, a: Tensor | None) -> Tensor:
        """<y_g h_t>."""
        assert self.g is not None
        g, ones, hs = self.g[:3]
        total = self._mean(g * t)
        if a is not None:
            total = total - a * hs
        if m is not None:
            total = total - m * ones
        return total * self.r

    def _on_x(
        self,
        g_t: Tensor | None,
        t: Tensor | None,
        w_t: Tensor | None,
        m: Tensor | None,
        a: Tensor | None,
        by_w: Tensor | None,
        by_c: Tensor | None,
        gh: Tensor | None,
    ) -> Tensor | None:
        g = None if self.g is None else self.g[0]
        if not self.groups:
            return _sum(None, (self.slope, g_t), (None if w_t is None else w_t * self.r, g))
        r = self.r
        on_g, on_x, on_h, on_one = w_t, None, None, None
        if by_w is not None:
            on_h = -self._spread(self.w * by_w)
        if by_c is not None and self.center:
            on_one = -self._spread(self.w * by_c)
        if self.g is not None and w_t is not None:
            on_h = _less(on_h, self._spread(w_t * self.g[2]))
            if self.center:
                on_one = _less(on_one, self._spread(w_t * self.g[1]))
        if self.g is not None and t is not None and a is not None and gh is not None:
            ones, q = self.g[3:]
            on_h = _less(on_h, self._spread(self.w * gh) - 2 * r * a * q)
            on_g = _less(on_g, self.slope * a)
            on_x = -(r * r) * q
            if m is not None:
                on_one = _less(on_one, -r * (a * ones + q * m))
        scaled = [None if f is None else f * r for f in (on_one, on_g, on_h)]
        return _sum(scaled[0], (self.slope, g_t), (scaled[1], g), (on_x, t), (scaled[2], self.h))


def _less(total: Tensor | None, t: Tensor) -> Tensor:
    return -t if total is None else total - t


def _plus(total: Tensor | None, t: Tensor | None) -> Tensor | None:
    return t if total is None else total if t is None else total + t


def _sum(total: Tensor | None, *terms: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """total + the sum of factor * t over the terms that are there, every t * factor of one shape: one pass a term."""
    whole = False  # total is a sum of terms, made here
    for factor, t in terms:
        if factor is None or t is None:
            continue
        if total is None:
            total = factor * t
        elif whole:
            total.addcmul_(factor, t)
        else:
            total = torch.addcmul(total, factor, t)
        whole = True
    return total
