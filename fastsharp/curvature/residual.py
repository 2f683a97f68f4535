"""The Hessian without its Gauss-Newton part as a SymmetricOperator."""

from __future__ import annotations

from typing import Any, final

import torch

from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import Form, StandIn, slope
from fastsharp.losses import Loss, Value


@final
class _Slope(StandIn):
    """s(z) = <dL/dz, z>, with dL/dz as it is at the weights."""

    def constants(self, value: Value, output: torch.Tensor, batch: Any, loss: Loss, seed: int) -> torch.Tensor:
        return slope(value, output)

    def at(self, output: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        return (output.to(constants.dtype) * constants).sum()


@final
class Residual(FiniteSum):
    """R = H - G = sum_k (dL/dz_k) d^2 z_k / dtheta^2, the part of the Hessian that the network's own second derivatives make.

    G = J' H_L J is `fastsharp.GGN`, z the network's output. R is computed as the Hessian of <dL/dz, z> with dL/dz held, and not as a
    difference: what is small stays exact. It vanishes where the network is linear in the chosen parameters, and as the loss's slopes do.
    Arguments, methods and errors are those of `fastsharp.GGN`. Cost: 6U a vector, as a Hessian's product.
    Source: Papyan 2019, "Measurements of three-level hierarchical structure in the outliers in the spectrum of deepnet Hessians".
    """

    form = Form("residual", stand_in=_Slope())
    label = "the Hessian without its Gauss-Newton part"
