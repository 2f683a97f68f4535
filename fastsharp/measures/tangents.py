"""Tangents of a batch's output along a direction in the parameters: J u in one forward pass, for all samples at once.

Forward-mode derivatives of torch where every call of the model has one; else J u as the derivative of v -> <J'v, u>, two reverse passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from fastsharp.errors import DisconnectedLossError
from fastsharp.losses import Value
from fastsharp.measures.classes import output_tensor, own_loss
from fastsharp.objective import Objective

_REFUSALS = ("forward AD", "forward-mode", "Jacobian-vector product", "jvp")


@dataclass(frozen=True)
class Tangent:
    """A batch's evaluation and its derivative along u.

    value    the evaluation; its output and loss carry no tangents any more
    output   (...) J u, in the shape of the output tensor
    loss     d loss_b along u, of the loss as it was returned
    slope    d loss_b / d output in that shape, where asked for
    """

    value: Value
    output: torch.Tensor
    loss: float
    slope: torch.Tensor | None


class TangentPass:
    """J u of batches; remembers from the first refusal on that the model has no forward-mode derivative."""

    def __init__(self, objective: Objective, direction: Sequence[torch.Tensor]) -> None:
        self._objective = objective
        self._direction = [t.detach() for t in direction]
        self.reverse = any(isinstance(m, nn.RNNBase) for m in objective.model.modules())  # they hold their weights a second time

    def __call__(self, index: int, batch: Any, *, slope: bool, what: str) -> Tangent:
        """Call inside `objective.quiet()`; `slope` asks for the gradient of the loss at the output too."""
        if not self.reverse:
            try:
                return self._forward(index, batch, slope, what)
            except (NotImplementedError, RuntimeError) as e:
                if not any(word in str(e) for word in _REFUSALS):
                    raise
                self.reverse = True
        return self._backward(index, batch, slope, what)

    def _forward(self, index: int, batch: Any, slope: bool, what: str) -> Tangent:
        params = self._objective.selection.params
        with warnings.catch_warnings(), forward_ad.dual_level(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch.jit, on the first forward derivative
            duals = [forward_ad.make_dual(p.detach(), t) for p, t in zip(params, self._direction, strict=True)]  # type: ignore[no-untyped-call]
            with _swapped(self._objective.model, params, duals):
                value = self._objective.evaluate_unchecked(index, batch)
            output = output_tensor(value, what)
            loss, out = unpacked(value.loss), unpacked(output)
            along = torch.zeros_like(out.primal) if out.tangent is None else out.tangent.detach().clone()
            total = 0.0 if loss.tangent is None else float(loss.tangent.detach())
            bare = _without_graph(value, loss.primal, out.primal)
        gradient = None
        if slope:  # by an evaluation of its own: torch's reverse pass through duals fails for some losses
            again = self._objective.evaluate(index, batch)
            gradient = _slope(again.loss, output_tensor(again, what))
        return Tangent(bare, along, total, gradient)

    def _backward(self, index: int, batch: Any, slope: bool, what: str) -> Tangent:
        params = self._objective.selection.params
        value = self._objective.evaluate(index, batch)
        output = output_tensor(value, what)
        v = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, params, v, create_graph=True, allow_unused=True)
        inner = [(g * t).sum() for g, t in zip(pulled, self._direction, strict=True) if g is not None]
        along = torch.autograd.grad(sum(inner), v)[0] if inner else torch.zeros_like(output)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(value.loss, params, retain_graph=True, allow_unused=True)
        total = sum(float((g * t).sum()) for g, t in zip(gradients, self._direction, strict=True) if g is not None)
        bare = _without_graph(value, value.loss, output)
        return Tangent(bare, along.detach(), total, _slope(value.loss, output) if slope else None)


def _without_graph(value: Value, loss: torch.Tensor, output: torch.Tensor) -> Value:
    """The evaluation with its loss and output tensor as plain numbers."""
    logits, plain = output.detach(), loss.detach()
    kept = logits if isinstance(value.output, torch.Tensor) else {"logits": logits, "loss": plain if own_loss(value.output) else None}
    return replace(value, loss=plain, output=kept)


def _slope(loss: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if not output.requires_grad:
        raise DisconnectedLossError(
            "the model's output has no path to any parameter. Remove .detach() or torch.no_grad() from its forward pass."
        )
    (gradient,) = torch.autograd.grad(loss, output, allow_unused=True)
    return torch.zeros_like(output) if gradient is None else gradient.detach()


def unpacked(t: torch.Tensor) -> forward_ad.UnpackedDualTensor:
    """t without its tangent, and the tangent, None where there is none."""
    return forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call,no-any-return]


@contextmanager
def _swapped(model: nn.Module, params: Sequence[torch.Tensor], duals: Sequence[torch.Tensor]) -> Iterator[None]:
    """The model with `duals` in place of `params`, wherever a module holds one."""
    by_id = {id(p): d for p, d in zip(params, duals, strict=True)}
    held = [(m._parameters, name, p) for m in model.modules() for name, p in m._parameters.items() if id(p) in by_id]
    try:
        for holder, name, p in held:
            holder[name] = by_id[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for holder, name, p in held:
            holder[name] = p
