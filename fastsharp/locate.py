"""Find where a NaN or Inf came from: the batch itself, else the first module whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastsharp.batches import tensors_of
from fastsharp.errors import NonFiniteError


def non_finite_loss(model: nn.Module, index: Any, batch: Any, loss: float, evaluate: Callable[[], Any]) -> NonFiniteError:
    """The error for a loss that is not finite on batch `index`, with its origin; `evaluate` repeats the forward pass."""
    return NonFiniteError(f"the loss of batch {index} is {loss}: {_in_batch(batch) or _in_modules(model, evaluate)}.\n{_ADVICE}")


def non_finite_gradient(names: list[str], index: Any, batch: Any) -> NonFiniteError:
    """The error for a gradient that is not finite on batch `index` in the rows `names`, though the loss is."""
    cause = _in_batch(batch) or "a square root, norm or division at zero has no derivative; add a small constant inside it"
    return NonFiniteError(
        f"the gradient of batch {index} has NaN or Inf in {', '.join(names[:4])}, though the loss is finite:\n{cause}.\n{_ADVICE}"
    )


_ADVICE = "Look at that sample or module; drop bad samples from the data, or load a checkpoint from before the divergence."


def _in_batch(batch: Any) -> str | None:
    for i, t in enumerate(tensors_of(batch)):
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            where = tuple(int(v) for v in (~torch.isfinite(t)).nonzero()[0]) if t.ndim else ()
            return f"tensor {i} of the batch holds {float(t[where])} at {where}" + (f", sample {where[0]}" if where else "")
    return None


def _in_modules(model: nn.Module, evaluate: Callable[[], Any]) -> str:
    first: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not first and any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors_of(output)):
                first.append(f"{name or 'the model itself'} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    return (
        f"the first non-finite output is that of module {first[0]}"
        if first
        else "every module's output is finite, so it arises in the loss"
    )
