"""The preflight of an ensemble on the native kernel: what can differ between members is asked of each, the rest of the first.

All members compute one function of weights and data, a plain net that was recognised call by call in each of them, with the loss of each
model; whether autograd's second derivative of that function is the derivative of its gradient is settled by the first. Each member
then has its products repeated, tested for symmetry and for NaN, and compared with autograd's of the recognised net. The gates are those
of `fastsharp.preflight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsharp.api.subject import checked
from fastsharp.curvature import FiniteSum
from fastsharp.curvature.ensemble import MlpEnsemble
from fastsharp.engine_check import OWN_GATE
from fastsharp.errors import EngineError, NondeterministicOperatorError, NonFiniteError, NotSymmetricError
from fastsharp.krylov.ensemble import of_member
from fastsharp.preflight import ROUNDING_GATE, SYMMETRY_GATE, check_data

_PROBES = 3


def check_ensemble(
    together: MlpEnsemble, operators: Sequence[FiniteSum], loaders: Sequence[Any], *, strict_data: bool = False, seed: int = 0
) -> None:
    """The checks of level "fast": the whole preflight for member 0; 4 block products and one of autograd's for all.

    The outcome is in `preflight` of each operator. Raises what `fastsharp.preflight` raises, with the member named.
    """
    with of_member(0):
        checked(operators[0], preflight="fast", strict_data=strict_data, seed=seed)
    E, n, eps = together.E, together.n, torch.finfo(together.dtype).eps
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(_PROBES, n, generator=generator, dtype=torch.float64).to(together.dtype).to(together.device)
    HV = torch.stack([together.apply(v.expand(E, n)) for v in V], 1)
    again = together.apply(V[0].expand(E, n))
    exact = together.by_autograd(V[0])
    scale = exact.double().norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    engine = ((HV[:, 0].double() - exact.double()).norm(dim=1) / scale).tolist()
    finite = torch.isfinite(HV).all(2).all(1).tolist()
    repeat = ((again - HV[:, 0]).double().norm(dim=1) / HV[:, 0].double().norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    cross = HV.double() @ V.double().T
    room = HV.double().norm(dim=2)[:, :, None] * V.double().norm(dim=1)
    largest = torch.maximum(room, room.mT).clamp_min(torch.finfo(torch.float64).tiny)
    symmetry = ((cross - cross.mT).abs() / largest).amax((1, 2)).tolist()
    seen: dict[int, str] = {}
    for e, operator in enumerate(operators):
        with of_member(e):
            if id(loaders[e]) not in seen:
                seen[id(loaders[e])] = operator.preflight["data"] if e == 0 else check_data(operator, "fast", strict_data)
            if not finite[e]:
                raise NonFiniteError("a Hessian-vector product has NaN or Inf, though the loss is finite. Look for huge weights or inputs.")
            if repeat[e] > 0.0:
                raise NondeterministicOperatorError(f"two products with the same vector differ by {repeat[e]:.2e} of their norm.")
            if not engine[e] <= OWN_GATE:
                raise EngineError(
                    f"a product of backend='mlp' misses autograd's by {engine[e]:.1e} of its norm (gate {OWN_GATE:.0e}).\n"
                    "Use backend='autograd', and report the model."
                )
            measured = {"repeat": repeat[e], "symmetry": symmetry[e], "engine": engine[e]}
            if e == 0:
                operator.preflight = operator.preflight | {"engine": engine[0]}
                continue
            if symmetry[e] > SYMMETRY_GATE * eps:  # rounding or a fault: the whole preflight tells
                checked(operator, preflight="fast", strict_data=strict_data, seed=seed)
                continue
            said = "run on member 0 of the ensemble"
            operator.preflight = {
                "level": "fast",
                "data": seen[id(loaders[e])],
                **measured,
                "finite_difference": said,
                "notes": (f"finite-difference check {said}",),
            }
    if max(symmetry) > ROUNDING_GATE:
        e = symmetry.index(max(symmetry))
        raise NotSymmetricError(f"member {e}: |u'Hv - v'Hu| is {symmetry[e]:.2e} of ||u|| ||Hv||: the product is not symmetric.")
