"""Is a loss a sum over examples? Asked before single examples' gradients are taken off the output."""

from __future__ import annotations

import math

import torch

from fastsharp.batches import count_of, head
from fastsharp.curvature.network_output import network_output
from fastsharp.curvature.scores import check_rows
from fastsharp.errors import InputError
from fastsharp.objective import Objective

GATE = 1e-3  # of the loss: a batch against the sum of its halves
_EPS = 64.0  # of the curvature: what an example's output may do to another example's derivative


def check_additive(objective: Objective, kind: str) -> None:
    """InputError where some example's loss depends on another example's output, as in contrastive and ranking losses.

    Two signs, on the first batch of two examples: the loss's Hessian by the output, times a vector on half of the rows, reaches into the
    other half; or the batch's loss is not the sum of its halves'. Cost: three evaluations.
    """
    for index, batch in objective.batches:
        n = count_of(batch)
        if n < 2:
            continue
        with objective.quiet():
            value = objective.evaluate(index, batch)
            output = network_output(value, kind)
            check_rows(output, batch)
            leak = _reach(value.loss, output)
        gap = _gap(objective, index, batch, n)
        if leak > _EPS * torch.finfo(output.dtype).eps or gap > GATE:
            raise InputError(
                f"operator={kind!r} needs a loss that is a sum over examples, each of which sees its own data alone:\n"
                f"here one example's output changes another's derivative by {leak:.1e} of it, and a batch's loss differs from its halves' by {gap:.1e}.\n"
                "Return (sum, count) where a mean over tokens is meant; operator='hessian' and 'ggn' take losses of any kind."
            )
        return


def _reach(loss: torch.Tensor, output: torch.Tensor) -> float:
    """max |(H_L u)_i| over the rows i where u is zero, as a share of the largest entry; 0 where there is no second derivative to ask."""
    u = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(output.device, output.dtype)
    u[1::2] = 0.0
    try:
        (slope,) = torch.autograd.grad(loss, output, create_graph=True)
        if not slope.requires_grad:
            return 0.0
        (curved,) = torch.autograd.grad(slope, output, u)
    except RuntimeError:
        return 0.0
    largest, across = float(curved.abs().max()), float(curved[1::2].abs().max())
    return across / largest if largest else 0.0


def _gap(objective: Objective, index: int, batch: object, n: int) -> float:
    """|L(batch) - L(first half) - L(second half)| as a share of the losses' sizes, 0 where the batch cannot be halved."""
    parts = (head(batch, 0, n // 2), head(batch, n // 2, n))
    if any(part is None for part in parts):
        return 0.0
    with objective.quiet(), torch.no_grad():
        whole, first, second = (objective.evaluate_unchecked(index, part, masks=False) for part in (batch, *parts))
    totals = [value.scale * float(value.loss) for value in (whole, first, second)]
    size = max(abs(total) for total in totals)
    # a loss near zero is the rounding of its logits
    room = _EPS * torch.finfo(whole.loss.dtype).eps * n
    gap = abs(totals[0] - totals[1] - totals[2])
    return gap / size if math.isfinite(gap) and gap > room else 0.0
