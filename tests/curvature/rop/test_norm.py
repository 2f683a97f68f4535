"""Rules of normalisation: layer, RMS, group and batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsharp.curvature.rop.memory import Unrecorded
from fastsharp.ops import dual
from tests.curvature.rop.check import check_rule, part_of
from tests.curvature.rop.subsets import Case, channels_last, check_case
from tests.releases import torch_before

aten = torch.ops.aten
BN = aten.native_batch_norm.default


def Norm(func: Any, args: Any) -> Case:
    return Case(func, args, outputs=(0,))


CASES = [
    Norm(aten.native_layer_norm.default, lambda r: (r(3, 5, 7), [7], r(7), r(7), 1e-5)),
    Norm(aten.native_layer_norm.default, lambda r: (r(3, 5, 7), [5, 7], r(5, 7), r(5, 7), 1e-3)),
    Norm(aten.native_layer_norm.default, lambda r: (r(7, 3, 5).permute(1, 2, 0), [7], r(7), None, 1e-5)),
    Norm(aten.native_layer_norm.default, lambda r: (r(6), [6], None, None, 1e-5)),
    Norm(aten.native_layer_norm.default, lambda r: (r(1, 4).expand(3, 4), [4], r(8)[::2], r(4), 1e-5)),
    Norm(aten.native_group_norm.default, lambda r: (r(3, 6, 2, 5), r(6), r(6), 3, 6, 10, 3, 1e-5)),
    Norm(aten.native_group_norm.default, lambda r: (channels_last(r(2, 6, 3, 5)), r(6), None, 2, 6, 15, 2, 1e-5)),
    Norm(aten.native_group_norm.default, lambda r: (r(3, 4), r(4), r(4), 3, 4, 1, 2, 1e-5)),
    Norm(aten.native_group_norm.default, lambda r: (r(2, 4, 7), None, None, 2, 4, 7, 4, 1e-5)),
    Norm(aten.native_group_norm.default, lambda r: (r(2, 5, 3), r(5), r(5), 2, 5, 3, 1, 1e-5)),
    Norm(BN, lambda r: (r(3, 4, 2, 5), r(4), r(4), None, None, True, 0.1, 1e-5)),
    Norm(BN, lambda r: (channels_last(r(2, 3, 4, 5)), r(3), None, None, None, True, 0.1, 1e-5)),
    Norm(BN, lambda r: (r(1, 3, 7), None, None, None, None, True, 0.1, 1e-5)),
    Norm(aten._native_batch_norm_legit.no_stats, lambda r: (r(4, 3, 2), r(3), r(3), True, 0.1, 1e-5)),
]

EVAL = [
    (BN, lambda r: (r(3, 4, 2, 5), r(4), r(4), r(4), r(4).exp(), False, 0.1, 1e-5)),
    (BN, lambda r: (channels_last(r(2, 3, 4, 5)), r(3), None, r(3), r(3).exp(), False, 0.1, 1e-5)),
    (BN, lambda r: (r(5, 3), r(3), r(3), r(3), r(3).exp(), False, 0.1, 1e-5)),
    (BN, lambda r: (r(5, 3, 4), None, None, r(3), r(3).exp(), False, 0.1, 1e-5)),
    (aten._native_batch_norm_legit_no_training.default, lambda r: (r(3, 4, 2), r(4), r(4), r(4), r(4).exp(), 0.1, 1e-5)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_autograds(case: Case) -> None:
    args = case.args(lambda *shape: torch.randn(*shape, dtype=torch.float64))
    if case.func is aten.native_group_norm.default and not args[0].is_contiguous() and torch_before("2.14"):
        pytest.skip("this torch crashes in the backward of a channels-last group norm of a constant input")
    check_case(case)


@pytest.mark.parametrize(("func", "make"), EVAL)
def test_running_statistics_are_constants(func: Any, make: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    args = make(lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64))
    affine = sum(isinstance(t, torch.Tensor) for t in args[:3])
    for active in range(1, 2**affine):
        for b in (1, 3):
            check_rule(func, *args, active=[i for i in range(affine) if active >> i & 1], b=b, outputs=(0,))


@pytest.mark.parametrize(
    ("func", "rest"),
    [(aten.native_layer_norm.default, (1e-5,)), (BN, (None, None, True, 0.1, 1e-5)), (BN, ("s", "s", False, 0.1, 1e-5))],
)
def test_a_bias_without_a_weight(func: Any, rest: tuple[Any, ...]) -> None:
    """As with a weight of ones: torch's own second derivative drops the bias where there is no weight."""
    g = torch.Generator().manual_seed(7)
    x, c, s = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((4, 3), (3,), (3,)))
    rest = tuple(s.exp() if t == "s" else t for t in rest)
    middle = ([3],) if func is not BN else ()
    x_t, c_t, y_g, y_gt = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, 4, 3), (2, 3), (4, 3), (2, 4, 3)))
    found = []
    for w in (None, torch.ones(3, dtype=torch.float64)):
        call, part = part_of(func, x, *middle, w, c, *rest, active=[0, 1 if w is None else 2])
        x_and_c = [x_t, c_t] if w is None else [x_t, None, c_t]
        y_t, kept = part.tangent([*x_and_c, *[None] * (len(call.inputs) - len(x_and_c))])
        x_g = part.adjoint([y_g, None, None])
        x_gt = part.backward([y_gt, None, None], kept, [None] * len(call.inputs))
        found.append([t for t in (y_t[0], *x_g, *x_gt) if t is not None])
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape and float((got - want).abs().max()) <= 1e-13


