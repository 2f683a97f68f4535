"""Float64 copies of a loss and of tensors, for an evaluation that leaves the model as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastsharp.losses import Loss


def double_loss(loss: Loss) -> Loss:
    """The same loss with float64 weights of its own; the model it calls stays the same object."""
    double = copy.copy(loss)
    if isinstance(loss.loss_fn, nn.Module):
        double.loss_fn = copy.deepcopy(loss.loss_fn).double()
    return double


def to_double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t
