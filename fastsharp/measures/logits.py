"""Cross-entropy of logits whose scale has been divided out, so that confidence does not enter a measure."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastsharp.errors import InputError
from fastsharp.losses import cross_entropy_of


class NormalisedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of f / ||f - mean(f)||: the norm is over the classes of one sample, zero logits stay zero.

    Invariant under f -> c f, c > 0. Source: Andriushchenko et al. 2023, "A modern look at the relationship between sharpness and
    generalization", section 3.
    """

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        spread = (output - output.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
        return super().forward(output / spread.clamp_min(torch.finfo(output.dtype).tiny), target)


def normalised(loss_fn: Any) -> NormalisedCrossEntropy:
    """The same cross-entropy (its ignore_index, class weights, label smoothing, reduction) of normalised logits."""
    options = cross_entropy_of(loss_fn)
    if options is None:
        raise InputError(
            "normalize_logits=True: the loss is not torch's cross-entropy, and other losses have no logits whose scale is free.\n"
            "Pass nn.CrossEntropyLoss() (or None), or leave normalize_logits out."
        )
    given = loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
    reduction = given.get("reduction", getattr(loss_fn, "reduction", "mean"))
    return NormalisedCrossEntropy(options.weight, None, options.ignore_index, None, reduction, options.label_smoothing)
