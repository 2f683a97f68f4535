"""Are the products of a Fisher matrix those of its definition? Computed a second way in float64 on a few samples.

Note on numerical properties. Two ways to one matrix differ by rounding: in float64 by 1e-15 of ||Av|| on healthy networks. A score r = p - y of a
confident network cancels, and carries eps |z| / |r| whichever way it is computed, which the gate allows for.
  empirical Fisher, covariance   sum_i g_i <g_i, v> with g_i from example i alone: it differs as well where examples are coupled, in the
                                 loss or in the model
  Monte-Carlo Fisher             J' (sum of r <r, J v>) over scores that are written out one by one
  residual                       Hv - Gv, against ||Hv|| + ||Gv||
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.curvature.autograd import GaussNewtonGraph
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import GAUSS_NEWTON, HESSIAN, slope
from fastsharp.curvature.network_output import network_output
from fastsharp.curvature.scores import OuterProducts, own_scores
from fastsharp.difference import DoubleGradient, relative_error
from fastsharp.errors import EngineError, InputError

GATE = 1e-8  # of ||Av||
LARGEST_GATE = 1e-2
_CANCELLED = 1e4  # eps |z| / |r|
_SAMPLES = 32
_MOST = 1 << 24  # numbers of the scores that are written out


def check_scores(operator: FiniteSum, double: DoubleGradient | str, generator: torch.Generator) -> dict[str, Any]:
    """{"reference": the relative difference for one random v}, or why there is no such number; nothing for the loss's own matrices.

    Raises InputError where examples are coupled, EngineError where the product is wrong by itself.
    """
    form = operator.form
    if form.plain:
        return {}
    if isinstance(double, str):
        return {"reference": double}
    v = torch.randn(operator.n, generator=generator, dtype=torch.float64).to(operator.device)
    v /= v.norm()
    double.limit(_SAMPLES)
    if not form.gauss:
        H, G = double.formed(HESSIAN, v), double.formed(GAUSS_NEWTON, v)
        scale = float(H.norm() + G.norm()) or 1.0
        error = float((double.exact(v) - (H - G)).norm()) / scale
        return _passed(error, GATE, EngineError, "H v - G v")
    if isinstance(form.stand_in, OuterProducts) and form.stand_in.scores is own_scores:
        if operator.objective.modes.masked() and operator.objective.modes.dropout == "fixed-masks":
            return {"reference": "not run: dropout masks of one example are not those of its batch"}
        if not double.cuttable:
            return {"reference": "not run: the batch cannot be cut into examples"}
        got, gate = _product(double, operator, v)
        return _passed(relative_error(got, _by_examples(double, v)), gate, InputError, "the sum over single examples")
    while True:
        written = _written_out(double, operator, v)
        if written is not None:
            got, gate = _product(double, operator, v)
            return _passed(relative_error(got, written), gate, EngineError, "the scores written out")
        if not double.cuttable or double.samples == 1:
            return {"reference": "not run: the scores of one example are too many to be written out"}
        double.limit(double.samples // 2)


def _product(double: DoubleGradient, operator: FiniteSum, v: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(A v with the batch's scale, the gate for it)."""
    with double.evaluation() as (value, _):
        output = network_output(value, operator.kind)
        scores, z = float(slope(value, output).abs().max()) * abs(value.scale), float(output.detach().abs().max())
    cancelled = _CANCELLED * torch.finfo(torch.float64).eps * z / scores if scores else 0.0
    return double.exact(v) * value.scale, min(GATE + cancelled, LARGEST_GATE)


def _by_examples(double: DoubleGradient, v: torch.Tensor) -> torch.Tensor:
    """sum_i g_i <g_i, v>."""
    total, count = torch.zeros_like(v), double.samples
    for i in range(count):
        double.limit(1, i)
        with double.evaluation() as (value, leaves):
            grads = torch.autograd.grad(value.loss, leaves, allow_unused=True, materialize_grads=True)
        g = torch.cat([part.reshape(-1) for part in grads]) * value.scale
        total += g * (g @ v)
    double.limit(count)
    return total


def _written_out(double: DoubleGradient, operator: FiniteSum, v: torch.Tensor) -> torch.Tensor | None:
    """J' sum r <r, J v> with the batch's scale, averaged over draws; None where the scores are too many."""
    with double.evaluation() as (value, leaves):
        output = network_output(value, operator.kind)
        scores = double.constants(operator.form, value)
        if scores.count * output.numel() > _MOST:
            return None
        R = scores.explicit(output.detach()).flatten(1)
        pushed = GaussNewtonGraph(value.loss, output, leaves).pushed(operator.layout.views(v))
        draws = len(scores.quadratics(pushed))
        pulled = (R.T @ (R @ pushed.reshape(-1)) / draws * value.scale).reshape(output.shape)
        grads = torch.autograd.grad(output, leaves, pulled, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in grads])


def _passed(error: float, gate: float, raised: type[EngineError] | type[InputError], against: str) -> dict[str, Any]:
    if error <= gate:
        return {"reference": error}
    if raised is InputError:
        raise InputError(
            f"a product misses {against} by {error:.1e} of its norm (gate {gate:.0e}): some example's gradient depends on the others.\n"
            "Look for a loss or a layer that mixes the examples of a batch; operator='hessian' and 'ggn' take those."
        )
    raise EngineError(
        f"a product misses {against} by {error:.1e} of its norm (gate {gate:.0e}).\nUse operator='ggn', and report the model."
    )