def test_training_reads_no_running_statistics() -> None:
    r = torch.Generator().manual_seed(3)
    x, w, c, mean = (torch.randn(*s, generator=r, dtype=torch.float64) for s in ((4, 3, 5), (3,), (3,), (3,)))
    check_rule(BN, x, w, c, mean, mean.exp(), True, 0.0, 1e-5, active=[0, 1, 2], outputs=(0,))


def test_active_statistics_have_no_rule() -> None:
    x, s = torch.randn(4, 3), torch.ones(3)
    with pytest.raises(AssertionError, match="refuses"):
        part_of(BN, x, None, None, s, s.clone(), False, 0.1, 1e-5, active=[0, 1])


@pytest.mark.skipif(not hasattr(aten, "_fused_rms_norm"), reason="a leaf of later versions")
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm(eps: float | None) -> None:
    check_case(Norm(aten._fused_rms_norm.default, lambda r: (r(3, 5, 7), [7], r(7), eps)))
    check_case(Norm(aten._fused_rms_norm.default, lambda r: (r(3, 4), [4], None, eps)))


@pytest.mark.parametrize(
    ("func", "make"),
    [
        (aten.native_layer_norm.default, lambda r: (r(9, 40) + 3, [40], r(40), r(40), 1e-5)),
        (aten.native_group_norm.default, lambda r: (r(3, 8, 5, 5) + 3, r(8), r(8), 3, 8, 25, 2, 1e-5)),
        (BN, lambda r: (r(6, 8, 5, 5) + 3, r(8), r(8), None, None, True, 0.1, 1e-5)),
    ],
)
def test_float32_is_as_exact_as_its_inputs(func: Any, make: Any) -> None:
    """Against the same rule in float64 at the same numbers: a few roundings of the largest number."""
    generator = torch.Generator().manual_seed(4)
    args = make(lambda *shape: torch.randn(*shape, generator=generator))
    found = []
    for dtype in (torch.float32, torch.float64):
        given = [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in args]
        call, part = part_of(func, *given)
        g = torch.Generator().manual_seed(5)
        x_t = [torch.randn(3, *t.shape, generator=g).to(dtype) for t in call.inputs]
        y_g, y_gt = (torch.randn(*s, *call.outputs[0].shape, generator=g).to(dtype) for s in ((), (3,)))
        y_t, kept = part.tangent(x_t)
        x_g = part.adjoint([y_g, None, None])
        found.append([y_t[0], *x_g, *part.backward([y_gt, None, None], kept, [None] * 3)])
    for single, double in zip(*found, strict=True):
        assert single is not None and double is not None and single.dtype == torch.float32
        assert float((single - double).abs().max()) <= 16 * 2**-24 * max(1.0, float(double.abs().max()))


def test_weights_go_straight_into_the_flat_result() -> None:
    """Columns of a wider matrix, among what was there before."""
    g = torch.Generator().manual_seed(6)
    x, w, c = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 5), (5,), (5,)))
    _, part = part_of(aten.native_layer_norm.default, x, [5], w, c, 1e-5)
    tangents = [torch.randn(2, *t.shape, generator=g, dtype=torch.float64) for t in (x, w, c)]
    part.adjoint([torch.randn(4, 5, generator=g, dtype=torch.float64), None, None])
    y_t, kept = part.tangent(tangents)
    want = part.backward(y_t, kept, [None, None, None])
    flat = torch.ones(2, 14, dtype=torch.float64)
    got = part.backward(y_t, kept, [None, flat[:, 2:7], flat[:, 7:12]])
    assert got[1] is None and got[2] is None
    assert torch.equal(got[0], want[0])  # type: ignore[arg-type]
    torch.testing.assert_close(flat[:, 2:12], 1 + torch.cat(want[1:], 1), rtol=1e-14, atol=1e-14)  # type: ignore[arg-type]
    assert torch.equal(flat[:, [0, 1, 12, 13]], torch.ones(2, 4, dtype=torch.float64))


def test_statistics_as_values_are_autograds() -> None:
    _, part = part_of(aten.native_layer_norm.default, torch.randn(4, 5), [5], None, None, 1e-5)
    with pytest.raises(Unrecorded, match="statistics"):
        part.adjoint([torch.ones(4, 5), torch.ones(4, 1), None])


def test_channels_last_is_kept() -> None:
    x = channels_last(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    _, part = part_of(BN, x, None, None, None, None, True, 0.1, 1e-5)
    t = torch.randn(2, 2, 3, 3, 4, dtype=torch.float64).permute(0, 1, 4, 2, 3)
    (y_t, *_), _ = part.tangent([t])
    assert y_t is not None and y_t.stride() == t.stride()


def test_layer_norm_where_fused_passes_do_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas that serve other devices."""
    monkeypatch.setattr(dual, "fused", lambda t: False)
    for case in CASES[:5]:
        check_case(case)
