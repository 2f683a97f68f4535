"""The generalised Gauss-Newton matrix of a loss over data as a SymmetricOperator."""

from __future__ import annotations

from typing import final

from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import GAUSS_NEWTON


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
