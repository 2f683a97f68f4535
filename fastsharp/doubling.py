"""A model and its loss evaluated in float64 on a copy of the weights; the model itself is not touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastsharp.losses import Loss

NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class Doubling(TorchFunctionMode):
    """Casts that are written out in a model or loss (`x.float()`, `dtype=torch.float32`) go to float64, as do float32 constants
    that meet float64 tensors (class weights in a closure, tables)."""

    narrow: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = torch.Tensor.double if func in _CASTS else func, kwargs or {}
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs
        meets = not writes and any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in (*args, *kwargs.values()))
        result = func(*(_widened(a, meets) for a in args), **{k: _widened(v, meets) for k, v in kwargs.items()})
        if isinstance(result, torch.Tensor) and result.dtype in NARROW and result.requires_grad and self.narrow is None:
            self.narrow = name or str(func)
        return result


def _widened(value: Any, tensors: bool) -> Any:
    if tensors and isinstance(value, torch.Tensor) and value.dtype in NARROW:
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def double_loss(loss: Loss) -> Loss:
    """The same loss with float64 weights of its own; the model it calls stays the same object."""
    double = copy.copy(loss)
    if isinstance(loss.loss_fn, nn.Module):
        double.loss_fn = copy.deepcopy(loss.loss_fn).double()
    return double


def to_double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t
