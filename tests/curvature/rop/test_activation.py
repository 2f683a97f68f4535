"""Activations: value of the tangents at points away from kinks, on odd shapes, strides and every active subset."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.curvature.rop.check import check_rule, part_of

aten = torch.ops.aten

UNARY: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.relu.default, (), {}),
    (aten.threshold.default, (0.3, -1.0), {}),
    (aten.leaky_relu.default, (), {}),
    (aten.leaky_relu.default, (0.2,), {}),
    (aten.hardtanh.default, (), {}),
    (aten.hardtanh.default, (0, 6), {}),
    (aten.hardshrink.default, (), {}),
    (aten.softshrink.default, (0.7,), {}),
    (aten.hardsigmoid.default, (), {}),
    (aten.hardswish.default, (), {}),
    (aten.elu.default, (1.3,), {}),
    (aten.elu.default, (1.6732632423543772, 1.0507009873554805), {}),
    (aten.celu.default, (0.5,), {}),  # torch rounds alpha to single precision in its backward
    (aten.gelu.default, (), {}),
    (aten.gelu.default, (), {"approximate": "tanh"}),
    (aten.silu.default, (), {}),
    (aten.mish.default, (), {}),
    (aten.tanh.default, (), {}),
    (aten.sigmoid.default, (), {}),
    (aten.softplus.default, (), {}),
    (aten.softplus.default, (2.0, 3.0), {}),
    (aten.log_sigmoid_forward.default, (), {}),
]


def _points(*shape: int) -> torch.Tensor:
    """Points on both sides of every kink above, none nearer to one than 0.01."""
    x = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kinks = torch.tensor([0, 0.3, 0.5, -0.5, 0.7, -0.7, 1, -1, 1.5, 3, -3, 6], dtype=torch.float64)
    return torch.where((x.unsqueeze(-1) - kinks).abs().amin(-1) < 0.01, x + 0.02, x)


def _name(case: Any) -> str:
    return str(case[0]).split(".")[1] + "".join(f"-{a}" for a in (*case[1], *case[2].values()))


SECOND = [case for case in UNARY if case[0] is not aten.hardsigmoid.default]  # torch has no second derivative of that one


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("case", SECOND, ids=_name)
def test_unary(case: Any, b: int) -> None:
    func, rest, options = case
    check_rule(func, _points(5, 7, 3), *rest, b=b, **options)
    check_rule(func, _points(3, 7, 5).transpose(0, 2)[:, ::2], *rest, b=b, **options)


@pytest.mark.parametrize("case", UNARY, ids=_name)
def test_far_points_are_finite(case: Any) -> None:
    func, rest, options = case
    x = torch.tensor([-800.0, -90.0, 90.0, 800.0], dtype=torch.float64)
    _, part = part_of(func, x, *rest, **options)
    y_t, kept = part.tangent([torch.ones(1, 4, dtype=torch.float64)])
    part.adjoint([torch.ones(4, dtype=torch.float64), None][: len(y_t)])
    x_gt = part.backward([torch.ones(1, 4, dtype=torch.float64), None][: len(y_t)], kept, [None])
    assert y_t[0] is not None and y_t[0].isfinite().all()
    assert x_gt[0] is not None and x_gt[0].isfinite().all()


def test_hardsigmoid_is_a_clipped_line() -> None:
    x, t, g = _points(5, 7), _points(2, 5, 7), _points(5, 7)
    _, part = part_of(aten.hardsigmoid.default, x)
    slope = torch.where((x > -3) & (x < 3), torch.tensor(1 / 6, dtype=torch.float64), 0.0)
    (y_t,), kept = part.tangent([t])
    (x_g,) = part.adjoint([g])
    (x_gt,) = part.backward([t], kept, [None])
    for got, want in ((y_t, slope * t), (x_g, slope * g), (x_gt, slope * t)):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("func", [aten.relu.default, aten.hardtanh.default, aten.leaky_relu.default])
def test_kinks_go_the_way_of_torch(func: Any) -> None:
    check_rule(func, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("active", [[0], [1], [0, 1]])
@pytest.mark.parametrize("shape", [(1, 7, 1), (1, 1, 1)])
def test_prelu(active: list[int], shape: tuple[int, ...]) -> None:
    check_rule(aten._prelu_kernel.default, _points(5, 7, 3), torch.rand(shape, dtype=torch.float64), active=active)


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("b", [1, 3])
def test_glu(dim: int, b: int) -> None:
    check_rule(aten.glu.default, _points(4, 6, 8), dim, b=b)
    check_rule(aten.glu.default, _points(8, 6, 4).transpose(0, 2), dim, b=b)


def test_rrelu_in_evaluation() -> None:
    x = _points(5, 7)
    check_rule(aten.rrelu_with_noise.default, x, torch.empty_like(x), 0.1, 0.3, False, active=[0])
    with pytest.raises(AssertionError, match="refuses"):
        part_of(aten.rrelu_with_noise.default, x, torch.empty_like(x), 0.1, 0.3, True, active=[0])


def test_half_precision_derivatives_are_rounded_once() -> None:
    x = torch.linspace(-4, 4, 1001).to(torch.bfloat16)
    _, part = part_of(aten.gelu.default, x)
    ones = torch.ones(1, 1001, dtype=torch.bfloat16)
    (y_t,), _ = part.tangent([ones])
    _, exact = part_of(aten.gelu.default, x.double())
    (want,), _ = exact.tangent([ones.double()])
    assert y_t is not None and want is not None
    assert y_t.dtype == torch.bfloat16
    assert ((y_t.double() - want).abs() <= 2**-8 * want.abs() + 1e-30).all()
