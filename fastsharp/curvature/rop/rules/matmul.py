"""Products of matrices: y = beta c + alpha A B, and the linear layer y = x W' + c.

Both are bilinear, so with A, B and c active
    y_t  = beta c_t + alpha (A_t B + A B_t)
    A_gt = alpha (y_gt B' + y_g B_t')
    B_gt = alpha (A' y_gt + A_t' y_g)
    c_gt = beta sum y_gt, over the dimensions along which c was broadcast
and each sum of two products is one product and a second that accumulates on it, in the flat result where there is a place for it.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.curvature.rop.rule import Call, Part, Tangents, rule
from fastsharp.ops.dual_linear import dual_linear, gather, paired_kernel

aten = torch.ops.aten

Tensor = torch.Tensor


def broadcast_sum(y: Tensor, shape: torch.Size, scale: float, into: Tensor | None) -> Tensor | None:
    """scale * sum of y (b, ...) over the dimensions along which `shape` was broadcast; added to `into` where that is given."""
    lead = y.dim() - 1 - len(shape)
    over = [*range(1, 1 + lead), *(1 + lead + i for i, n in enumerate(shape) if n == 1 and y.shape[1 + lead + i] != 1)]
    if over:
        y = y.sum(over, keepdim=True).reshape(y.shape[0], *shape)
    if into is not None:
        into.add_(y, alpha=scale)
        return None
    return y if scale == 1.0 else y * scale


def place(y: Tensor, into: Tensor | None) -> Tensor | None:
    """y, or None once it has been added to its place in the flat result."""
    if into is None:
        return y
    into.add_(y)
    return None


class Product(Part):
    """y = beta c + alpha A B for matrices or stacks of them; a vector takes part as a matrix of one row or column."""

    def __init__(self, call: Call, c: int | None, beta: float, alpha: float, row: bool = False, column: bool = False) -> None:
        first = 0 if c is None else 1
        self.beta, self.alpha = beta, alpha
        self.c_shape = None if c is None or not call.active[0] else call.inputs[0].shape
        self.on = call.active[first : first + 2]
        self.row, self.column, self.first = row, column, first
        self.y_dim = call.outputs[0].dim()
        self.second_order = all(self.on)
        a, b = call.inputs[first : first + 2]
        # each factor is needed by the tangent and the adjoint of the other
        self.A = self._matrix(a, row, False) if self.on[1] else None
        self.B = self._matrix(b, False, column) if self.on[0] else None
        self.shape = call.outputs[0].shape

    @staticmethod
    def _matrix(t: Tensor, row: bool, column: bool) -> Tensor:
        return t.unsqueeze(-2) if row else t.unsqueeze(-1) if column else t

    def _lift(self, y: Tensor) -> Tensor:
        y = y.unsqueeze(-1) if self.column else y
        return y.unsqueeze(-2) if self.row else y

    def tangent(self, x_t: Tangents) -> tuple[list[Tensor | None], Any]:
        c_t = x_t[0] if self.first else None
        A_t, B_t = (
            None if t is None else self._matrix(t, self.row and i == 0, self.column and i == 1)
            for i, t in enumerate(x_t[self.first : self.first + 2])
        )
        b = next(len(t) for t in x_t if t is not None)
        y: Tensor | None = None
        if c_t is not None:
            lead = len(self.shape) - (c_t.dim() - 1)
            c_t = c_t.reshape(b, *(1,) * lead, *c_t.shape[1:]).expand(b, *self.shape)
            y = self._lift(c_t * self.beta)
        if A_t is not None and self.B is not None:
            y = gather(y, A_t, self.B, b, self.alpha)
        if B_t is not None and self.A is not None:
            y = gather(y, self.A, B_t, b, self.alpha)
        assert y is not None
        y = y.squeeze(-1) if self.column else y
        return [y.squeeze(-1 if self.row and self.column else -2) if self.row else y], (A_t, B_t)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[Tensor | None]:
        g_t = y_gt[0]
        into = into or (None,) * (self.first + 2)
        out: list[Tensor | None] = [None] * (self.first + 2)
        A_t, B_t = kept or (None, None)
        g = self._lift(self.y_g[0]) if kept is not None and self.second_order and self.y_g[0] is not None else None
        if g_t is not None:
            if self.c_shape is not None:
                out[0] = broadcast_sum(g_t, self.c_shape, self.beta, into[0])
            g_t = self._lift(g_t)
        for i in range(2):
            if not self.on[i]:
                continue
            other, other_t = (self.B, B_t) if i == 0 else (self.A, A_t)
            flat = into[self.first + i]
            as_column, as_row = self.column and i == 1, self.row and i == 0
            total = None if flat is None else self._matrix(flat, as_row, as_column)
            for adjoint, factor in ((g_t, other), (g, other_t)):
                if adjoint is None or factor is None:
                    continue
                b = len(g_t) if g_t is not None else len(factor)
                left, right = (adjoint, factor.mT) if i == 0 else (factor.mT, adjoint)
                total = gather(total, left, right, b, self.alpha)
            if flat is None and total is not None:
                out[self.first + i] = total.squeeze(-1) if as_column else total.squeeze(-2) if as_row else total
        return out


@rule(aten.mm.default, aten.bmm.default)
def product(call: Call) -> Part:
    return Product(call, None, 1.0, 1.0)


@rule(aten.mv.default)
def matrix_vector(call: Call) -> Part:
    return Product(call, None, 1.0, 1.0, column=True)


@rule(aten.dot.default)
def dot(call: Call) -> Part:
    return Product(call, None, 1.0, 1.0, row=True, column=True)


@rule(aten.addmm.default, aten.baddbmm.default)
def added_product(call: Call) -> Part:
    return Product(call, 0, float(call.kwargs.get("beta", 1)), float(call.kwargs.get("alpha", 1)))


@rule(aten.addmv.default)
def added_matrix_vector(call: Call) -> Part:
    return Product(call, 0, float(call.kwargs.get("beta", 1)), float(call.kwargs.get("alpha", 1)), column=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x W' + c on the parameter itself: what `fold` makes of t, addmm and relu, so that W_gt has a place in the flat result."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y.relu() if relu else y


@rule(aten.linear.default, linear)
class Linear(Part):
    """y = x W' + c for x (..., features): y_t = x_t W' + x W_t' + c_t, x_gt = y_gt W + y_g W_t, W_gt = y_gt' x + y_g' x_t.

    ReLU multiplies by its mask: in place on the way forward, y_g once and for all.
    """

    def __init__(self, call: Call) -> None:
        x, weight = call.inputs[:2]
        self.on = [*call.active, False][:3]
        self.inputs = len(call.inputs)
        self.second_order = self.on[0] and self.on[1]
        self.x = x.reshape(-1, x.shape[-1]) if self.on[1] else None
        self.weight = weight if self.on[0] else None
        self.x_shape, self.y_shape = x.shape, call.outputs[0].shape
        self.rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        y = call.outputs[0]
        self.mask = (y > 0).to(y.dtype).view(self.rows, -1) if call.argument(3, "relu", False) else None

    def tangent(self, x_t: Tangents) -> tuple[list[Tensor | None], Any]:
        a_t, w_t = x_t[:2]
        c_t = x_t[2] if self.inputs > 2 else None
        b = next(len(t) for t in x_t if t is not None)
        a_t = None if a_t is None else a_t.reshape(b, self.rows, -1)
        kernel = None if a_t is None or w_t is None else paired_kernel(a_t, w_t.mT)
        if kernel is not None and self.x is not None and self.weight is not None and a_t is not None and w_t is not None:
            y = None if c_t is None else c_t.unsqueeze(1).repeat(1, self.rows, 1)
            y = kernel(y, (self.x, w_t.mT), (a_t, self.weight.t()), b, 1.0)
        else:
            y = self._two_products(a_t, w_t, c_t, b)
        if self.mask is not None:
            y.mul_(self.mask)
        return [y.view(b, *self.y_shape)], (a_t, w_t)

    def _two_products(self, a_t: Tensor | None, w_t: Tensor | None, c_t: Tensor | None, b: int) -> Tensor:
        """x W_t' + x_t W' + c_t with the bias and the second product accumulating in the calls of the first."""
        y: Tensor | None = None
        if w_t is not None and self.x is not None:
            if c_t is None:
                y = gather(None, self.x, w_t.mT, b)
            elif b == 1:
                y = torch.addmm(c_t[0], self.x, w_t[0].t()).unsqueeze(0)
            else:
                y = torch.baddbmm(c_t.unsqueeze(1), self.x.expand(b, *self.x.shape), w_t.mT)
        elif c_t is not None:
            y = c_t.unsqueeze(1).repeat(1, self.rows, 1)
        if a_t is not None and self.weight is not None:
            if y is None:
                y = gather(None, a_t.contiguous(), self.weight.t(), b)
            else:
                y.view(b * self.rows, -1).addmm_(a_t.reshape(b * self.rows, -1), self.weight.t())
        assert y is not None
        return y

    def adjoint(self, y_g: Tangents) -> list[Tensor | None]:
        if self.mask is not None and y_g[0] is not None:
            y_g = [self.mask * y_g[0]]
        return super().adjoint(y_g)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[Tensor | None]:
        g_t = None if y_gt[0] is None else y_gt[0].reshape(len(y_gt[0]), self.rows, -1)
        if g_t is not None and self.mask is not None:
            g_t = g_t * self.mask
        x_t, w_t = kept or (None, None)
        g = self.y_g[0].reshape(self.rows, -1) if kept is not None and self.second_order and self.y_g[0] is not None else None
        into = into or (None,) * self.inputs
        out: list[Tensor | None] = [None] * self.inputs
        if self.on[0]:
            first = None if g_t is None or self.weight is None else (g_t.contiguous(), self.weight)
            total = dual_linear(None, first, None if g is None or w_t is None else (g, w_t))
            if total is not None:
                out[0] = place(total.view(len(total), *self.x_shape), into[0])
        if self.on[1]:
            first = None if g_t is None or self.x is None else (g_t.mT, self.x)
            total = dual_linear(into[1], first, None if g is None or x_t is None else (g.t(), x_t))
            out[1] = None if into[1] is not None else total
        if self.on[2] and g_t is not None:
            out[2] = broadcast_sum(g_t, g_t.shape[2:], 1.0, into[2])
        return out
