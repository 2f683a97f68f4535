"""The floor of a Hessian-vector product: the six matrix products or convolutions of every layer, alone, same shapes and layout.

With the primal half cached a layer y = W x costs W x_t + V x, two input gradients and two weight gradients; the first layer has no
input gradient and no W x_t. Nothing else is counted: no activation, no norm, no addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
Pass = Callable[[], Any]


class _Products(TorchDispatchMode):
    """The passes that each product of a forward pass stands for; what depends on parameters is followed by storage."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self._moving = {p.untyped_storage().data_ptr() for p in params}
        self._weights = set(self._moving)
        self._held: list[Any] = []  # storages must not be reused while their addresses count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        moving = [t.untyped_storage().data_ptr() in self._moving for t in tensors]
        if any(moving):  # norms return their statistics as well
            self._moving |= {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self._held.append(out)
        if func is aten.convolution.default:
            self._convolution(args, out)
        elif func in (aten.addmm.default, aten.mm.default, aten.bmm.default):
            self._product(*[t for t in tensors if t.ndim == out.ndim][-2:], out, func)
        return out

    def _is_moving(self, t: torch.Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self._moving

    def _product(self, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, func: Any) -> None:
        multiply = torch.bmm if func is aten.bmm.default else torch.mm
        g = torch.randn_like(y)
        at, bt = a.transpose(-1, -2), b.transpose(-1, -2)
        count = 2 if self._is_moving(a) and self._is_moving(b) else 1
        self.passes += [lambda: multiply(a, b)] * count  # a_t b and a b_t are products of this shape
        self.passes += [lambda: multiply(g, bt)] * (2 if self._is_moving(a) else 0)
        self.passes += [lambda: multiply(at, g)] * (2 if self._is_moving(b) else 0)

    def _convolution(self, args: Any, y: torch.Tensor) -> None:
        x, w, g, rest = args[0], args[1], torch.randn_like(y), args[3:]
        inner = self._is_moving(x)
        self.passes += [lambda: aten.convolution(x, w, None, *rest)] * (2 if inner else 1)
        for mask in ([True, False, False], [False, True, False]):
            if inner or mask[1]:
                self.passes += [lambda mask=mask: aten.convolution_backward(g, x, w, None, *rest, mask)] * 2


def floor(model: nn.Module, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], batches: list[Any]) -> Pass:
    """One call runs the passes of a whole product over the batches."""
    passes: list[Pass] = []
    for x, y in batches:
        with torch.no_grad(), _Products(list(model.parameters())) as seen:
            loss(model(x), y)
        passes += seen.passes

    def run() -> None:
        with torch.no_grad():
            for one in passes:
                one()

    return run
