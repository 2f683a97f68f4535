"""Calls without a rule, one at a time, as check_rule takes any rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsharp.curvature.rop.island import Island
from fastsharp.curvature.rop.rule import RULES, Call
from tests.curvature.rop.check import check_rule

aten = torch.ops.aten


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], list[int] | None]] = {
    "nonlinear": (aten.tanh.default, (_random(3, 4),), {}, None),
    "two inputs": (aten.mul.Tensor, (_random(3, 4), _random(4)), {}, None),
    "one of two active": (aten.mul.Tensor, (_random(3, 4), _random(4)), {}, [1]),
    "linear": (aten.sum.dim_IntList, (_random(3, 4), [1]), {}, None),
    "a list of inputs": (aten.cat.default, ([_random(2, 3), _random(2, 4)], 1), {}, None),
    "bilinear, keywords": (aten.addmm.default, (_random(4), _random(2, 3), _random(3, 4)), {"beta": 0.5, "alpha": 2.0}, None),
    "an integer output": (aten.sort.default, (_random(3, 4),), {}, None),
    "outputs without a derivative": (aten.native_layer_norm.default, (_random(2, 3, 4), [4], _random(4), _random(4), 1e-5), {}, None),
    "several outputs": (aten.linalg_qr.default, (_random(4, 3),), {}, None),
    "a view": (aten.as_strided.default, (_random(3, 4), [2, 2], [5, 1], 1), {}, None),
    "integer inputs": (aten.gather.default, (_random(3, 4), 1, torch.tensor([[0, 3], [1, 1], [2, 0]])), {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_against_double_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    func, args, kwargs, active = CASES[name]
    monkeypatch.setitem(RULES, func, Island)
    for b in (1, 3):
        check_rule(func, *args, active=active, b=b, **kwargs)


def test_one_value_given_twice() -> None:
    """x * x as a call with one tensor in two places: its adjoint 2 x y_g comes once."""
    x = _random(5)
    call = Call(aten.mul.Tensor, (x, x), {}, x * x, lambda t: t is x)
    island = Island(call)
    (total, none) = island.adjoint([torch.ones_like(x)])
    assert none is None
    assert total is not None and torch.equal(total, 2 * x)
    t = _random(2, 5)
    (y_t,), kept = island.tangent([t, t])
    assert y_t is not None
    torch.testing.assert_close(y_t, 2 * x * t)
    x_gt = island.backward([None], kept, [None, None])[0]
    assert x_gt is not None
    torch.testing.assert_close(x_gt, 2 * t)


def test_inputs_and_outputs_of_which_only_some_matter() -> None:
    x = _random(4, 3)
    call = Call(aten.sort.default, (x,), {}, aten.sort.default(x), lambda t: t is x)
    island = Island(call)
    (values, order), _ = island.tangent([torch.ones(2, 4, 3, dtype=x.dtype)])
    assert values is not None and order is None
    assert torch.equal(values, torch.ones_like(values))
    assert island.backward([None, None], None, [None]) == [None]


def test_a_call_whose_derivative_is_zero() -> None:
    x = _random(4)
    island = Island(Call(aten.floor.default, (x,), {}, x.floor(), lambda t: t is x))
    (x_g,) = island.adjoint([torch.ones_like(x)])
    assert x_g is not None and not x_g.any()
    y_t, kept = island.tangent([torch.ones(2, 4, dtype=x.dtype)])
    assert y_t == [None]
    (x_gt,) = island.backward([torch.ones(2, 4, dtype=x.dtype)], kept, [None])
    assert x_gt is not None and not x_gt.any()


def test_everything_kept_is_counted() -> None:
    x = _random(100)
    island = Island(Call(aten.exp.default, (x,), {}, x.exp(), lambda t: t is x))
    island.adjoint([torch.ones_like(x)])
    held = {t.untyped_storage().data_ptr() for t in island.held()} - {x.untyped_storage().data_ptr()}
    assert len(held) >= 3  # y, its adjoint, that of x
