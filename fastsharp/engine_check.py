"""Are the products of a backend those of autograd? Compared on a small slice of a batch, in float64 where the model allows it.

Note on numerical properties. Two exact algorithms differ by rounding alone: in float64 by 1e-15 of ||Av|| on healthy networks, by 1e-11
where a loss near zero cancels (7e4 eps, see `fastsharp.preflight`). A wrong rule misses by a share of some layer's contribution. The
gate of 1e-8 lies between. In the parameters' own dtype rounding moves pre-activations across kinks, and one unit of a ReLU that
switches changes a product by its share, so that the gate there is wide.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.batches import count_of, head
from fastsharp.curvature.autograd import graph_products
from fastsharp.curvature.batch_products import Request
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.difference import DoubleGradient
from fastsharp.errors import EngineError

DOUBLE_GATE = 1e-8  # of ||Av||
OWN_GATE = 1e-2
_SAMPLES = 32


def check_engine(
    operator: FiniteSum, index: int, batch: Any, double: DoubleGradient | None, generator: torch.Generator
) -> dict[str, float]:
    """{"engine": ||Av - (Av by autograd)|| / ||Av||} for one random v; nothing where autograd computes the products anyway."""
    if operator.backend == "autograd":
        return {}
    v = torch.randn(operator.n, generator=generator, dtype=torch.float64).to(operator.device)
    v /= v.norm()
    part = head(batch, 0, _SAMPLES) if count_of(batch) > _SAMPLES else None
    part = batch if part is None else part
    gate = OWN_GATE
    request = Request(operator.objective, ("engine", index), part, operator.kind == "ggn")
    made, want = operator.minibatch_products(part, request.index), graph_products(request)
    pair = torch.zeros(2, operator.n, dtype=operator.dtype, device=operator.device)
    for products, row in ((made.products, pair[:1]), (want.products, pair[1:])):
        products.add_products(v.to(operator.dtype)[None], row, 1.0)
    got, exact = pair.double()
    scale = float(exact.norm())
    error = float((got - exact).norm()) / scale if scale else float(got.norm())
    if not error <= gate:
        raise EngineError(_message(operator, got - exact, error, gate))
    return {"engine": error}


def _message(operator: FiniteSum, difference: torch.Tensor, error: float, gate: float) -> str:
    blocks = zip(operator.layout.names, operator.layout.views(difference), strict=True)
    worst = sorted(((float(block.norm()), name) for name, block in blocks), reverse=True)[:3]
    return (
        f"a product of backend={operator.backend!r} misses autograd's by {error:.1e} of its norm (gate {gate:.0e}),\n"
        f"most in the rows of {', '.join(name for _, name in worst)}.\nUse backend='autograd', and report the model."
    )
