"""Softmax and log-softmax along one dimension.

With p = softmax(x), sums and inner products along the dimension, P v = p (v - <p, v>) and c = g - <p, g>:
    softmax        y_t = P x_t          x_g = P g           x_gt = P g_t + p_t c - p <p_t, c>
    log-softmax    y_t = x_t - <p, x_t> x_g = g - p sum(g)  x_gt = g_t - p (sum(g_t) + sum(g) y_t)
The softmax's x_gt is P (g_t + p_t c / p): one sum, then the kernel of torch's own backward, in place. That is as exact as the terms
apart: the rounding of p_t is multiplied by c / p and then by p. Where p vanishes, so does p_t; a masked row of `_safe_softmax` is zero
throughout.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule

aten = torch.ops.aten

SMALL = 1 << 14  # elements up to which one call on b copies of p is faster than b calls: copying costs less than calling


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _Along(Part):
    """What both share: the dimension, and the dtypes outside. Inside, half precision is computed in float32."""

    def __init__(self, call: Call) -> None:
        (x,), (y,) = call.inputs, call.outputs
        dim = call.argument(1, "dim")
        self.dim = dim - x.dim() if dim >= 0 else dim  # from the end: the same with b in front
        self.outside = (x.dtype, y.dtype)
        self.inside = _wide(y.dtype)

    def _in(self, t: torch.Tensor) -> torch.Tensor:
        return t if t.dtype == self.inside else t.to(self.inside)


@rule(aten._softmax.default, aten._safe_softmax.default)
class Softmax(_Along):
    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p = self._in(call.outputs[0]).contiguous()
        self.ratio: torch.Tensor | None = None  # c / p

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        p_t = self._project(self._in(t))
        return [p_t.to(self.outside[1])], p_t

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_g
        assert g is not None
        g = self._in(g)
        c = g - (g * self.p).sum(self.dim, keepdim=True)
        # far below the rounding of the row, and c / p cannot overflow
        floor = torch.finfo(self.inside).tiny / torch.finfo(self.inside).eps
        self.ratio = torch.where(self.p > floor, c / self.p, 0.0)
        return [(c * self.p).to(self.outside[0])]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        g = None if y_gt[0] is None else self._in(y_gt[0])
        if kept is None or self.ratio is None:
            return [None if g is None else self._project(g).to(self.outside[0])]
        bent = kept * self.ratio if g is None else torch.addcmul(g, kept, self.ratio)
        return [self._project(bent, owned=True).to(self.outside[0])]

    def _project(self, v: torch.Tensor, owned: bool = False) -> torch.Tensor:
        """P v, into v where it is ours. On a GPU a fresh result costs nothing, and kernels may read rows twice."""
        out = v if owned and v.is_cpu and v.is_contiguous() else torch.empty(v.shape, dtype=v.dtype, device=v.device)
        if v.shape[0] == 1 or self.p.numel() <= SMALL:
            aten._softmax_backward_data.out(v, self.p.expand(v.shape), self.dim, self.inside, grad_input=out)
            return out
        for row, into in zip(v, out, strict=True):
            aten._softmax_backward_data.out(row, self.p, self.dim, self.inside, grad_input=into)
        return out


@rule(aten._log_softmax.default)
class LogSoftmax(_Along):
    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p = self._in(call.outputs[0]).exp()
        self.slope: torch.Tensor | None = None  # p sum(g)

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        (t,) = x_t
        assert t is not None
        t = self._in(t)
        y_t = t * self.p
        torch.sub(t, y_t.sum(self.dim, keepdim=True), out=y_t)
        return [y_t.to(self.outside[1])], y_t

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        (g,) = y_g
        assert g is not None
        g = self._in(g)
        self.slope = self.p * g.sum(self.dim, keepdim=True)
        return [(g - self.slope).to(self.outside[0])]

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        total: torch.Tensor | None = None
        if y_gt[0] is not None:
            g = self._in(y_gt[0])
            total = torch.addcmul(g, self.p, g.sum(self.dim, keepdim=True), value=-1)
        if kept is not None and self.slope is not None:
            total = (kept * self.slope).neg_() if total is None else total.addcmul_(kept, self.slope, value=-1)
        return [None if total is None else total.to(self.outside[0])]
