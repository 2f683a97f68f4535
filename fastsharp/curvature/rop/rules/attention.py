"""Scaled dot-product attention as one part: O = P V, P = softmax(S), S = scale Q K' + mask.

With c = P_g - <P, P_g> by rows, S_g = P c, and softmax'(u) = P u - P <P, u>:
    S_t  = scale (Q_t K' + Q K_t') + mask_t       P_t = softmax'(S_t)         O_t = P_t V + P V_t
    P_gt = O_gt V' + O_g V_t'                     S_gt = h - P sum(h), h = P P_gt + P_t c
    Q_gt = scale (S_gt K + S_g K_t)               K_gt = scale (S_gt' Q + S_g' Q_t)
    V_gt = P' O_gt + P_t' O_g                     mask_gt = S_gt, summed to its shape
P, c and S_g are kept: matrices of queries by keys, three a head. Heads that share keys and values are queries of the same head.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastsharp.curvature.rop.memory import Unrecorded
from fastsharp.curvature.rop.parts import lift, sum_to, width
from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.ops import dual
from fastsharp.ops.dual_linear import gather

aten = torch.ops.aten

Tensor = torch.Tensor


class Attention(Part):
    """Inputs are (batch, heads, length, features), of keys and values perhaps fewer heads; `mask` broadcasts to (batch, heads, L, S)."""

    def __init__(self, call: Call, mask: Tensor | None, causal: bool, scale: float | None) -> None:
        q, k, v = call.inputs[:3]
        self.outputs, self.on = len(call.outputs), [*call.active, False][:4]
        self.inputs = len(call.inputs)
        self.shapes = [tuple(t.shape) for t in call.inputs]
        self.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.y_shape = (*q.shape[:3], v.shape[-1])
        self.scores = (*q.shape[:3], k.shape[2])
        stacks, rows = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1] * q.shape[2]
        self.stacks = [(stacks, n, t.shape[-1]) for n, t in ((rows, q), (k.shape[2], k), (k.shape[2], v))]
        q, k, self.v = (t.reshape(stack) for t, stack in zip((q, k, v), self.stacks, strict=True))
        self.q, self.k = q * self.scale, k * self.scale
        s = torch.bmm(self.q, k.mT).view(self.scores)
        if causal:
            s = s.masked_fill_(torch.ones(self.scores[2:], dtype=torch.bool, device=s.device).triu_(1), -math.inf)
        if mask is not None:
            s = s.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
        self.p = aten._safe_softmax.default(s, -1).view(stacks, rows, k.shape[1])
        self.g: tuple[Tensor, Tensor, Tensor] | None = None  # O_g, c, S_g

    def _stacked(self, tangents: Tangents) -> list[Tensor | None]:
        """(b, batch, heads, ...) as (b, batch * heads, ...)."""
        return [None if t is None else t.reshape(len(t), *stack) for t, stack in zip(tangents[:3], self.stacks, strict=True)]

    def tangent(self, x_t: Tangents) -> tuple[list[Tensor | None], Any]:
        b = width(x_t)
        q_t, k_t, v_t = self._stacked(x_t)
        p_t = out = None
        if q_t is not None:
            p_t = gather(p_t, q_t, self.k.mT, b)
        if k_t is not None:
            p_t = gather(p_t, self.q, k_t.mT, b)
        mask_t = x_t[3] if self.on[3] else None
        if mask_t is not None:
            s_t = lift(mask_t, 4).expand(b, *self.scores)
            p_t = s_t.reshape(b, *self.p.shape).clone() if p_t is None else p_t.view(b, *self.scores).add_(s_t).view(p_t.shape)
        if p_t is not None:
            _softmax_(p_t, self.p)
            out = gather(None, p_t, self.v, b)
        if v_t is not None:
            out = gather(out, self.p, v_t, b)
        assert out is not None
        return [out.view(b, *self.y_shape), *[None] * (self.outputs - 1)], (q_t, k_t, v_t, p_t)

    def adjoint(self, y_g: Tangents) -> list[Tensor | None]:
        if any(g is not None for g in y_g[1:]):
            raise Unrecorded("attention whose normaliser is used as a value")
        if y_g[0] is None:
            return [None] * self.inputs
        g = y_g[0].reshape(*self.p.shape[:2], self.v.shape[-1])
        c = torch.bmm(g, self.v.mT)
        c = c.sub_((c * self.p).sum(-1, keepdim=True))
        s_g = self.p * c
        self.g = (g, c, s_g)
        v_g = torch.bmm(self.p.mT, g).unsqueeze(0) if self.on[2] else None
        return [None if t is None else t.squeeze(0) for t in self._placed(s_g.unsqueeze(0), None, None, v_g)]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[Tensor | None]:
        g_t = None if y_gt[0] is None else y_gt[0].reshape(len(y_gt[0]), *self.p.shape[:2], self.v.shape[-1])
        q_t, k_t, v_t, p_t = (None,) * 4 if kept is None or self.g is None else kept
        s_gt = v_gt = None
        if self.on[2]:
            if g_t is not None:
                v_gt = gather(None, self.p.mT, g_t, len(g_t))
            if p_t is not None and self.g is not None:
                v_gt = gather(v_gt, p_t.mT, self.g[0], len(p_t))
        if self.on[0] or self.on[1] or self.on[3]:
            if g_t is not None:
                s_gt = gather(None, g_t, self.v.mT, len(g_t))
            if v_t is not None and self.g is not None:
                s_gt = gather(s_gt, self.g[0], v_t.mT, len(v_t))
            if p_t is not None and self.g is not None:
                h = p_t * self.g[1] if s_gt is None else s_gt.mul_(self.p).addcmul_(p_t, self.g[1])
                s_gt = h.addcmul_(h.sum(-1, keepdim=True), self.p, value=-1)
            elif s_gt is not None:
                _softmax_(s_gt, self.p)
        return self._placed(s_gt, q_t, k_t, v_gt)

    def _placed(self, s_gt: Tensor | None, q_t: Tensor | None, k_t: Tensor | None, v_gt: Tensor | None) -> list[Tensor | None]:
        """Results by input, from those of the scores and the values and the second terms that the scores' adjoint makes."""
        q_gt = k_gt = mask_gt = None
        s_g = None if self.g is None else self.g[2]
        if self.on[0]:
            if s_gt is not None:
                q_gt = gather(q_gt, s_gt, self.k, len(s_gt))
            if k_t is not None and s_g is not None:
                q_gt = gather(q_gt, s_g, k_t, len(k_t), self.scale)
        if self.on[1]:
            if s_gt is not None:
                k_gt = gather(k_gt, s_gt.mT, self.q, len(s_gt))
            if q_t is not None and s_g is not None:
                k_gt = gather(k_gt, s_g.mT, q_t, len(q_t), self.scale)
        if self.on[3] and s_gt is not None:
            mask_gt = s_gt.view(len(s_gt), *self.scores)
        results = (q_gt, k_gt, v_gt, mask_gt)[: self.inputs]
        return [
            None if t is None else sum_to(t, shape) if i == 3 else t.view(len(t), *shape)
            for i, (t, shape) in enumerate(zip(results, self.shapes, strict=True))
        ]


