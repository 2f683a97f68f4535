"""Losses as `loss_fn(model, batch)`; the operators of this package see through them to the criterion, for fastsharp's own checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class SupervisedLoss:
    """criterion(model(x), y) of a batch (x, y)."""

    criterion: Callable[..., torch.Tensor]

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return self.criterion(model(x), y)


@dataclass(frozen=True)
class SupervisedLossOfOutput:
    """criterion(output, y) of a batch (x, y)."""

    criterion: Callable[..., torch.Tensor]

    def __call__(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        _, y = batch
        return self.criterion(output, y)


@dataclass(frozen=True)
class OwnLoss:
    """The `.loss` that a Hugging Face model returns for a dict batch with labels."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss


def supervised_loss(criterion: Callable[..., torch.Tensor]) -> SupervisedLoss:
    """loss_fn(model, batch) of batches (x, y)."""
    return SupervisedLoss(criterion)


def supervised_forward(model: nn.Module, batch: Any) -> torch.Tensor:
    """forward_fn of GGNOperator for batches (x, y)."""
    x, _ = batch
    output: torch.Tensor = model(x)
    return output


def supervised_loss_of_output(criterion: Callable[..., torch.Tensor]) -> SupervisedLossOfOutput:
    """loss_of_output_fn of GGNOperator for batches (x, y)."""
    return SupervisedLossOfOutput(criterion)


def hf_lm_loss() -> OwnLoss:
    """loss_fn of a causal language model with labels in the batch."""
    return OwnLoss()


def hf_seq2seq_loss() -> OwnLoss:
    """loss_fn of an encoder-decoder model with labels in the batch."""
    return OwnLoss()


def hf_lm_forward() -> Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]:
    """forward_fn of a causal language model: its logits."""

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits

    return forward


def hf_lm_loss_of_output() -> Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]:
    """loss_of_output_fn of a causal language model: cross-entropy of each token from those before it, labels of -100 left out."""

    def loss(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), batch["labels"][..., 1:].flatten())

    return loss
