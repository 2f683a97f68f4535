"""Softmax along every dimension: strides, masked rows, far logits, half precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastsharp.curvature.rop.rule import Call
from fastsharp.curvature.rop.rules import softmax
from tests.curvature.rop.check import check_rule, part_of

aten = torch.ops.aten

SOFTMAX: list[tuple[Any, tuple[Any, ...]]] = [
    (aten._softmax.default, (False,)),
    (aten._safe_softmax.default, ()),
    (aten._log_softmax.default, (False,)),
]


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("case", SOFTMAX, ids=lambda case: str(case[0]))
def test_softmax(case: Any, dim: int, b: int) -> None:
    func, rest = case
    check_rule(func, _random(5, 7, 3), dim, *rest, b=b)
    check_rule(func, _random(3, 7, 5).transpose(0, 2)[:, ::2], dim, *rest, b=b)
    check_rule(func, _random(4, 1, 1), dim, *rest, b=b)


@pytest.mark.parametrize("case", SOFTMAX, ids=lambda case: str(case[0]))
def test_one_dimension(case: Any) -> None:
    check_rule(case[0], _random(7), 0, *case[1])


def test_large_rows_go_vector_by_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "SMALL", 0)
    check_rule(aten._safe_softmax.default, _random(5, 7, 3), -1, b=3)
    check_rule(aten._safe_softmax.default, _random(5, 7, 3).transpose(0, 1), 0, b=3)


@pytest.mark.parametrize("b", [1, 3])
def test_masks(b: int) -> None:
    """Rows with some and with all entries at -inf."""
    x = _random(6, 5)
    x[1, 2:] = -math.inf
    x[3, :4] = -math.inf
    check_rule(aten._softmax.default, x, -1, False, b=b)
    x[4] = -math.inf
    check_rule(aten._safe_softmax.default, x, -1, b=b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_that_underflow(dtype: torch.dtype) -> None:
    """Logits so far apart that p is small, subnormal or zero: the tangent of the adjoint equals autograd's to the rounding of the row."""
    info = torch.finfo(dtype)
    far = -math.log(info.max)
    x = torch.tensor([[0.0, 0.3, 0.2 * far, 0.8 * far, 0.99 * far, 1.02 * far, 3 * far]], dtype=dtype)
    g, t, g_t = (_random(1, 7, seed=s).to(dtype) for s in (2, 3, 4))
    _, part = part_of(aten._safe_softmax.default, x, -1)
    _, kept = part.tangent([t.unsqueeze(0)])
    part.adjoint([g])
    (got,) = part.backward([g_t.unsqueeze(0)], kept, [None])

    leaf, dual = x.clone().requires_grad_(), g.clone().requires_grad_()
    (x_g,) = torch.autograd.grad(leaf.softmax(-1), leaf, dual, create_graph=True)
    (want,) = torch.autograd.grad(x_g, leaf, t, retain_graph=True)
    want += torch.autograd.grad(leaf.softmax(-1), leaf, g_t)[0]
    assert got is not None
    assert float((got[0] - want).abs().max()) <= 16 * info.eps * float(g.abs().max() * t.abs().max() + g_t.abs().max())


@pytest.mark.parametrize("case", SOFTMAX, ids=lambda case: str(case[0]))
def test_half_precision_is_rounded_once(case: Any) -> None:
    func, rest = case
    x, g, t, g_t = (_random(5, 40, seed=s).to(torch.bfloat16) for s in (1, 2, 3, 4))
    results: list[list[torch.Tensor]] = []
    for dtype in (torch.bfloat16, torch.float64):
        y = func(x.to(torch.float32).to(dtype), -1, *rest)
        call = Call(func, (x.to(dtype), -1, *rest), {}, y if dtype == torch.bfloat16 else results[0][0].to(dtype), lambda _: True)
        part = softmax.LogSoftmax(call) if func is aten._log_softmax.default else softmax.Softmax(call)
        (y_t,), kept = part.tangent([t.unsqueeze(0).to(dtype)])
        (x_g,) = part.adjoint([g.to(dtype)])
        (x_gt,) = part.backward([g_t.unsqueeze(0).to(dtype)], kept, [None])
        assert y_t is not None and x_g is not None and x_gt is not None
        results.append([y, y_t, x_g, x_gt])
    for got, want in zip(results[0][1:], results[1][1:], strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - want).abs().max()) <= 2**-8 * float(want.abs().max())


@pytest.mark.parametrize("func", [aten._softmax.default, aten._log_softmax.default])
def test_half_to_float(func: Any) -> None:
    """Only CUDA evaluates this form: half-precision logits, float32 probabilities. The tangents have those dtypes."""
    x, t, g_t = (_random(5, 9, seed=s).to(torch.float16) for s in (1, 2, 3))
    g = _random(5, 9, seed=4).float()
    call = Call(func, (x, -1, True), {}, func(x.float(), -1, False), lambda _: True)
    part = softmax.Softmax(call) if func is aten._softmax.default else softmax.LogSoftmax(call)
    _, exact = part_of(func, x.float(), -1, False)
    (y_t,), kept = part.tangent([t.unsqueeze(0)])
    (want_t,), exact_kept = exact.tangent([t.unsqueeze(0).float()])
    (x_g,), (want_g,) = part.adjoint([g]), exact.adjoint([g])
    (x_gt,) = part.backward([g_t.unsqueeze(0).float()], kept, [None])
    (want_gt,) = exact.backward([g_t.unsqueeze(0).float()], exact_kept, [None])
    assert y_t is not None and want_g is not None and want_gt is not None and want_t is not None
    assert torch.equal(y_t, want_t) and y_t.dtype == torch.float32
    for got, want in ((x_g, want_g), (x_gt, want_gt)):
        assert got is not None and torch.equal(got, want.to(torch.float16))
