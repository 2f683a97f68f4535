"""When "auto" leaves a model to the native kernel: where its modules alone say what it computes, and the kernel is the faster one.

Nothing is concluded from names or shapes. Every module is exactly one of torch's own classes, without hooks or a forward method of its
own; the loss is torch's; the one evaluation of each batch is then followed call by call and its loss compared (`curvature.mlp`), and the
preflight compares a product with autograd's. A model that computes the same by code of its own is for `backend="mlp"`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as globals_of_torch

from fastsharp.objective import Objective
from fastsharp.ops import mlp

# Measured on one core with AVX-512, 30 to 10,000 samples, 1 and 8 vectors: 0.09 to 0.88 of the engine's time within these, 0.7 to 1.0 at 384.
WIDEST, WIDEST_INPUT = 256, 1024
LAYERS = (nn.Sequential, nn.Linear, nn.ReLU, nn.Tanh, nn.GELU, nn.Flatten, nn.Dropout, nn.Identity)
_LOSSES = (nn.CrossEntropyLoss, nn.MSELoss)
_FUNCTIONS = (None, F.cross_entropy, F.mse_loss)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS if hasattr(globals_of_torch, f"_global{name}"))


def declined(objective: Objective) -> str | None:
    """Why "auto" does not take the native kernel; None where it does."""
    if objective.device.type != "cpu":
        return f"the native kernel was not measured on {objective.device}"
    if not mlp.native(objective.device):
        return "the native kernel is not there in this installation"
    modules = dict(objective.model.named_modules())
    for name, module in modules.items():
        reason = own_ways(module)
        if reason:
            return f"{name or 'the model'} {reason}"
    reason = own_ways_of_loss(objective.loss.loss_fn)
    if reason:
        return reason
    linear = [m for m in modules.values() if isinstance(m, nn.Linear)]
    widest, inputs = max((m.out_features for m in linear), default=0), max((m.in_features for m in linear), default=0)
    if widest > WIDEST or inputs > WIDEST_INPUT:
        return f"a layer of {inputs} inputs and width {widest} is above {WIDEST_INPUT} and {WIDEST}, where it was not measured to be faster"
    return None


def own_ways_of_loss(loss_fn: Any) -> str | None:
    """Why a loss is not torch's cross-entropy or mean squared error as they stand, None where it is; None stands for cross-entropy."""
    if any(getattr(globals_of_torch, name) for name in _GLOBAL_HOOKS):
        return "hooks of all modules are set"
    if type(loss_fn) in _LOSSES:
        reason = own_ways(loss_fn, _LOSSES)
        return f"the loss {reason}" if reason else None
    if any(loss_fn is function for function in _FUNCTIONS):
        return None
    return "the loss is none of torch's cross-entropy and mean squared error"


def own_ways(module: nn.Module, known: tuple[type[nn.Module], ...] = LAYERS) -> str | None:
    """What a module has of its own beside its class, None where it has nothing; its children are not looked at."""
    if type(module) not in known:
        return f"is a {type(module).__name__}"
    if any(module.__dict__.get(name) for name in _HOOKS):
        return "has hooks"
    if "forward" in module.__dict__ or "__call__" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None:
        return "has a forward method of its own, or is compiled"
    for p in module.parameters(recurse=False):
        if type(p) is not nn.Parameter or p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return "has parameters with hooks, or of another class"
    return None
