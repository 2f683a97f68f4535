"""Scores r at the network's output, and the stand-ins whose Gauss-Newton matrix is the sum of (J' r)(J' r)'.

A score is the loss's derivative by the output z, at the example's own label or at one that was drawn. S draws are averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from fastsharp.batches import count_of
from fastsharp.curvature.form import StandIn, slope
from fastsharp.errors import InputError
from fastsharp.losses import Loss, Value


class Scores(ABC):
    """The scores of a batch, S draws of them."""

    @abstractmethod
    def quadratics(self, z: Tensor) -> Tensor:
        """sum over the batch of <r, z>^2 for each draw, (S,); differentiable in z (the output's shape)."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many scores there are, all draws together."""

    @abstractmethod
    def explicit(self, z: Tensor) -> Tensor:
        """Every score by itself, (count, *z.shape): their outer products' sum over S is the metric. For checks: count times z in memory."""


@final
@dataclass(frozen=True)
class Vectors(Scores):
    """One vector an example: r (N, K, S) for an output of N examples with K numbers each; `weight` of their outer products."""

    r: Tensor
    weight: float = 1.0

    def quadratics(self, z: Tensor) -> Tensor:
        N, K, _ = self.r.shape
        found = torch.bmm(z.reshape(N, 1, K).to(self.r.dtype), self.r).square().sum((0, 1))
        return found if self.weight == 1.0 else found * self.weight

    @property
    def count(self) -> int:
        return self.r.shape[0] * self.r.shape[2]

    def explicit(self, z: Tensor) -> Tensor:
        N, K, S = self.r.shape
        scores = self.r.new_zeros(N, S, N, K)
        index = torch.arange(N, device=self.r.device)
        scores[index, :, index] = self.r.transpose(1, 2) * self.weight**0.5
        return scores.reshape(N * S, *z.shape)


@final
@dataclass(frozen=True)
class Classes(Scores):
    """One class a row of logits: r = p - e_label with weights for the outer products.

    p       (*rows, C) probabilities, the classes last, which lie in dimension `dim` of the output
    label   (*rows, S)
    weight  (*rows, 1), 0 where the row is ignored
    """

    p: Tensor
    label: Tensor
    weight: Tensor
    dim: int

    def quadratics(self, z: Tensor) -> Tensor:
        z = z.to(self.p.dtype).movedim(self.dim, -1)
        off = (self.p * z).sum(-1, keepdim=True) - z.gather(-1, self.label)  # <r, z>, no row of r is ever formed
        return (self.weight * off * off).reshape(-1, self.label.shape[-1]).sum(0)

    @property
    def count(self) -> int:
        return int((self.weight != 0).sum()) * self.label.shape[-1]

    def explicit(self, z: Tensor) -> Tensor:
        rows = (self.weight != 0).reshape(-1).nonzero()[:, 0]
        p, label, weight = (t.reshape(-1, t.shape[-1]) for t in (self.p, self.label, self.weight))
        C, S = p.shape[1], label.shape[1]
        scores = p.new_zeros(len(rows), S, len(p), C)
        at = torch.arange(len(rows), device=p.device)
        one_hot = torch.nn.functional.one_hot(label[rows], C).to(p.dtype)
        scores[at, :, rows] = (p[rows].unsqueeze(1) - one_hot) * weight[rows].sqrt().unsqueeze(2)
        return scores.reshape(len(rows) * S, *self.p.shape).movedim(-1, self.dim + 1 if self.dim >= 0 else self.dim)


@final
@dataclass(frozen=True)
class OuterProducts(StandIn):
    """s(z) = sum <r, z>^2 / 2, averaged over draws; `scores` makes the r of an evaluation."""

    scores: Callable[[Value, Tensor, Any, Loss, int], Scores]

    def constants(self, value: Value, output: Tensor, batch: Any, loss: Loss, seed: int) -> Scores:
        return self.scores(value, output, batch, loss, seed)

    def at(self, output: Tensor, constants: Scores) -> Tensor:
        return constants.quadratics(output).mean() * 0.5


def own_scores(value: Value, output: Tensor, batch: Any, loss: Loss, seed: int) -> Scores:
    """The derivatives of the examples' own losses: row i of `scale dL/dz`, since no other example's loss depends on z_i.

    The batch's products are multiplied by its scale once more, so that the outer products here carry it once.
    """
    check_rows(output, batch)
    return Vectors(slope(value, output).reshape(len(output), -1, 1), value.scale)


def check_rows(output: Tensor, batch: Any) -> None:
    """InputError where the output's first dimension does not count the examples."""
    examples = count_of(batch)
    if output.ndim == 0 or len(output) != examples:
        raise InputError(
            f"gradients of single examples: the output has shape {tuple(output.shape)}, the batch {examples} examples.\n"
            "Let the model return one row for each example, (examples, ...)."
        )
