"""A call of the model with other weights in place of its own, which are put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.func import functional_call

Result = TypeVar("Result")


def with_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], call: Callable[[], Result]) -> Result:
    """call() while the model's parameters and buffers of these names are `weights`; a loss object calls the model itself."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Result:
            return call()

    # recurrent modules keep a second list of their weights, which functional_call leaves at the swapped ones
    lists = [(m, m._flat_weights, m._flat_weight_refs) for m in model.modules() if isinstance(m, nn.RNNBase)]
    try:
        result: Result = functional_call(Swapped(), {f"inner.{name}": t for name, t in weights.items()}, ())
    finally:
        for m, flat, refs in lists:
            m.__dict__["_flat_weights"], m.__dict__["_flat_weight_refs"] = flat, refs
    return result
