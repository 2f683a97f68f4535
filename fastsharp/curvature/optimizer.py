"""What a live torch optimiser holds for the parameters of an operator, found by the tensors themselves and never by position."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fastsharp.errors import ArgumentTypeError, InputError, ParamError, listing

Named = list[tuple[str, torch.Tensor]]


def groups_of(optimizer: torch.optim.Optimizer, parameters: Named, call: str) -> list[dict[str, Any]]:
    """The param_group of each parameter; ParamError where the optimiser does not hold it."""
    by_tensor = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters if id(p) not in by_tensor]
    if missing:
        raise ParamError(
            f"{call}: the optimizer does not hold {listing(missing)}.\n"
            "Pass the optimizer that trains this very model (not a copy), or leave these parameters out with params=."
        )
    return [by_tensor[id(p)] for _, p in parameters]


def steps_as(optimizer: torch.optim.Optimizer, *classes: type[torch.optim.Optimizer]) -> bool:
    """Whether the optimiser's step is that of one of these classes; a subclass that overrides `step` may do anything."""
    own = inspect.unwrap(type(optimizer).step)  # torch wraps it for the profiler on the first instance
    return isinstance(optimizer, classes) and any(own is inspect.unwrap(cls.step) for cls in classes)


def check_optimizer(optimizer: Any, call: str) -> torch.optim.Optimizer:
    """The optimiser itself, if it is one that descends."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(f"{call}: got a {type(optimizer).__name__}, expected a torch.optim.Optimizer.")
    if any(group.get("maximize", False) for group in optimizer.param_groups):
        raise InputError(f"{call}: the optimizer has maximize=True, it ascends this loss. Negate the loss instead.")
    return optimizer
