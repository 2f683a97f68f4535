"""Float64 kept through code that writes float32 out: transformers cast logits, attention scores and norms whatever the model's dtype is."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {torch.Tensor.float: torch.float32, torch.Tensor.half: torch.float16, torch.Tensor.bfloat16: torch.bfloat16}


class Doubling(TorchFunctionMode):
    """Casts that are written out in a model or loss (`x.float()`, `dtype=torch.float32`) go to float64, as do float32 constants
    that meet float64 tensors (class weights in a closure, tables).

    narrow   the first operation whose differentiable result is narrow all the same, None where there is none
    """

    narrow: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, kwargs = torch.Tensor.double if func in _CASTS else func, kwargs or {}
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs
        meets = not writes and any(_is_double(a) for a in (*args, *kwargs.values()))
        result = func(*(_widened(a, meets) for a in args), **{k: _widened(v, meets) for k, v in kwargs.items()})
        if isinstance(result, torch.Tensor) and result.dtype in NARROW and result.requires_grad and self.narrow is None:
            self.narrow = name or str(func)
        return result


class CastsSeen(TorchFunctionMode):
    """Notices the narrow dtypes to which float64 tensors are cast by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        if args and any(_is_double(a) for a in values):
            self.found.update(v for v in (_CASTS.get(func), *values) if isinstance(v, torch.dtype) and v in NARROW)
        return func(*args, **kwargs)


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def _widened(value: Any, tensors: bool) -> Any:
    if tensors and isinstance(value, torch.Tensor) and value.dtype in NARROW:
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