def _softmax_(u: Tensor, p: Tensor) -> Tensor:
    """p u - p <p, u> by rows in place of u, (b, heads, rows, columns)."""
    if dual.fused(u):
        stack = u.view(len(u), -1, u.shape[-1])
        dual.softmax_product(p.view(stack.shape[1:]), stack, out=stack)
        return u
    u.mul_(p)
    return u.addcmul_(u.sum(-1, keepdim=True), p, value=-1)


def _attention(call: Call, mask: Tensor | None, dropout: float, causal: bool) -> Part | None:
    if dropout:
        return None
    return Attention(call, mask, causal, call.kwargs.get("scale"))


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _on_the_cpu(call: Call) -> Part | None:
    return _attention(call, call.kwargs.get("attn_mask"), call.argument(3, "dropout_p", 0.0), call.argument(4, "is_causal", False))


@rule(aten._scaled_dot_product_flash_attention.default)
def _flash(call: Call) -> Part | None:
    return _attention(call, None, call.argument(3, "dropout_p", 0.0), call.argument(4, "is_causal", False))


@rule(aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default)
def _with_bias(call: Call) -> Part | None:
    bias = call.argument(3, "attn_bias")
    return _attention(call, bias, call.argument(5, "dropout_p", 0.0), call.argument(6, "is_causal", False))
