"""What autograd's graph of one evaluation says before any product: operations without a derivative, sparse gradients, kinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastsharp.errors import DoubleBackwardError, SparseGradError, listing

_KINKS = (  # the word for a node's name without "Backward", by its beginning
    ("ReluBackward", "relu"),
    ("ThresholdBackward", "threshold"),
    ("LeakyReluBackward", "leaky_relu"),
    ("PreluKernelBackward", "prelu"),
    ("RreluWithNoiseBackward", "rrelu"),
    ("HardtanhBackward", "hardtanh"),
    ("HardswishBackward", "hardswish"),
    ("HardsigmoidBackward", "hardsigmoid"),
    ("HardshrinkBackward", "hardshrink"),
    ("SoftshrinkBackward", "softshrink"),
    ("MaxPool", "max_pool"),
    ("AdaptiveMaxPool", "max_pool"),
    ("FractionalMaxPool", "max_pool"),
    ("MkldnnMaxPool", "max_pool"),
    ("AbsBackward", "abs"),
    ("Clamp", "clamp"),
    ("MaximumBackward", "maximum"),
    ("MinimumBackward", "minimum"),
    ("MaxBackward", "max"),
    ("MinBackward", "min"),
    ("AmaxBackward", "amax"),
    ("AminBackward", "amin"),
    ("SmoothL1LossBackward", "smooth_l1_loss"),
    ("HuberLossBackward", "huber_loss"),
)


def examine(model: nn.Module, loss: torch.Tensor, params: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """Names of the operations with kinks between `params` and the loss.

    Raises DoubleBackwardError for an operation that autograd passes through without a derivative (a quantised layer, a kernel that was
    registered without one), SparseGradError where an embedding gives one of `params` a sparse gradient.
    """
    active = _between(loss, {id(p) for p in params})
    kinks: dict[str, None] = {}
    for node in active:
        name = node.name()
        if "NotImplemented" in name:
            raise DoubleBackwardError(
                f"an operation between the parameters and the loss has no derivative{_quantised(model)}: autograd would take it for a constant.\n"
                "Measure the float model before its conversion, or register a derivative for the operation (torch.library.register_autograd)."
            )
        if name.startswith("Embedding") and getattr(node, "_saved_sparse", False) and node.next_functions[0][0] in active:
            raise SparseGradError(
                f"{_sparse_module(model)} has sparse gradients, of which second derivatives do not exist in torch. Set its sparse=False."
            )
        kinks |= {word: None for beginning, word in _KINKS if name.startswith(beginning)}
    return tuple(kinks)


def quantised(model: nn.Module) -> list[str]:
    """Names of torch's quantised modules in a model."""
    found = [(name, m) for name, m in model.named_modules() if ".quantized" in type(m).__module__]
    return [name or "the model itself" for name, _ in found if not name.endswith("_packed_params")]


def _between(loss: torch.Tensor, chosen: set[int]) -> dict[Any, None]:
    """The nodes through which the loss depends on the parameters with these ids, from the parameters on."""
    users: dict[Any, list[Any]] = {loss.grad_fn: []} if loss.grad_fn is not None else {}
    pending = list(users)
    while pending:
        node = pending.pop()
        for following, _ in node.next_functions:
            if following is not None:
                if following not in users:
                    users[following] = []
                    pending.append(following)
                users[following].append(node)
    pending = [node for node in users if id(getattr(node, "variable", None)) in chosen]
    found = dict.fromkeys(pending)
    while pending:
        above = [user for user in users[pending.pop()] if user not in found]
        found |= dict.fromkeys(above)
        pending += above
    return found


def _quantised(model: nn.Module) -> str:
    names = quantised(model)
    return f", as in the quantised modules {listing(names, 3)}" if names else ""


def _sparse_module(model: nn.Module) -> str:
    names = [repr(name) for name, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    return f"the embedding {listing(names, 3)}" if names else "a call of torch.nn.functional.embedding"
