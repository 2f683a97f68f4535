"""The preflight of an ensemble on the native kernel: every check of `fastsharp.preflight`, for all members in a handful of calls.

The first member passes the preflight of a single model. The others are plain nets like it, so that torch's own derivatives of all of
them can be taken at once: in float64, where they are compared with differences of gradients and with the kernel's products. Whatever
passes a gate here would pass it alone, since the gates are the same; whatever does not is asked by itself, by the preflight of that
one model, which looks closer (smaller steps beside kinks) and names the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastsharp.curvature import FiniteSum
from fastsharp.curvature.ensemble import MlpEnsemble
from fastsharp.curvature.mlp import agree
from fastsharp.curvature.stack_gradient import StackGradient
from fastsharp.difference import DIFFERENCE_GATE, STEP, share
from fastsharp.engine_check import OWN_GATE
from fastsharp.errors import EngineError, FastsharpError, NondeterministicOperatorError, NonFiniteError, of_member
from fastsharp.ops import mlp
from fastsharp.preflight import SYMMETRY_GATE, check_data, defects, least_curvature, outcome_notes, preflight

_PROBES = 3
_SAMPLES = 64  # of each member, in float64


def check_ensemble(together: MlpEnsemble, alone: Callable[[int], FiniteSum], *, strict_data: bool = False, seed: int = 0) -> None:
    """The checks of level "fast", whose outcome is in `together.preflight`; `alone` builds the operator of one member.

    Cost: the preflight of member 0; for all members 4 products, one more by autograd in float64, 2 gradients and a forward pass.
    Raises what `fastsharp.preflight` raises, with the member named.
    """
    with of_member(0):
        preflight(together.first, "fast", strict_data=strict_data, seed=seed)
    data = {id(together.batches[0]): together.first.preflight["data"]}
    losses = _losses(together)
    for e, measured in enumerate(_measured(together, torch.Generator().manual_seed(seed))):
        with of_member(e):
            batches = together.batches[e]
            if id(batches) not in data:
                data[id(batches)] = check_data(batches, "fast", strict_data)
            fault = _fault(together, e, measured, losses[e])
            if e == 0:
                outcome = together.first.preflight | {"engine": measured["engine"]}
            elif fault is not None or _doubtful(together, measured):
                outcome = preflight(alone(e), "fast", strict_data=strict_data, seed=seed)
            else:
                outcome = {"level": "fast", "data": data[id(batches)], **measured}
            if fault is not None:  # the member by itself has none: it is the kernel's
                raise fault
            together.preflight[e] = outcome | {"notes": outcome_notes(outcome)}


def _fault(together: MlpEnsemble, e: int, measured: dict[str, float], loss: float) -> FastsharpError | None:
    """What is wrong with the products of a member, whatever its own operator says."""
    if not math.isfinite(measured["symmetry"]):
        return NonFiniteError("a Hessian-vector product has NaN or Inf, though the loss is finite. Look for huge weights or inputs.")
    if measured["repeat"] > 0.0:
        return NondeterministicOperatorError(f"two products with the same vector differ by {measured['repeat']:.2e} of their norm.")
    if not agree(together.values[e], loss):
        return NondeterministicOperatorError(
            f"the model's loss is {loss:.6g}, and was {together.values[e]:.6g} before: the model or loss is random.\n"
            "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
        )
    if not measured["engine"] <= OWN_GATE:
        return EngineError(
            f"a product of backend='mlp' misses autograd's by {measured['engine']:.1e} of its norm (gate {OWN_GATE:.0e}).\n"
            "Use backend='autograd', and report the model."
        )
    return None


def _doubtful(together: MlpEnsemble, measured: dict[str, float]) -> bool:
    """Whether a gate was missed that rounding or kinks may miss too."""
    symmetric = measured["symmetry"] <= SYMMETRY_GATE * torch.finfo(together.dtype).eps
    return not (symmetric and measured.get("finite_difference", 0.0) <= DIFFERENCE_GATE)


def _losses(together: MlpEnsemble) -> list[float]:
    """The members' losses by their own forward passes."""
    with together.first.objective.quiet():
        return [together.loss(e) for e in range(together.E)]


def _measured(together: MlpEnsemble, generator: torch.Generator) -> list[dict[str, float]]:
    """What `fastsharp.preflight` measures, by member."""
    E, n = together.E, together.n
    V = torch.randn(_PROBES, n, generator=generator, dtype=torch.float64).to(together.dtype)
    HV = torch.stack([together.apply(v.expand(E, n)) for v in V], 1)
    again = together.apply(V[0].expand(E, n))
    columns = _against_autograd(together, V[0], HV[:, 0])
    pairs = [defects(V, HV[e], again[e]) for e in range(E)]
    columns["repeat"], columns["symmetry"] = ([pair[i] for pair in pairs] for i in range(2))
    if together.gauss:
        columns["least_curvature"] = [least_curvature(V, HV[e]) for e in range(E)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _against_autograd(together: MlpEnsemble, v: torch.Tensor, Hv: torch.Tensor) -> dict[str, list[float]]:
    """The kernel's products Hv (E, n) and torch's in float64, and these and differences of gradients, on a part of the samples."""
    stack, samples = together.stack, min(_SAMPLES, together.stack.x.shape[1])
    if samples < stack.x.shape[1]:
        parts = (t[:, :samples].contiguous() for t in (stack.x, stack.target, stack.weight))
        Hv = mlp.prepare(stack.net, stack.theta, *parts).product(v.repeat(together.E, 1), out=torch.empty_like(Hv), gauss=together.gauss)
    double = StackGradient(stack, samples)
    size = v.double().norm()
    unit, own = v.double() / size, Hv.double() / size
    exact, g = double.product(unit, gauss=together.gauss)
    rounding = _relative(own, exact)
    engine = rounding
    if bool((rounding > OWN_GATE).any()):  # kinks and cancellation: the same arithmetic tells whether it is more
        engine = torch.minimum(
            rounding, _relative(own, StackGradient(stack, samples, together.dtype).product(unit, gauss=together.gauss)[0])
        )
    columns = {"engine": engine.tolist(), "rounding": rounding.tolist()}
    if not together.gauss:
        h = STEP * double.theta.norm(dim=1).clamp_min(1.0)
        step = h[:, None] * unit
        E = (double.gradient(double.theta + step) - double.gradient(double.theta - step)).div_(2 * h[:, None]) - exact
        columns["finite_difference"] = share(E.norm(dim=1), exact.norm(dim=1), g.norm(dim=1), h).tolist()
    return columns


def _relative(own: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """||own - exact|| / ||exact|| by rows, ||own|| where exact is zero."""
    scale = exact.norm(dim=1)
    return (own - exact).norm(dim=1) / torch.where(scale > 0.0, scale, 1.0)
