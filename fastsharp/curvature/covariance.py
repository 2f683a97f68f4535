"""The covariance of single examples' gradients as a SymmetricOperator."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import nn

from fastsharp.curvature.examples import check_additive
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import Form
from fastsharp.curvature.scores import OuterProducts, own_scores
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.params import Selector


@final
class GradientCovariance(FiniteSum):
    """C = 1/(N - ddof) sum_i (g_i - g)(g_i - g)', g_i the gradient of example i's loss and g their mean, the gradient of L.

    Examples, g_i and N are those of the empirical Fisher matrix E, see `fastsharp.Fisher`: C = N/(N - ddof) (E - g g'). For reduction
    "sum", where L = sum_i l_i, it is N times that of the mean.
    ddof  0 (the mean over the data as they are) or 1 (the unbiased estimate from a sample of a population)

    g is computed in the first product, 3U, and kept in the parameters' dtype. Cost: 4U a vector. E - g g' is a difference: rounding is
    eps ||E||, which shows where the examples' gradients hardly differ.
    Arguments, methods and errors are those of `fastsharp.GGN`. Raises InputError where the loss is no sum over examples.
    """

    form = Form("gradient-covariance", True, OuterProducts(own_scores))
    label = "the covariance of gradients"
    by_sample = False

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Any = None,
        *,
        ddof: int = 0,
        params: Selector = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        backend: str = "auto",
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        if isinstance(ddof, bool) or not isinstance(ddof, int):
            raise ArgumentTypeError(f"GradientCovariance: ddof is a {type(ddof).__name__}, expected 0 or 1.")
        if ddof not in (0, 1):
            raise InputError(f"GradientCovariance: ddof is {ddof}, expected 0 or 1.")
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
        if self.objective.batches.count <= ddof:
            raise InputError(f"GradientCovariance: {self.objective.batches.count} example has no covariance with ddof={ddof}. Use ddof=0.")
        check_additive(self.objective, self.kind)
        self.ddof = ddof

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "ddof": self.ddof}

    def divisor(self, counts: float) -> float:
        N = self.objective.batches.count
        mean = 1.0 if self.objective.reduction == "sum" else counts * counts / N
        return mean * (N - self.ddof) / N

    def _reset(self) -> None:
        super()._reset()
        self._mean: torch.Tensor | None = None

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        super()._apply(V, out)
        if self._mean is None:
            self._mean = self._mean_gradient()
        N, g = self.objective.batches.count, self._mean
        share = N / (N - self.ddof) / (N if self.objective.reduction == "sum" else 1)
        with torch.inference_mode(out.is_inference()), torch.no_grad():
            out.addr_(V @ g, g, alpha=-share)

    def _mean_gradient(self) -> torch.Tensor:
        """The gradient of L (n,), summed over batches in float64."""
        objective = self.objective
        params = objective.selection.params
        total, counts = torch.zeros(self.n, dtype=torch.float64, device=self.device), 0.0
        with torch.inference_mode(False), objective.quiet():
            for index, batch in objective.batches:
                value = objective.evaluate(index, batch)
                grads = torch.autograd.grad(value.loss, params, allow_unused=True, materialize_grads=True)
                total += value.scale * torch.cat([g.reshape(-1) for g in grads]).double()
                counts += value.count or 0.0
        return (total if objective.reduction == "sum" else total / counts).to(self.dtype)
