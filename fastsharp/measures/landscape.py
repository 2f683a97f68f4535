"""L(theta + delta) beside L(theta): the same frozen batches on both sides, so that nothing but the weights differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastsharp.batches import count_of, head
from fastsharp.errors import BatchFormatError, InputError, ModelModeError, NondeterministicOperatorError, NonFiniteError
from fastsharp.objective import Objective
from fastsharp.swap import with_weights

_STACK_PARAMETERS = 300_000  # on a CPU; above, one net's products fill the cores and stacking saves nothing
_STACK_ELEMENTS = 1 << 22  # stacked weights of one pass
_STACK = 32
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_REPEAT = 64.0  # units of eps by which two evaluations with the same weights may differ on a GPU

Part = tuple[Any, Any]  # (key, batch)


class Landscape:
    """The loss around the weights at which its objective was recorded.

    changes(deltas)    L(theta + delta_k) - L(theta) for rows delta_k: batch by batch, in float64
    ascent(delta)      the change and its gradient
    passes             evaluations of the whole data so far, a gradient counted as three
    stacked            whether several weights are evaluated together (`torch.func.vmap` over stacked weights)
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.theta = torch.cat([p.detach().reshape(-1) for p in objective.selection.params])
        self.passes = 0.0
        self.stacked = _stackable(objective)
        self._base: dict[Any, tuple[float, float, float]] = {}  # loss, scale, count by key; only where the data are frozen
        self._gradient: torch.Tensor | None = None
        self.floors: dict[int, float] = {}  # rounding of the losses by seed: several measures share one
        self._samples = float(objective.batches.count)
        self._check_repeats()

    def loss(self) -> float:
        """L(theta)."""
        total = weight = 0.0
        with self.objective.quiet():
            for key, batch in self.parts(None):
                loss, scale, count = self._at_base(key, batch)
                total, weight = total + scale * loss, weight + count
        return total / self._denominator(weight)

    def parts(self, m: int | None) -> Iterator[Part]:
        """The batches, or all of them cut into pieces of m samples (the last of a batch may be smaller)."""
        for index, batch in self.objective.batches:
            if m is None:
                yield index, batch
                continue
            for start in range(0, count_of(batch), m):
                piece = head(batch, start, min(start + m, count_of(batch)))
                if piece is None:
                    raise BatchFormatError(
                        f"m={m}: batch {index} cannot be cut into samples: a tensor has no batch dimension. Leave m out."
                    )
                yield (index, start, m), piece

    def changes(self, deltas: torch.Tensor, parts: Iterable[Part] | None = None) -> torch.Tensor:
        """L(theta + delta_k) - L(theta) (K,) float64 for deltas (K, n), over all data or over `parts` of them."""
        total = torch.zeros(len(deltas), dtype=torch.float64)
        weight = samples = 0.0
        with self.objective.quiet():
            for key, batch in self.parts(None) if parts is None else parts:
                loss, scale, count = self._at_base(key, batch)
                if scale:
                    total += scale * (self._losses(deltas, key, batch) - loss)
                weight, samples = weight + count, samples + count_of(batch)
        self.passes += len(deltas) * samples / self._samples
        return total / self._denominator(weight)

    def ascent(self, delta: torch.Tensor, parts: Iterable[Part] | None = None) -> tuple[float, torch.Tensor]:
        """(L(theta + delta) - L(theta), gradient of L at theta + delta (n,)) over all data or over `parts` of them."""
        total = weight = samples = 0.0
        gradient = torch.zeros_like(self.theta)
        with self.objective.quiet():
            for key, batch in self.parts(None) if parts is None else parts:
                loss, scale, count = self._at_base(key, batch)
                leaves = [part.detach().requires_grad_() for part in self._views(self.theta + delta)]
                value = self._loss(leaves, key, batch)
                grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
                gradient.add_(torch.cat([g.reshape(-1) for g in grads]), alpha=scale)
                total += scale * (self._finite(value.detach()[None])[0].item() - loss)
                weight, samples = weight + count, samples + count_of(batch)
        self.passes += 3 * samples / self._samples
        denominator = self._denominator(weight)
        return total / denominator, gradient / denominator

    def gradient(self) -> torch.Tensor:
        """The gradient of L at theta (n,), computed once."""
        if self._gradient is None:
            self._gradient = self.ascent(torch.zeros_like(self.theta))[1]
        return self._gradient

    def weight(self, part: Part) -> float:
        """The share's denominator of a part: what its loss is a mean over."""
        with self.objective.quiet():
            return self._at_base(*part)[2]

    def _denominator(self, weight: float) -> float:
        if self.objective.reduction == "sum":
            return 1.0
        if not 0.0 < weight < float("inf"):
            raise InputError(
                f"the counts of the loss add up to {weight:g}, so that its mean is not defined. Check for labels that are all ignored."
            )
        return weight

    def _at_base(self, key: Any, batch: Any) -> tuple[float, float, float]:
        """(loss, scale, count) of a batch at theta. A stream may form other batches in each pass, so nothing of it is remembered."""
        if key in self._base:
            return self._base[key]
        with torch.no_grad():  # reading a stream switches gradients back on
            value = self.objective.evaluate_unchecked(key, batch)
        found = (self._finite(value.loss[None])[0].item(), value.scale, value.count or 0.0)
        if not self.objective.batches.streamed:
            self._base[key] = found
        return found

    def _losses(self, deltas: torch.Tensor, key: Any, batch: Any) -> torch.Tensor:
        """The batch's loss (K,) float64 at theta + delta_k."""
        if self.stacked and len(deltas) > 1:
            try:
                with torch.no_grad():
                    return self._finite(self._together(deltas, key, batch))
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                self.stacked = False  # a model that asks for numbers on its way, or an op without a batching rule
        with torch.no_grad():
            each = [self._loss(self._views(self.theta + delta), key, batch) for delta in deltas]
        return self._finite(torch.stack(each))

    def _together(self, deltas: torch.Tensor, key: Any, batch: Any) -> torch.Tensor:
        size = max(1, min(_STACK, _STACK_ELEMENTS // max(len(self.theta), 1)))
        one: Callable[[torch.Tensor], torch.Tensor] = lambda w: self._loss(self._views(w), key, batch)  # noqa: E731
        return torch.cat([torch.func.vmap(one)(self.theta + rows) for rows in deltas.split(size)])  # type: ignore[no-untyped-call]

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return self.objective.selection.layout.views(flat)

    def _loss(self, weights: list[torch.Tensor], key: Any, batch: Any) -> torch.Tensor:
        named = dict(zip(self.objective.selection.layout.names, weights, strict=True))
        return with_weights(self.objective.model, named, lambda: self.objective.evaluate_unchecked(key, batch).loss)

    def _finite(self, losses: torch.Tensor) -> torch.Tensor:
        losses = losses.double().cpu()
        if not bool(torch.isfinite(losses).all()):
            raise NonFiniteError(
                f"a loss near the weights is {float(losses[~torch.isfinite(losses)][0])}: the step leaves the region where the loss is finite.\n"
                "Take a smaller rho, or check the data for NaN with fastsharp.lanczos."
            )
        return losses

    def _check_repeats(self) -> None:
        """The same weights must give the same loss, or differences measure the model's own randomness."""
        first = self.objective.batches.first()
        with self.objective.quiet(), torch.no_grad():
            a, b = (self.objective.evaluate_unchecked(0, first).loss.double() for _ in range(2))
        room = 0.0 if a.device.type == "cpu" else _REPEAT * torch.finfo(self.objective.dtype).eps * float(a.abs())
        if float((a - b).abs()) > room:
            raise NondeterministicOperatorError(
                f"two evaluations with the same weights give the losses {float(a):.9g} and {float(b):.9g}: the model or loss is random.\n"
                "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
            )


def check_m(objective: Objective, m: int | None) -> None:
    """Pieces of a batch are functions of their own only where its samples do not share statistics, masks or a loss of the whole batch."""
    if m is None:
        return
    if objective.modes.by_batch():
        raise ModelModeError("m=: frozen batch statistics and masks belong to whole batches. Choose bn='eval' and dropout='eval'.")
    if not objective.loss.additive:
        raise InputError("m=: a loss of the whole batch has no value for a part of it. Leave m out, or pass loss_fn(output, target).")


def _stackable(objective: Objective) -> bool:
    """Whether weights of several points are worth evaluating together: small nets on a CPU, all but recurrent ones on a GPU."""
    modules = list(objective.model.modules())
    if any(isinstance(m, nn.RNNBase) for m in modules):
        return False
    if objective.device.type != "cpu":
        return True
    return objective.selection.layout.n <= _STACK_PARAMETERS and not any(isinstance(m, _CONV) for m in modules)
