"""Normalisation: y = w h + c with h = (x - m) r, by statistics of rows, of groups of channels, of the batch, or by constants.

With E the mean over what is normalised together, P v = v - E v - h E(h v) and a = E(h x_t), q = E(h w y_g):
    h_t  = r P x_t                       y_t = w h_t + w_t h + c_t
    g_t  = w y_gt + w_t y_g
    x_gt = r [P g_t - h E(h_t w y_g) - a x_g - q h_t]
    w_gt = sum (y_gt h + y_g h_t)        c_gt = sum y_gt
Without centring (RMS norm) E v is dropped from P; with constant statistics P is the identity and a = q = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastsharp.curvature.rop.channel_norm import ChannelNorm, Places, alone
from fastsharp.curvature.rop.parts import width
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.curvature.rop.upcast import also_in_half
from fastsharp.ops import dual

aten = torch.ops.aten

Tensor = torch.Tensor


class RowNorm(Part):
    """Layer norm, or RMS norm without `center`, by the fused passes of `fastsharp.ops.dual`: one forward and one back for all b."""

    def __init__(self, call: Call, places: Places, columns: int, eps: float, center: bool) -> None:
        x = call.inputs[0]
        self.places, self.shape, self.columns = places, tuple(x.shape), columns
        self.rows = x.numel() // columns
        w = call.inputs[places.at[1]] if places.at[1] >= 0 else None
        matrix = x.reshape(self.rows, columns).contiguous()
        stats = dual.norm_prepare(matrix, eps=eps, center=center, stats=x.new_empty(self.rows, 2, dtype=torch.float64))
        self.norm = dual.Norm(matrix, None if w is None else w.reshape(columns).contiguous(), stats, center)
        self.columns_shape = None if w is None else tuple(w.shape)
        self.g: tuple[Tensor, Tensor] | None = None  # y_g and its sums

    def _matrix(self, t: Tensor) -> Tensor:
        """A tangent as (b, rows, columns), each row without gaps and apart from the others."""
        t = t.reshape(t.shape[0], self.rows, self.columns)
        apart = t.stride(2) == 1 and t.stride(1) >= self.columns and (len(t) == 1 or t.stride(0) >= self.rows * t.stride(1))
        return t if apart else t.contiguous()

    def _columns(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.reshape(t.shape[0], self.columns)
        return t if t.stride(1) == 1 and (len(t) == 1 or t.stride(0) >= self.columns) else t.contiguous()

    def tangent(self, x_t: Tangents) -> tuple[list[Tensor | None], Any]:
        b = width(x_t)
        t, w_t, c_t = self.places.take(x_t)
        t, w_t, c_t = None if t is None else self._matrix(t), self._columns(w_t), self._columns(c_t)
        x = self.norm.x
        out = x.new_empty(b, self.rows, self.columns)
        sums = self.norm.stats.new_empty(b, self.rows, 2)
        dual.norm_tangent(self.norm, t, out=out, sums=sums, w_t=w_t, bias_t=c_t)
        y_t: list[Tensor | None] = [None] * self.places.outputs
        y_t[0] = out.view(b, *self.shape)
        return y_t, None if t is None and w_t is None else (t, sums, w_t)

    def adjoint(self, y_g: Tangents) -> list[Tensor | None]:
        alone(y_g)
        if y_g[0] is None:
            return [None] * self.places.inputs
        g = self._matrix(y_g[0].unsqueeze(0))
        sums = self.norm.stats.new_empty(1, self.rows, 2)
        x_g = self._adjoint(g, None, sums, ())
        self.g = (g[0], sums)
        return [None if t is None else t.squeeze(0) for t in x_g]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[Tensor | None]:
        g_t = None if y_gt[0] is None else self._matrix(y_gt[0])
        second = None
        if kept is not None and self.g is not None:
            t, sums, w_t = kept
            second = dual.Second(*self.g, t, sums, w_t)
        if g_t is None and second is None:
            return [None] * self.places.inputs
        return self._adjoint(g_t, second, None, into)

    def _adjoint(self, g_t: Tensor | None, second: dual.Second | None, sums: Tensor | None, into: Tangents) -> list[Tensor | None]:
        b = len(g_t) if g_t is not None else len(second.x_sums)  # type: ignore[union-attr]
        x_on, w_on, c_on = self.places.on
        x = self.norm.x
        out = x.new_empty(b, self.rows, self.columns) if x_on or sums is not None else None
        given = self.places.take(into)
        totals: list[Tensor | None] = []
        results: list[Tensor | None] = []
        for on, place in ((w_on, given[1]), (c_on and g_t is not None, given[2])):
            total = None
            if on and place is not None and place[0].is_contiguous() and (b == 1 or place.stride(0) >= self.columns):
                total, result = place.view(b, self.columns), None
            elif on:
                total = x.new_zeros(b, self.columns)
                result = total.view(b, *(self.columns_shape or self.shape[-1:]))
            else:
                result = None
            totals.append(total)
            results.append(result)
        dual.norm_adjoint(self.norm, g_t, out=out, second=second, sums=sums, w_gt=totals[0], bias_gt=totals[1])
        return self.places.put(None if out is None else out.view(b, *self.shape), *results)


def _rows(call: Call, eps: float, *positions: int, center: bool) -> Part | None:
    """Layer and RMS norm: the fused passes where they apply, elsewhere each element is a channel of one group."""
    x = call.inputs[0]
    places = Places(call, *positions)
    columns = math.prod(call.args[1])
    if x.numel() == 0 or any(t.dtype != x.dtype for t in call.inputs) or places.others:
        return None
    if dual.fused(x):
        return RowNorm(call, places, columns, eps, center)
    view = (x.numel() // columns, columns, 1)
    return ChannelNorm(call, places, view, mean=None, var=None, eps=eps, groups=1, samples=False, center=center)


@rule(aten.native_layer_norm.default)
@also_in_half
def _layer_norm(call: Call) -> Part | None:
    return _rows(call, call.args[4], 0, 2, 3, center=True)


def _rms_norm(call: Call) -> Part | None:
    eps = call.argument(3, "eps")
    return _rows(call, torch.finfo(call.inputs[0].dtype).eps if eps is None else eps, 0, 2, _ABSENT, center=False)


_ABSENT = 9  # position of an argument that the call does not have

if hasattr(aten, "_fused_rms_norm"):
    rule(aten._fused_rms_norm.default)(_rms_norm)


@rule(aten.native_group_norm.default)
@also_in_half
def _group_norm(call: Call) -> Part | None:
    x = call.inputs[0]
    samples, channels, size, groups = call.args[3:7]
    if x.numel() == 0 or any(t.dtype != x.dtype for t in call.inputs):
        return None
    view = (samples, channels, size)
    return ChannelNorm(call, Places(call, 0, 1, 2), view, mean=None, var=None, eps=call.args[7], groups=groups, samples=False)


def _batch_norm(call: Call, training: bool, eps: float, running: bool = True) -> Part | None:
    """Running statistics are constants; in training their update is no part of the function."""
    x = call.inputs[0]
    places = Places(call, 0, 1, 2)
    mean, var = call.args[3:5] if running else (None, None)
    mixed = any(call.inputs[i].dtype != x.dtype for i in places.at if i >= 0)
    if x.numel() == 0 or x.dim() < 2 or mixed or places.others or (not training and (mean is None or var is None)):
        return None
    view = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    if training:
        return ChannelNorm(call, places, view, mean=None, var=None, eps=eps, groups=x.shape[1], samples=True)
    return ChannelNorm(call, places, view, mean=mean, var=var, eps=eps, groups=0, samples=True)


@rule(aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)
@also_in_half
def _batch_norm_of_mode(call: Call) -> Part | None:
    return _batch_norm(call, call.args[5], call.args[7])


@rule(aten._native_batch_norm_legit_no_training.default, aten._batch_norm_no_update.default)
@also_in_half
def _batch_norm_in_eval(call: Call) -> Part | None:
    return _batch_norm(call, False, call.args[6])


@rule(aten._native_batch_norm_legit.no_stats)
@also_in_half
def _batch_norm_without_statistics(call: Call) -> Part | None:
    return _batch_norm(call, call.args[3], call.args[5], running=False)
