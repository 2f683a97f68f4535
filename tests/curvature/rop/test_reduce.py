"""Rules of reductions."""

from __future__ import annotations

import pytest
import torch

from fastsharp.curvature.rop.rule import RULES, Call
from tests.curvature.rop.subsets import Case, channels_last, check_case

aten = torch.ops.aten

TIES = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, -1.0]], dtype=torch.float64)

CASES = [
    Case(aten.sum.default, lambda r: (r(3, 4),)),
    Case(aten.sum.default, lambda r: (r(()),)),
    Case(aten.sum.dim_IntList, lambda r: (r(3, 4, 5), [-1, 0])),
    Case(aten.sum.dim_IntList, lambda r: (r(3, 4, 5), [1], True)),
    Case(aten.sum.dim_IntList, lambda r: (r(3, 4), None)),
    Case(aten.mean.default, lambda r: (r(3, 4),)),
    Case(aten.mean.dim, lambda r: (channels_last(r(2, 3, 4, 5)), [-1, -2], True)),
    Case(aten.mean.dim, lambda r: (r(3, 4), [1])),
    *(
        Case(f, lambda r: (channels_last(r(2, 3, 4, 5)), [0, -1]), {"correction": c, "keepdim": k})
        for f in (aten.var.correction, aten.std.correction, aten.var_mean.correction)
        for c, k in ((None, False), (0, True), (2.5, False))
    ),
    Case(aten.var.correction, lambda r: (r(3, 4),)),
    Case(aten.logsumexp.default, lambda r: (r(3, 4, 5), [1, -1])),
    Case(aten.logsumexp.default, lambda r: (r(3, 4), [0], True)),
    Case(aten.linalg_vector_norm.default, lambda r: (r(3, 4),)),
    Case(aten.linalg_vector_norm.default, lambda r: (r(3, 4, 5), 2, [-1, 0], True)),
    Case(aten.linalg_vector_norm.default, lambda r: (r(3, 4), 1, [1])),
    Case(aten.amax.default, lambda r: (r(3, 4, 5), [0, -1])),
    Case(aten.amax.default, lambda r: (TIES, [1], True)),
    Case(aten.amin.default, lambda r: (TIES, [1])),
    Case(aten.max.default, lambda r: (TIES,)),
    Case(aten.min.default, lambda r: (r(3, 4),)),
    Case(aten.max.dim, lambda r: (r(3, 4, 5), -2)),
    Case(aten.max.dim, lambda r: (r(3, 4), 0, True)),
    Case(aten.min.dim, lambda r: (r(3, 4), 1)),
    Case(aten.median.dim, lambda r: (r(3, 5), 1)),
    Case(aten.kthvalue.default, lambda r: (r(3, 5), 2, 0)),
    Case(aten.topk.default, lambda r: (r(3, 5), 2)),
    Case(aten.topk.default, lambda r: (r(3, 5), 2, 0, False)),
    Case(aten.sort.default, lambda r: (r(3, 5), 0, True)),
    Case(aten.sort.stable, lambda r: (r(3, 5),), {"stable": True, "dim": 0}),
    Case(aten.prod.default, lambda r: (r(3, 2),)),
    Case(aten.prod.dim_int, lambda r: (r(3, 4), -1)),
    Case(aten.prod.dim_int, lambda r: (r(3, 4), 0, True)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


def test_product_with_a_zero_is_refused() -> None:
    x = torch.tensor([1.0, 0.0])
    assert RULES[aten.prod.default](Call(aten.prod.default, (x,), {}, x.prod(), lambda t: True)) is None


def test_variance_of_one_element_is_refused() -> None:
    x = torch.randn(3, 1)
    assert RULES[aten.var.correction](Call(aten.var.correction, (x, [1]), {"correction": 1}, x[:, 0], lambda t: True)) is None
