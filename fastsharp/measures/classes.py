"""What a cross-entropy sees of a batch: one row of logits, one label and one weight for each label that counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastsharp.batches import count_of
from fastsharp.errors import InputError, LabelShapeError, OutputFormatError
from fastsharp.losses import BatchLoss, CrossEntropy, Loss, Value, cross_entropy_of, split

_AGREES = 1e-5  # relative: how closely the cross-entropy of .logits must give the loss that the model computed itself


@dataclass(frozen=True)
class Units:
    """The labels of a batch that count: one a sample, or one a token.

    rows      (u,) place of each unit among the rows of the flattened output (..., C)
    logits    (u, C), with the graph of the evaluation
    labels    (u,) int64
    weights   (u,) class weights, ones where the loss has none
    owners    (u,) number of the unit's example in the batch
    """

    rows: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    owners: torch.Tensor

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """The units' rows of flat (all rows, ...); flat itself where every row counts."""
        return flat if self.rows.numel() == flat.shape[0] else flat[self.rows]

    def losses(self, smoothing: float = 0.0) -> torch.Tensor:
        """(u,) cross-entropy of each unit, without its weight."""
        return F.cross_entropy(self.logits, self.labels, reduction="none", label_smoothing=smoothing)

    def slopes(self, tangents: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """<dl_u/df_u, t_u> for rows t (u, C): sum_c p_c (t_c - t_y), which keeps its digits where p_y is close to 1."""
        away = tangents - tangents.gather(1, self.labels[:, None])
        slope = (self.logits.softmax(1) * away).sum(1)
        return slope - smoothing * away.mean(1) if smoothing else slope


def needs_cross_entropy(loss: Loss, what: str, instead: str) -> CrossEntropy:
    """The options of the loss; InputError where it is none, which says what needs one and what to do instead."""
    options = cross_entropy_of(loss.loss_fn)
    if options is None:
        name = "a batch_loss" if isinstance(loss.loss_fn, BatchLoss) else getattr(loss.loss_fn, "__name__", type(loss.loss_fn).__name__)
        raise InputError(f"{what} needs the cross-entropy of logits with class labels, the loss is {name}.\n{instead}")
    return options


def output_tensor(value: Value, what: str) -> torch.Tensor:
    """The output that the loss was computed from: a tensor, or something with .logits."""
    output = value.output
    if output is None:
        raise InputError(f"{what} looks at the samples of a batch, which a batch_loss does not show.\nPass loss_fn(output, target).")
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        many = f" with {len(output)} parts (several heads)" if isinstance(output, (tuple, list, Mapping)) else ""
        raise OutputFormatError(
            f"{what}: the output is a {type(output).__name__}{many}, expected one tensor or something with .logits.\n"
            "Wrap the model so that it returns the logits of one head."
        )
    return logits


def own_loss(output: Any) -> bool:
    """Whether the model computed a loss itself."""
    if isinstance(output, torch.Tensor):
        return False
    return (output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)) is not None


def units_of(value: Value, batch: Any, options: CrossEntropy, what: str) -> Units:
    """The units of a batch after its evaluation."""
    logits = output_tensor(value, what)
    _, _, target = split(batch, keep_target=True)
    _check_labels(logits, target, what)
    flat, labels = (
        _own_layout(value, logits, target, what) if own_loss(value.output) else (logits.movedim(1, -1).flatten(0, -2), target.flatten())
    )
    rows = (labels != options.ignore_index).nonzero().flatten()
    labels = labels[rows]
    weights = logits.new_ones(rows.numel()) if options.weight is None else options.weight.to(logits)[labels]
    per_example = max(1, target.numel() // count_of(batch))
    return Units(rows, flat[rows], labels, weights, rows // per_example)


def _check_labels(logits: torch.Tensor, target: Any, what: str) -> None:
    if not isinstance(target, torch.Tensor):
        raise InputError(f"{what} needs class labels: the batch has none. Yield (x, y) with integer labels y.")
    if logits.ndim < 2:
        raise OutputFormatError(
            f"{what}: the output has shape {tuple(logits.shape)}, expected (N, classes, ...). Return one logit a class."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        if target.shape == logits.shape:
            raise LabelShapeError(
                f"{what}: the labels are one-hot, {target.dtype} {tuple(target.shape)}. Pass class indices, target.argmax(1)."
            )
        raise LabelShapeError(
            f"{what}: the target is {target.dtype} {tuple(target.shape)}, as in a regression. It needs integer class labels."
        )
    if target.shape == logits.shape and target.ndim == 2:
        raise LabelShapeError(
            f"{what}: the labels are one-hot, {target.dtype} {tuple(target.shape)}. Pass class indices, target.argmax(1)."
        )


def _own_layout(value: Value, logits: torch.Tensor, labels: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and labels of a model that computed its loss itself: the layout under which the cross-entropy of .logits gives that loss.

    Of two the closer one, since before training every layout gives nearly log C.
    """
    flat = logits.flatten(0, -2)
    layouts = [labels.flatten()] if labels.numel() == flat.shape[0] else []
    if layouts and labels.ndim == 2:  # position t predicts label t + 1; the last predicts none
        layouts.append(F.pad(labels[:, 1:], (0, 1), value=-100).flatten())
    own = float(value.loss.detach())
    found = [(abs(float(F.cross_entropy(flat.detach(), shifted)) - own), shifted) for shifted in layouts if _inside(shifted, flat.shape[1])]
    if found:
        off, labels = min(found, key=lambda pair: pair[0])
        if off <= _AGREES * abs(own) or not bool((labels != -100).any()):
            return flat, labels
    raise OutputFormatError(
        f"{what}: the loss that the model computes itself is not the cross-entropy of its .logits and labels.\nPass loss_fn(output, target)."
    )


def _inside(labels: torch.Tensor, classes: int) -> bool:
    return bool(((labels == -100) | ((labels >= 0) & (labels < classes))).all())
