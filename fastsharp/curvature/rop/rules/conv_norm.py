"""Convolution, batch norm on constant statistics and, where they follow, the sum with a skip connection and ReLU in one part.

With r = 1 / sqrt(var + eps) and s = gamma r the composition is a convolution with
    W' = s W                      c' = s (c - mean) + beta
channel by channel, exactly. W', c' are products of parameters, so beside the convolution's own rule stand
    s_t    = r gamma_t            W'_t = s W_t + s_t W        c'_t = s c_t + s_t (c - mean) + beta_t
    W_gt   = s W'_gt + s_t W'_g   c_gt = s c'_gt + s_t c'_g   beta_gt = c'_gt
    s_gt   = <W'_gt, W> + <W'_g, W_t> + (c - mean) c'_gt + c'_g c_t       gamma_gt = r s_gt
with the inner products over all but the channel of the output: they cost a pass over parameters, none over activations. W'_g, c'_g
are formed once, with the adjoint. The skip is added and ReLU multiplies by its mask in place.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.curvature.rop.rules.conv import Convolution
from fastsharp.curvature.rop.rules.matmul import place

aten = torch.ops.aten

Tensor = torch.Tensor

NAMES = ("x", "weight", "bias", "gamma", "beta", "mean", "var", "skip")


def convolution_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    skip: Tensor | None,
    eps: float,
    relu: bool,
    *options: Any,
) -> Tensor:
    """relu(batch_norm(convolution(x, weight, bias, *options), mean, var, gamma, beta) + skip): what `fold` makes of the calls."""
    y = torch.nn.functional.batch_norm(aten.convolution.default(x, weight, bias, *options), mean, var, gamma, beta, False, 0.0, eps)
    y = y if skip is None else y + skip
    return y.relu() if relu else y


def _dot(a: Tensor, w: Tensor) -> Tensor:
    """(b, out): <a_k, w> over all but the first dimension of w (out, ...), for a (b, out, ...); either may lack b."""
    if a.dim() == w.dim():
        a = a.unsqueeze(0)
    return (a * w).sum([*range(2, w.dim() + 1)])


@rule(convolution_norm)
class ConvolutionNorm(Part):
    def __init__(self, call: Call) -> None:
        x, weight, bias, gamma, _, mean, var, _, eps, relu = call.args[:10]
        given = [name for name, t in zip(NAMES, call.args[:8], strict=True) if t is not None]
        self.places = {name: i for i, name in enumerate(given) if call.active[i]}
        self.inputs = len(given)
        self.r = torch.rsqrt(var + eps)
        self.s = self.r if gamma is None else gamma * self.r
        self.shift = -mean if bias is None else bias - mean
        self.column = (-1, *(1,) * (weight.dim() - 1))
        self.weight = weight
        inner = ("x" in self.places, not self.places.keys().isdisjoint(("weight", "gamma")))
        self.conv = Convolution(
            x, weight * self.s.view(self.column), call.outputs[0], call.args[10:], (*inner, not self.places.keys().isdisjoint(NAMES[2:5]))
        )
        self.second_order = True
        # the layout of the convolution's output, so that the product with the mask runs along memory
        self.mask = self.conv.laid((call.outputs[0] > 0).to(call.outputs[0].dtype)) if relu else None
        self.W_g: Tensor | None = None  # of W'
        self.c_g: Tensor | None = None  # of c'

    def _of(self, tensors: Tangents, name: str) -> Tensor | None:
        return tensors[self.places[name]] if name in self.places and tensors else None

    def tangent(self, x_t: Tangents) -> tuple[list[Tensor | None], Any]:
        W_t, c_t, gamma_t, beta_t = (self._of(x_t, name) for name in ("weight", "bias", "gamma", "beta"))
        s_t = None if gamma_t is None else gamma_t * self.r
        folded: Tensor | None = None
        if W_t is not None:
            folded = W_t * self.s.view(self.column)
        if s_t is not None:
            column = s_t.view(len(s_t), *self.column)
            folded = column * self.weight if folded is None else folded.addcmul_(column, self.weight)
        added = beta_t
        if c_t is not None:
            added = c_t * self.s if added is None else torch.addcmul(added, c_t, self.s)
        if s_t is not None:
            added = s_t * self.shift if added is None else torch.addcmul(added, s_t, self.shift)
        through, skip = [self._of(x_t, "x"), folded, added], self._of(x_t, "skip")
        y, kept = None, None
        if any(t is not None for t in through):
            (y,), kept = self.conv.tangent(through)
        if skip is not None:
            y = skip if y is None else y.add_(skip)
        if self.mask is not None and y is not None:
            y = y * self.mask if y is skip else y.mul_(self.mask)
        return [y], (kept, s_t, W_t, c_t)

    def adjoint(self, y_g: Tangents) -> list[Tensor | None]:
        (g,) = y_g
        if g is not None and self.mask is not None:
            g = self.mask * g
        x_g, self.W_g, self.c_g = self.conv.adjoint([g])
        outs = self._out(None if self.W_g is None else self.W_g.unsqueeze(0), None if self.c_g is None else self.c_g.unsqueeze(0), None, ())
        outs = [None if t is None else t.squeeze(0) for t in outs]
        if "x" in self.places:
            outs[self.places["x"]] = x_g
        if "skip" in self.places:
            outs[self.places["skip"]] = g
        return outs

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[Tensor | None]:
        (g,) = y_gt
        inner, *parameters = kept or (None,)
        if g is not None and self.mask is not None:
            g = self.mask * g
        x_gt, W_gt, c_gt = self.conv.backward([g], inner, ()) if g is not None or inner is not None else (None, None, None)
        outs = self._out(W_gt, c_gt, parameters or None, into)
        if x_gt is not None:
            outs[self.places["x"]] = place(x_gt, into[self.places["x"]] if into else None)
        if "skip" in self.places and g is not None:
            outs[self.places["skip"]] = place(g, into[self.places["skip"]] if into else None)
        return outs

    def gradients(self, W_g: Tensor | None, c_g: Tensor | None) -> list[Tensor | None]:
        """Adjoints of the parameters from those of W' (b, *weight's shape) and c' (b, out), to first order."""
        return self._out(W_g, c_g, None, ())

    def _out(self, W_gt: Tensor | None, c_gt: Tensor | None, parameters: Any, into: Tangents) -> list[Tensor | None]:
        """Adjoints of weight, bias, gamma, beta from those of W', c'; `parameters` are s_t, W_t, c_t of the second terms."""
        out: list[Tensor | None] = [None] * self.inputs
        s_t, W_t, c_t = parameters or (None, None, None)
        W_g, c_g = self.W_g, self.c_g
        first = next((t for t in (W_gt, c_gt, s_t, W_t, c_t) if t is not None), None)
        if first is None:
            return out
        b = len(first)

        def give(name: str, *products: tuple[Tensor | None, Tensor | None]) -> None:
            if name not in self.places:
                return
            i = self.places[name]
            total = into[i] if into else None
            for left, right in products:
                if left is None or right is None:
                    continue
                if total is None:
                    total = left * right
                else:
                    total.addcmul_(left, right)
            out[i] = None if into and into[i] is not None else total

        column = None if s_t is None else s_t.view(b, *self.column)
        give("weight", (W_gt, self.s.view(self.column)), (column, W_g))
        give("bias", (c_gt, self.s), (s_t, c_g))
        if "gamma" in self.places:
            terms = [] if W_gt is None else [_dot(W_gt, self.weight)]
            if W_t is not None and W_g is not None:
                terms.append(_dot(W_t, W_g))
            if c_gt is not None:
                terms.append(c_gt * self.shift)
            if c_t is not None and c_g is not None:
                terms.append(c_t * c_g)
            if terms:
                give("gamma", (sum(terms[1:], terms[0]), self.r))
        if "beta" in self.places and c_gt is not None:
            i = self.places["beta"]
            out[i] = place(c_gt, into[i] if into else None)
        return out
