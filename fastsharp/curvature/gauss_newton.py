"""The generalised Gauss-Newton matrix of a loss over data as a SymmetricOperator."""

from __future__ import annotations

from typing import Any, final

from torch import nn

from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import GAUSS_NEWTON
from fastsharp.errors import InputError
from fastsharp.losses import BatchLoss
from fastsharp.params import Selector


@final
class GGN(FiniteSum):
    """G = weighted mean (or sum) of J' H_L J over frozen data: J = d output / d theta, H_L = d^2 loss / d output^2.

    The Hessian without the second derivatives of the network. Where the loss is convex in the output (cross-entropy, squared error),
    G is positive semidefinite, and for cross-entropy it is the Fisher matrix; elsewhere it is J' H_L J all the same.
    The output is the tensor that `loss_fn(output, target)` gets, or the model's `.logits`. InputError where there is none: a
    `batch_loss`, several output tensors, or a loss that depends on the parameters in another way as well (a penalty).
    Arguments, methods and errors are those of `fastsharp.Hessian`. Cost: 4U a vector where a batch's graph is kept.
    """

    form = GAUSS_NEWTON
    label = "the Gauss-Newton matrix"

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Any = None,
        *,
        params: Selector = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        backend: str = "auto",
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        refuse_batch_loss(loss_fn, self.kind)
        super().__init__(
            model,
            loader,
            loss_fn,
            params=params,
            reduction=reduction,
            bn=bn,
            dropout=dropout,
            backend=backend,
            memory=memory,
            seed=seed,
        )


def refuse_batch_loss(loss_fn: Any, kind: str) -> None:
    """InputError for a loss that hides the network's output."""
    if isinstance(loss_fn, BatchLoss):
        raise InputError(
            f"operator={kind!r} splits the loss at the network's output, which a batch_loss does not show.\n"
            "Pass loss_fn(output, target), or use operator='hessian'."
        )
