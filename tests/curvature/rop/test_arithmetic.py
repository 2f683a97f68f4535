"""Rules of arithmetic and of elementary functions."""

from __future__ import annotations

import pytest
import torch

from fastsharp.curvature.rop.rules.arithmetic import UNARY
from tests.curvature.rop.check import part_of
from tests.curvature.rop.subsets import Case, channels_last, check_case

aten = torch.ops.aten

CASES = [
    Case(aten.add.Tensor, lambda r: (r(3, 4), r(3, 4)), {"alpha": 0.5}),
    Case(aten.add.Tensor, lambda r: (r(3, 1, 4), r(5, 1)), {"alpha": -2}),
    Case(aten.add.Tensor, lambda r: (r(()), r(2, 3))),
    Case(aten.add.Tensor, lambda r: (r(3, 4), 2.0)),
    Case(aten.add.Scalar, lambda r: (r(3, 4), 2)),
    Case(aten.sub.Tensor, lambda r: (r(4), r(3, 4)), {"alpha": 3}),
    Case(aten.sub.Scalar, lambda r: (r(3, 4), 2)),
    Case(aten.rsub.Tensor, lambda r: (r(4), r(3, 4)), {"alpha": 3}),
    Case(aten.rsub.Scalar, lambda r: (r(3, 4), 2)),
    Case(aten.mul.Tensor, lambda r: (r(3, 4), r(3, 4))),
    Case(aten.mul.Tensor, lambda r: (r(2, 3, 4, 4), r(2, 3, 1, 1))),
    Case(aten.mul.Tensor, lambda r: (channels_last(r(2, 3, 4, 4)), r(3, 1, 1))),
    Case(aten.mul.Tensor, lambda r: (r(()), r(()))),
    Case(aten.mul.Tensor, lambda r: (r(4, 3).t(), torch.arange(4))),
    Case(aten.mul.Tensor, lambda r: (r(3, 4), 2.0)),
    Case(aten.mul.Scalar, lambda r: (r(3, 4), 3)),
    Case(aten.div.Tensor, lambda r: (r(3, 1), r(2, 1, 4).abs() + 1)),
    Case(aten.div.Tensor, lambda r: (torch.arange(4), r(3, 4).abs() + 1)),
    Case(aten.div.Tensor, lambda r: (r(3, 4), torch.arange(1, 5))),
    Case(aten.div.Tensor, lambda r: (r(3, 4), 3)),
    Case(aten.div.Scalar, lambda r: (r(3, 4), 3)),
    Case(aten.div.Tensor_mode, lambda r: (r(3, 4), r(4).abs() + 1), {"rounding_mode": None}),
    *(Case(aten.pow.Tensor_Scalar, lambda r, p=p: (r(3, 4).abs() + 0.5, p)) for p in (1, 2, 3, -1, 0.5, 2.5)),
    Case(aten.pow.Scalar, lambda r: (2.5, r(3, 4))),
    Case(aten.pow.Tensor_Tensor, lambda r: (r(3, 4).abs() + 0.5, r(4))),
    Case(aten.pow.Tensor_Tensor, lambda r: (r(3, 4), torch.tensor([0, 1, 2, 3]))),
    Case(aten.atan2.default, lambda r: (r(3, 4), r(4))),
    Case(aten.maximum.default, lambda r: (r(3, 4), r(4))),
    Case(aten.maximum.default, lambda r: (torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))),
    Case(aten.minimum.default, lambda r: (r(3, 1), r(3, 4))),
    Case(aten.clamp.default, lambda r: (torch.tensor([-1.0, -0.5, 0.3, 0.5, 2.0], dtype=torch.float64), -0.5, 0.5)),
    Case(aten.clamp.default, lambda r: (r(3, 4),), {"max": 0.1}),
    Case(aten.clamp_min.default, lambda r: (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 0.0)),
    Case(aten.clamp_max.default, lambda r: (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 0.0)),
    Case(aten.hardtanh.default, lambda r: (torch.tensor([-2.0, -1.0, 0.5, 1.0], dtype=torch.float64),)),
    Case(aten.addcmul.default, lambda r: (r(3, 4), r(4), r(3, 1)), {"value": 0.7}),
    Case(aten.addcdiv.default, lambda r: (r(3, 4), r(4), r(3, 1).abs() + 1), {"value": 0.7}),
    Case(aten.lerp.Tensor, lambda r: (r(3, 4), r(4), r(3, 1))),
    Case(aten.lerp.Scalar, lambda r: (r(3, 4), r(4), 0.3)),
    Case(aten.where.self, lambda r: (r(3, 4) > 0, r(3, 4), r(4))),
    Case(aten.where.self, lambda r: (r(2, 3, 4) > 0, r(()), r(4))),
    Case(aten.masked_fill.Scalar, lambda r: (r(3, 4), r(4) > 0, float("-inf"))),
    Case(aten.masked_fill.Scalar, lambda r: (r(4), r(3, 4) > 0, 1.0)),
    Case(aten.masked_fill.Tensor, lambda r: (r(3, 4), r(3, 1) > 0, r(()))),
    Case(aten.nan_to_num.default, lambda r: (r(3, 4),)),
    Case(aten.remainder.Scalar, lambda r: (r(3, 4), 0.7)),
    *(Case(f, lambda r, f=f: (r(3, 5).abs() + 1.1 if f is aten.acosh.default else 0.95 * torch.sigmoid(r(3, 5)),)) for f in UNARY),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


def test_where_keeps_infinities_of_the_branch_not_taken_out() -> None:
    x, z = torch.zeros(2), torch.zeros(2)
    _, part = part_of(aten.where.self, torch.tensor([True, False]), x, z)
    infinite = torch.full((1, 2), float("inf"))
    (y_t,), _ = part.tangent([None, infinite.clone(), torch.zeros(1, 2)])
    assert y_t is not None and y_t[0, 1] == 0


def test_mixed_dtypes_come_back_in_their_own() -> None:
    x, z = torch.randn(3), torch.randn(2, 3, dtype=torch.float64)
    _, part = part_of(aten.mul.Tensor, x, z)
    (y_t,), kept = part.tangent([torch.randn(1, 3), None])
    part.adjoint([torch.randn(2, 3, dtype=torch.float64)])
    x_gt, z_gt = part.backward([torch.randn(1, 2, 3, dtype=torch.float64)], kept, [None, None])
    assert y_t is not None and x_gt is not None and z_gt is not None
    assert (y_t.dtype, x_gt.dtype, z_gt.dtype) == (torch.float64, torch.float32, torch.float64)


def test_addition_hands_the_adjoint_on_without_a_copy() -> None:
    x = torch.randn(3, 4)
    _, part = part_of(aten.add.Tensor, x, torch.randn(3, 4))
    g = torch.randn(2, 3, 4)
    assert all(r is g for r in part.backward([g], None, [None, None]))


def test_zeroth_power_is_constant() -> None:
    _, part = part_of(aten.pow.Tensor_Scalar, torch.randn(3), 0)
    assert part.tangent([torch.randn(1, 3)])[0] == [None] and part.backward([torch.randn(1, 3)], None, [None]) == [None]
