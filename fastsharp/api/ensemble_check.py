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
from fastsharp.errors import EngineError, FastsharpError, NondeterministicOperatorError, NonFiniteError, NotSymmetricError, of_member
from fastsharp.guard import random_states
from fastsharp.ops import mlp
from fastsharp.preflight import SYMMETRY_GATE, check_data, defects, least_curvature, outcome_notes, preflight

_PROBES = 3
_ONE_SIZE = 10.0
_SAMPLES = 16  # of each member, in float64
_AT_ONCE = 200_000  # entries of vectors of members together: what stays in the cache


def check_ensemble(together: MlpEnsemble, alone: Callable[[int], FiniteSum], *, strict_data: bool = False, seed: int = 0) -> None:
    """The checks of level "fast", whose outcome is in `together.preflight`; `alone` builds the operator of one member.

    Cost: the preflight of member 0; for all members 4 products and a forward pass, one product by autograd, and on 16 samples one more
    and 2 gradients in float64.
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
            loss, drew = losses[e]
            fault = _fault(together, e, measured, loss)
            if e == 0:
                outcome = together.first.preflight | {"engine": measured["engine"]}
            elif fault is not None or drew or _doubtful(together, measured):
                outcome = preflight(alone(e), "fast", strict_data=strict_data, seed=seed)
                fault = fault or _more_than_rounding(together, measured["symmetry"], outcome["symmetry"])
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


def _more_than_rounding(together: MlpEnsemble, defect: float, alone: float) -> FastsharpError | None:
    """Rounding, which may miss the gate for symmetry, is of one size whether a member is multiplied by itself or with the others."""
    if defect <= _ONE_SIZE * max(alone, SYMMETRY_GATE * torch.finfo(together.dtype).eps):
        return None
    return NotSymmetricError(f"|u'Hv - v'Hu| is {defect:.2e} of ||u|| ||Hv||, and {alone:.2e} where the member is multiplied by itself.")


def _losses(together: MlpEnsemble) -> list[tuple[float, bool]]:
    """The members' losses by their own forward passes, and whether each drew random numbers."""
    found, device = [], together.device
    with together.first.objective.quiet():
        before = random_states(device)
        for e in range(together.E):
            loss, after = together.loss(e), random_states(device)
            found.append((loss, after != before))
            before = after
    return found


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
    """How far the kernel's products Hv (E, n) are from torch's on all samples; and in float64, with differences of gradients, on a few."""
    stack = together.stack
    net, N = stack.net, stack.x.shape[1]
    few = min(_SAMPLES, N)
    parts = (t[:, :few].contiguous() for t in (stack.x, stack.target, stack.weight))
    on_few = mlp.prepare(net, stack.theta, *parts).product(v.repeat(together.E, 1), out=torch.empty_like(Hv), gauss=together.gauss)
    at_once = max(1, _AT_ONCE // max(net.n, N * max(net.widths)))
    found = []
    for e in range(0, together.E, at_once):
        members = slice(e, e + at_once)
        own = StackGradient(stack, members, N, stack.theta.dtype).product(v, gauss=together.gauss)[0]
        measured = {"engine": _relative(Hv[members].double(), own.double())}
        found.append(measured | _in_double(StackGradient(stack, members, few), v.double(), on_few[members].double(), together.gauss))
    return {name: [value for part in found for value in part[name].tolist()] for name in found[0]}


def _in_double(double: StackGradient, v: torch.Tensor, Hv: torch.Tensor, gauss: bool) -> dict[str, torch.Tensor]:
    size = v.norm()
    v, Hv = v / size, Hv / size
    exact, g = double.product(v, gauss=gauss)
    measured = {"rounding": _relative(Hv, exact)}
    if not gauss:
        h = STEP * double.theta.norm(dim=1).clamp_min(1.0)
        step = h[:, None] * v
        E = (double.gradient(double.theta + step) - double.gradient(double.theta - step)).div_(2 * h[:, None]) - exact
        measured["finite_difference"] = share(E.norm(dim=1), exact.norm(dim=1), g.norm(dim=1), h)
    return measured


def _relative(own: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """||own - exact|| / ||exact|| by rows, ||own|| where exact is zero."""
    scale = exact.norm(dim=1)
    found: torch.Tensor = (own - exact).norm(dim=1) / torch.where(scale > 0.0, scale, 1.0)
    return found
