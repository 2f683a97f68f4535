"""Tangents of a batch's output along a direction in the parameters: J u in one forward pass, for all samples at once.

Forward-mode derivatives of torch where every call of the model has one; else J u as the derivative of v -> <J'v, u>, two reverse passes.
The first batch's forward-mode derivative of the loss is compared with <grad loss, u>, so that a call whose forward mode is wrong (one's own
autograd.Function, a bug of torch) shows: two reverse passes are taken then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from fastsharp.errors import DisconnectedLossError
from fastsharp.losses import Value
from fastsharp.measures.classes import output_tensor, own_loss
from fastsharp.objective import Objective

Recording = Callable[[], AbstractContextManager[None]]

_AGREES = 1e-3  # relative, beside 64 eps of the terms that cancel
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
    """J u of batches; `reason` says why two reverse passes are taken, from the first refusal on, None while forward mode does."""

    def __init__(self, objective: Objective, direction: Sequence[torch.Tensor]) -> None:
        self._objective = objective
        self._direction = [t.detach() for t in direction]
        recurrent = any(isinstance(m, nn.RNNBase) for m in objective.model.modules())
        self.reason = "recurrent layers hold their weights a second time" if recurrent else None
        self._compared = False

    def __call__(self, index: int, batch: Any, *, slope: bool, recording: Recording, what: str) -> Tangent:
        """Call inside `objective.quiet()`.

        slope       the gradient of the loss at the output as well
        recording   entered around the one evaluation whose value is returned, not around those that check it
        """
        if self.reason is None:
            try:
                found = self._forward(index, batch, slope, recording, what)
                if self._compared or self._agrees(found, index, batch):
                    self._compared = True
                    return found
                self.reason = "its forward-mode derivative is not that of its gradient"
            except (NotImplementedError, RuntimeError) as e:
                if not any(word in str(e) for word in _REFUSALS):
                    raise
                self.reason = "it has a call without forward-mode derivative"
        return self._backward(index, batch, slope, recording, what)

    def _forward(self, index: int, batch: Any, slope: bool, recording: Recording, what: str) -> Tangent:
        params = self._objective.selection.params
        with warnings.catch_warnings(), forward_ad.dual_level(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch.jit, on the first forward derivative
            duals = [forward_ad.make_dual(p.detach(), t) for p, t in zip(params, self._direction, strict=True)]  # type: ignore[no-untyped-call]
            with recording(), _swapped(self._objective.model, params, duals):
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

    def _agrees(self, found: Tangent, index: int, batch: Any) -> bool:
        """Whether the loss has the derivative along u that its gradient says."""
        gradients = self._gradients(self._objective.evaluate(index, batch).loss)
        parts = [(g * t).double() for g, t in gradients]
        total, size = sum(float(p.sum()) for p in parts), sum(float(p.abs().sum()) for p in parts)
        return abs(total - found.loss) <= _AGREES * abs(total) + 64 * torch.finfo(found.output.dtype).eps * size

    def _gradients(self, loss: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(gradient, direction) of each parameter that the loss reaches."""
        found = torch.autograd.grad(loss, self._objective.selection.params, retain_graph=True, allow_unused=True)
        return [(g, t) for g, t in zip(found, self._direction, strict=True) if g is not None]

    def _backward(self, index: int, batch: Any, slope: bool, recording: Recording, what: str) -> Tangent:
        params = self._objective.selection.params
        with recording():
            value = self._objective.evaluate(index, batch)
        output = output_tensor(value, what)
        v = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, params, v, create_graph=True, allow_unused=True)
        inner = [(g * t).sum() for g, t in zip(pulled, self._direction, strict=True) if g is not None]
        along = torch.autograd.grad(sum(inner), v)[0] if inner else torch.zeros_like(output)  # type: ignore[arg-type]
        total = sum(float((g * t).sum()) for g, t in self._gradients(value.loss))
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
