"""The tensor z = f(x, theta) at which the Gauss-Newton matrix splits the loss into network and loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import Node

from fastsharp.batches import tensors_of
from fastsharp.errors import InputError, listing
from fastsharp.losses import BatchLoss, Value


def network_output(value: Value, kind: str = "ggn") -> torch.Tensor:
    """The output tensor that the loss was computed from: the output itself, its `.logits`, or its only floating-point tensor."""
    output = value.output
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    found = [t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
    if len(found) != 1:
        what = (
            "no output is known" if output is None else f"the output is a {type(output).__name__} with {len(found)} differentiable tensors"
        )
        raise InputError(
            f"operator={kind!r} splits the loss at the network's output, one tensor: {what}.\n"
            "Return one tensor (or something with .logits) and pass loss_fn(output, target)."
        )
    return found[0]


def refuse_batch_loss(loss_fn: Any, kind: str) -> None:
    """InputError for a loss that hides the network's output."""
    if isinstance(loss_fn, BatchLoss):
        raise InputError(
            f"operator={kind!r} splits the loss at the network's output, which a batch_loss does not show.\n"
            "Pass loss_fn(output, target), or use operator='hessian'."
        )


def check_separable(
    loss: torch.Tensor, output: torch.Tensor, params: Sequence[torch.Tensor], names: Sequence[str], kind: str = "ggn"
) -> None:
    """InputError where the loss reaches parameters other than through `output`: its second derivative has then terms that J' H_L J lacks."""
    wanted = {id(p): name for p, name in zip(params, names, strict=True)}
    beside = [wanted[key] for key in _leaves(loss.grad_fn, output.grad_fn) if key in wanted]
    if beside:
        raise InputError(
            f"operator={kind!r}: the loss depends on {listing(beside, 4)} not only through the network's output,\n"
            "as a penalty on the weights or a loss of an inner layer does. Leave that term out, or use operator='hessian'."
        )


def _leaves(start: Node | None, stop: Node | None) -> Iterator[int]:
    """Identities of the leaf tensors reached from `start` without passing through `stop`."""
    seen: set[Any] = {None, stop}
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor):
            yield id(variable)
        stack.extend(following for following, _ in node.next_functions)  # type: ignore[union-attr]
