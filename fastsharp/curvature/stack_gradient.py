"""Gradients and products of a stack of nets by torch's own derivatives, in float64: what the kernel's products are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from fastsharp.curvature.stack import Stack

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": lambda z: z,
}


class StackGradient:
    """The losses L_e of the nets of a slice of a stack on their first `samples` samples, as functions of their weights theta (E, n)."""

    def __init__(self, stack: Stack, members: slice, samples: int, dtype: torch.dtype = torch.float64) -> None:
        self._net = stack.net
        self.theta = stack.theta[members].to(dtype)
        self._x, self._weight = stack.x[members, :samples].to(dtype), stack.weight[members, :samples].to(dtype)
        target = stack.target[members, :samples]
        self._target = target.to(dtype) if target.is_floating_point() else target

    def gradient(self, theta: Tensor) -> Tensor:
        """dL_e / dtheta_e, (E, n)."""
        with torch.enable_grad():
            leaves = self._leaves(theta)
            return self._flat(grad(self._loss(self._outputs(leaves)), leaves))

    def product(self, v: Tensor, *, gauss: bool) -> tuple[Tensor, Tensor]:
        """(A_e v, dL_e / dtheta_e): the Hessian, or with `gauss` the Gauss-Newton matrix, of each net times v (n,); both (E, n)."""
        with torch.enable_grad():
            leaves = self._leaves(self.theta)
            V = self._parts(v.to(self.theta.dtype).expand_as(self.theta))
            z = self._outputs(leaves)
            if not gauss:
                g = grad(self._loss(z), leaves, create_graph=True)
                return self._flat(grad(g, leaves, V, allow_unused=True, materialize_grads=True)), self._flat(g)
            u = torch.zeros_like(z, requires_grad=True)
            (tangent,) = grad(grad(z, leaves, u, create_graph=True), u, V, retain_graph=True)
            leaf = z.detach().requires_grad_()
            (slope,) = grad(self._loss(leaf), leaf, create_graph=True)
            (curved,) = grad(slope, leaf, tangent)
            back = grad(z, leaves, curved, retain_graph=True)
            return self._flat(back), self._flat(grad(z, leaves, slope.detach()))

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """W_1, b_1, W_2, ... of all nets."""
        parts = []
        for l in range(1, self._net.layers + 1):  # noqa: E741
            bias = self._net.bias(flat, l)
            parts += [self._net.weight(flat, l)] + ([] if bias is None else [bias])
        return parts

    def _leaves(self, theta: Tensor) -> list[Tensor]:
        """The parts by themselves: the derivative by a view of theta would be scattered into (E, n)."""
        return [part.detach().contiguous().requires_grad_() for part in self._parts(theta)]

    def _flat(self, parts: tuple[Tensor, ...]) -> Tensor:
        out = torch.empty_like(self.theta)
        for to, part in zip(self._parts(out), parts, strict=True):
            to.copy_(part.detach())
        return out

    def _outputs(self, leaves: list[Tensor]) -> Tensor:
        """z_L, (E, N, d_L)."""
        a, at = self._x, iter(leaves)
        for l in range(self._net.layers):  # noqa: E741
            W = next(at).mT
            z = a @ W if self._net.biases[l] is None else torch.baddbmm(next(at)[:, None], a, W)
            a = _ACTIVATIONS[self._net.activation](z)
        return z

    def _loss(self, z: Tensor) -> Tensor:
        if self._net.loss == "squared":
            return (self._weight * (z - self._target).square().sum(-1) / 2).sum()
        # a label with weight 0 may be none of the classes
        target = self._target.where(self._weight != 0, 0)
        each = F.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="none")
        return (self._weight.flatten() * each).sum()
