"""Rules of matrix products against torch's double backward, alone and into places of the flat result."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsharp.curvature.rop.rules.matmul import linear
from fastsharp.ops import _registry, force
from fastsharp.ops.dual_linear import Factors, gather
from tests.curvature.rop.check import check_rule, part_of

aten = torch.ops.aten


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Any, list[torch.Tensor], dict[str, Any]]] = {
    "mm": (aten.mm.default, [rand(5, 3), rand(3, 7)], {}),
    "mm strided": (aten.mm.default, [rand(3, 5).t(), rand(3, 14)[:, ::2]], {}),
    "mm one row": (aten.mm.default, [rand(1, 3), rand(3, 1)], {}),
    "bmm": (aten.bmm.default, [rand(4, 5, 3), rand(4, 3, 2)], {}),
    "bmm strided": (aten.bmm.default, [rand(5, 4, 3).transpose(0, 1), rand(4, 2, 3).mT], {}),
    "bmm broadcast": (aten.bmm.default, [rand(1, 5, 3).expand(4, 5, 3), rand(4, 3, 2)], {}),
    "mv": (aten.mv.default, [rand(5, 3), rand(3)], {}),
    "dot": (aten.dot.default, [rand(9), rand(9)], {}),
    "addmm": (aten.addmm.default, [rand(7), rand(5, 3), rand(7, 3).t()], {}),
    "addmm column": (aten.addmm.default, [rand(5, 1), rand(5, 3), rand(3, 7)], {}),
    "addmm scaled": (aten.addmm.default, [rand(1, 7), rand(5, 3), rand(3, 7)], {"beta": 0.5, "alpha": -2.0}),
    "addmm scalar": (aten.addmm.default, [rand(1), rand(5, 3), rand(3, 7)], {"alpha": 3.0}),
    "baddbmm": (aten.baddbmm.default, [rand(4, 5, 2), rand(4, 5, 3), rand(4, 3, 2)], {"beta": 2.0, "alpha": 0.5}),
    "baddbmm broadcast": (aten.baddbmm.default, [rand(1, 1, 2), rand(4, 5, 3), rand(4, 3, 2)], {}),
    "addmv": (aten.addmv.default, [rand(5), rand(5, 3), rand(3)], {"beta": 0.5, "alpha": 2.0}),
    "linear": (linear, [rand(5, 3), rand(7, 3), rand(7)], {}),
    "linear and relu": (linear, [rand(5, 3), rand(7, 3), rand(7)], {"relu": True}),
    "linear without bias": (linear, [rand(5, 3), rand(7, 3)], {}),
    "linear of a sequence": (aten.linear.default, [rand(2, 5, 3), rand(7, 3), rand(7)], {}),
    "linear of a vector": (aten.linear.default, [rand(3), rand(7, 3), rand(7)], {}),
    "linear strided": (linear, [rand(3, 5).t(), rand(7, 6)[:, ::2], rand(7)], {}),
}


def subsets(k: int) -> list[list[int]]:
    return [list(s) for r in range(1, k + 1) for s in itertools.combinations(range(k), r)]


@pytest.mark.parametrize("name", CASES)
def test_every_active_subset(name: str) -> None:
    func, args, kwargs = CASES[name]
    for active in subsets(len(args)):
        for b in (1, 3):
            check_rule(func, *args, active=active, b=b, **kwargs)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_adds_to_its_place_in_the_flat_result(name: str, b: int) -> None:
    func, args, kwargs = CASES[name]
    _, part = part_of(func, *args, **kwargs)
    y = func(*args, **kwargs)
    part.adjoint([rand(*y.shape)])
    y_gt = [rand(b, *y.shape)]
    _, kept = part.tangent([rand(b, *a.shape) for a in args])
    plain = part.backward(y_gt, kept, [None] * len(args))
    flat = torch.full((b, sum(a.numel() for a in args)), 0.25, dtype=torch.float64)
    into = [view.view(b, *a.shape) for view, a in zip(flat.split([a.numel() for a in args], 1), args, strict=True)]
    assert part.backward(y_gt, kept, into) == [None] * len(args)
    for got, want in zip(into, plain, strict=True):
        assert want is not None
        torch.testing.assert_close(got, want + 0.25, rtol=1e-13, atol=1e-13)


def test_without_an_adjoint_only_the_second_term_is_left() -> None:
    x, w = rand(5, 3), rand(7, 3)
    _, part = part_of(linear, x, w)
    y_g = rand(5, 7)
    part.adjoint([y_g])
    x_t, w_t = rand(2, 5, 3), rand(2, 7, 3)
    _, kept = part.tangent([x_t, w_t])
    x_gt, w_gt = part.backward([None], kept, [None, None])
    torch.testing.assert_close(x_gt, y_g @ w_t)
    torch.testing.assert_close(w_gt, y_g.t() @ x_t)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("linear")])
def test_a_backend_with_a_kernel_for_pairs_gets_all_three(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, which no such kernel takes but for this test: the same products, each pair in one call."""
    from fastsharp.ops import dual_linear

    calls = []

    def paired(out: torch.Tensor | None, first: Factors, second: Factors, b: int, alpha: float) -> torch.Tensor:
        calls.append(b)
        return gather(gather(out, *first, b, alpha), *second, b, alpha)

    monkeypatch.setattr(dual_linear, "KERNEL_DTYPES", (torch.float64,))
    func, args, kwargs = CASES[name]
    with force(replace(_registry.choose(torch.device("cpu")), paired=paired)):
        check_rule(func, *args, active=range(len(args)), b=3, **kwargs)
    assert calls.count(3) >= 3 and len(calls) % 3 == 0
