"""Are the products of a backend those of autograd? Compared on a small slice of a batch, in float64 where the model allows it.

Note on numerical properties. Two exact algorithms differ by rounding alone: in float64 by 1e-15 of ||Av|| on healthy networks, by 1e-11
where a loss near zero cancels (7e4 eps, see `fastsharp.preflight`). A wrong rule misses by a share of some layer's contribution. The
gate of 1e-8 lies between. In the parameters' own dtype rounding moves pre-activations across kinks, and one unit of a ReLU that
switches changes a product by its share, so that the gate there is wide; models that do not evaluate in float64 are compared in it, and
the native kernel in both, since its float32 is code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsharp.batches import count_of, head
from fastsharp.curvature.autograd import graph_products, lacks_second_derivative
from fastsharp.curvature.batch_products import BatchProducts, Request, Unavailable
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.rop.tape import Unrecorded
from fastsharp.difference import DoubleGradient, relative_error
from fastsharp.errors import DoubleBackwardError, EngineError

DOUBLE_GATE = 1e-8  # of ||Av||
OWN_GATE = 1e-2
_SAMPLES = 32
_PROBES = 3  # of the asymmetry of autograd's product
_SHARE = 10.0  # of the difference that rounding of the reference may leave unexplained
_TILED = 500  # for the native kernel, which reorders and cuts them


class _Unsure(Exception):
    """Autograd's own product is rounding; the argument is its asymmetry."""


def check_engine(operator: FiniteSum, index: int, batch: Any, double: DoubleGradient | None, generator: torch.Generator) -> dict[str, Any]:
    """{"engine": ||Av - (Av by autograd)|| / ||Av||} for one random v, or why there is no such number.

    Nothing where autograd computes the products anyway.
    """
    if operator.backend == "autograd":
        return {}
    v = torch.randn(operator.n, generator=generator, dtype=torch.float64).to(operator.device)
    v /= v.norm()
    try:
        return {"engine": _measured(operator, index, batch, double, v)}
    except _Unsure as e:
        return {"engine": f"not compared: autograd's own product cancels, its asymmetry is {e} of its norm"}
    except RuntimeError as e:
        if not lacks_second_derivative(e):
            raise
    except DoubleBackwardError:
        if operator.backend != "rop":
            raise
    return {"engine": "not compared: torch has no second derivative of an operation of this model"}


def _measured(operator: FiniteSum, index: int, batch: Any, double: DoubleGradient | None, v: torch.Tensor) -> float:
    error: float | None = None
    if operator.backend in ("rop", "mlp") and double is not None and not double.narrow:
        double.limit(_SAMPLES)
        names: list[tuple[str, str]] = []
        try:
            if operator.backend == "rop":
                got, names = double.by_engine(v)
            else:
                got = double.by_kernel(v)
        except (Unrecorded, Unavailable):
            pass  # the float64 copy takes another way through the model
        else:
            exact = double.exact(v)
            error = relative_error(got, exact)
            if not error <= DOUBLE_GATE:
                _must_be_sure(v, exact, double.exact, error)
                raise EngineError(_message(operator, got - exact, error, DOUBLE_GATE, _fault(double, v, exact, names) if names else ""))
            if operator.backend == "rop":
                return error
    samples = _TILED if operator.backend == "mlp" else _SAMPLES
    part = head(batch, 0, samples) if count_of(batch) > samples else None
    part = batch if part is None else part
    request = Request(operator.objective, ("engine", index), part, operator.form)
    made, want = operator.minibatch_products(part, request.index), graph_products(request)
    got, exact = (_product(operator, m.products, v) for m in (made, want))
    own = relative_error(got, exact)
    if not own <= OWN_GATE:
        _must_be_sure(v, exact, lambda u: _product(operator, want.products, u), own)
        raise EngineError(_message(operator, got - exact, own, OWN_GATE, ""))
    return own if error is None else error


def _product(operator: FiniteSum, products: BatchProducts, v: torch.Tensor) -> torch.Tensor:
    """A v in the operator's dtype, as float64."""
    out = torch.zeros(1, operator.n, dtype=operator.dtype, device=operator.device)
    products.add_products(v.to(operator.dtype)[None], out, 1.0)
    return out[0].double()


def _must_be_sure(v: torch.Tensor, exact: torch.Tensor, reference: Callable[[torch.Tensor], torch.Tensor], error: float) -> None:
    """_Unsure where autograd's product A v is no reference: its asymmetry is of the size of the difference.

    `p u - p (p'u)` has no digits left where a network is sure of every sample to eps; the engine's own rule keeps them. A wrong rule beside a
    right reference leaves that symmetric to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(_PROBES):
        u = torch.randn(len(v), generator=generator, dtype=torch.float64).to(v)
        u /= u.norm()
        Au = reference(u)
        room = max(float(exact.norm()), float(Au.norm())) or 1.0
        worst = max(worst, abs(float(u @ exact) - float(v @ Au)) / room)
    # n entries share the defect of a random pair: it is about 1 / sqrt(n) of the difference
    if worst * len(v) ** 0.5 * _SHARE >= error:
        raise _Unsure(f"{worst:.0e}")


def _fault(double: DoubleGradient, v: torch.Tensor, exact: torch.Tensor, names: list[tuple[str, str]]) -> str:
    """The call whose rule is at fault: the last of the fewest calls that, taken by their rules, spoil the product. By bisection."""
    low, high = 0, len(names)  # by rules for `low` calls the product is right, for `high` it is not
    if not relative_error(double.by_engine(v, 0)[0], exact) <= DOUBLE_GATE:
        return " in calls that were folded into one"
    while high - low > 1:
        middle = (low + high) // 2
        right = relative_error(double.by_engine(v, middle)[0], exact) <= DOUBLE_GATE
        low, high = (middle, high) if right else (low, middle)
    op, module = names[high - 1]
    return f" at {op} in {module or 'the model itself or the loss'}"


def _message(operator: FiniteSum, difference: torch.Tensor, error: float, gate: float, where: str) -> str:
    blocks = zip(operator.layout.names, operator.layout.views(difference), strict=True)
    worst = sorted(((float(block.norm()), name) for name, block in blocks), reverse=True)[:3]
    return (
        f"a product of backend={operator.backend!r} misses autograd's by {error:.1e} of its norm (gate {gate:.0e}){where},\n"
        f"most in the rows of {', '.join(name for _, name in worst)}.\nUse backend='autograd', and report the model."
    )
