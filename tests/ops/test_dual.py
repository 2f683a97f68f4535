"""The dual ops on every backend of this machine, against torch's double backward in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsharp.errors import InputError, ShapeError
from fastsharp.ops import _registry, dual, force
from tests.ops.cases import DTYPES, VARIANTS, device_of, using
from tests.ops.dual_cases import CURVES, SHAPES, check_activation, check_norm, check_softmax
from tests.ops.triton_cases import DEVICE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations(variant: str, dtype: torch.dtype) -> None:
    with using(variant):
        for shape in SHAPES:
            for name in CURVES:
                check_activation(name, *shape, dtype, device_of(variant))


@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_norms(variant: str, dtype: torch.dtype, center: bool) -> None:
    with using(variant):
        for shape in SHAPES:
            check_norm(center, *shape, dtype, device_of(variant))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_softmax(variant: str, dtype: torch.dtype) -> None:
    with using(variant):
        for shape in SHAPES:
            check_softmax(*shape, dtype, device_of(variant))
        check_softmax(1, 4, 1000, dtype, device_of(variant), scale=100.0)  # most probabilities underflow


@pytest.mark.parametrize("variant", ["cpu-scalar", "cpu-avx2", "cpu-avx512"])
def test_bits_do_not_depend_on_threads(variant: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, y_g, x_t, y_gt = (torch.randn(*s, generator=g) for s in ((700, 70), (700, 70), (2, 700, 70), (2, 700, 70)))

    def results() -> list[torch.Tensor]:
        stats, x_sums, g_sums = (torch.empty(*s, dtype=torch.float64) for s in ((700, 2), (2, 700, 2), (1, 700, 2)))
        f = dual.Norm(x, y_g[0], dual.norm_prepare(x, eps=1e-5, center=True, stats=stats), True)
        out, w_gt, bias_gt, y_t = torch.empty_like(x_t), torch.zeros(2, 70), torch.zeros(2, 70), torch.empty_like(x_t)
        dual.norm_tangent(f, x_t, out=y_t, sums=x_sums)
        dual.norm_adjoint(f, y_g[None], out=None, sums=g_sums)
        dual.norm_adjoint(f, y_gt, second=dual.Second(y_g, g_sums, x_t, x_sums, None), out=out, w_gt=w_gt, bias_gt=bias_gt)
        a_gt, sums = torch.empty_like(x_t), torch.zeros(2, 70)
        dual.activation_adjoint(x, y_gt, q=y_g, a_t=x_t, out=a_gt, bias_gt=sums)
        return [y_t, out, w_gt, bias_gt, a_gt, sums]

    before = torch.get_num_threads()
    try:
        with using(variant):
            torch.set_num_threads(1)
            alone = results()
            torch.set_num_threads(3)
            assert all(torch.equal(a, c) for a, c in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy in triton's interpreter
@pytest.mark.parametrize("variant", [*VARIANTS[1:], "triton"])
def test_bits_are_those_of_a_vector_alone(variant: str) -> None:
    device = DEVICE if variant == "triton" else device_of(variant)
    g = torch.Generator().manual_seed(0)
    shapes = (20, 40), (20, 40), (3, 20, 40), (3, 20, 40)

    def results(x: torch.Tensor, y_g: torch.Tensor, x_t: torch.Tensor, y_gt: torch.Tensor, ks: slice) -> list[torch.Tensor]:
        t, g_t = x_t[ks].contiguous(), y_gt[ks].contiguous()
        b = len(t)
        stats, g_sums, sums = (torch.empty(*s, 20, 2, dtype=torch.float64, device=device) for s in ((), (1,), (b,)))
        f = dual.Norm(x, y_g[0], dual.norm_prepare(x, eps=1e-5, center=True, stats=stats), True)
        y_t, x_gt, a_gt, product = (torch.empty_like(t) for _ in range(4))
        w_gt, bias_gt, total = (torch.zeros(b, 40, device=device) for _ in range(3))
        dual.norm_adjoint(f, y_g[None], out=None, sums=g_sums)
        dual.norm_tangent(f, t, out=y_t, sums=sums)
        dual.norm_adjoint(f, g_t, second=dual.Second(y_g, g_sums, t, sums, None), out=x_gt, w_gt=w_gt, bias_gt=bias_gt)
        dual.activation_adjoint(x, g_t, q=y_g, a_t=t, out=a_gt, bias_gt=total)
        dual.softmax_product(torch.softmax(x, 1), t, out=product)
        return [y_t, x_gt, w_gt, bias_gt, a_gt, total, product]

    with using(variant):
        xs = [torch.randn(*s, generator=g).to(device) for s in shapes]
        for together, alone in zip(results(*xs, slice(0, 3)), results(*xs, slice(2, 3)), strict=True):
            assert torch.equal(together[2], alone[0])


def test_a_large_mean_costs_no_digits() -> None:
    """Row statistics are double: x = 1000 + noise is as exact as its float32 entries allow."""
    check_norm(True, 2, 20, 64, torch.float32, torch.device("cpu"), mean=1000.0)


@pytest.mark.parametrize("op", sorted(_registry.Dual.__dataclass_fields__))
def test_a_broken_kernel_turns_the_checkers_red(op: str) -> None:
    """Each op in turn runs and then loses its last result."""
    outputs = {"activation_prepare": 4, "activation_tangent": 3, "activation_adjoint": 4, "norm_prepare": 3, "norm_tangent": 4,
               "norm_adjoint": 3, "softmax_gradient": 5, "softmax_product": 3}  # fmt: skip
    backend = _registry.choose(torch.device("cpu"))
    sound = getattr(backend.dual, op)

    def broken(*args: Any) -> None:
        sound(*args)
        if args[outputs[op]] is not None:
            args[outputs[op]].mul_(1 + 1e-3)

    with force(replace(backend, dual=replace(backend.dual, **{op: broken}))), pytest.raises(AssertionError):
        for check in (lambda *a: check_activation("gelu", *a), lambda *a: check_norm(True, *a), check_softmax):
            check(2, 5, 33, torch.float32, torch.device("cpu"))


def test_what_does_not_fit_is_refused() -> None:
    x, t = torch.ones(4, 6), torch.ones(2, 4, 6)
    with pytest.raises(ShapeError, match=r"activation_tangent: x_t has shape \(2, 4, 5\), expected \(2, 4, 6\)"):
        dual.activation_tangent(x, torch.ones(2, 4, 5), out=t)
    with pytest.raises(InputError, match="activation_adjoint: q and a_t belong together"):
        dual.activation_adjoint(x, t, q=x, out=t)
    with pytest.raises(InputError, match="softmax_product: out overlaps a tangent"):
        room = torch.ones(3, 4, 6)
        dual.softmax_product(x, room[:2], out=room[1:])
    with pytest.raises(InputError, match="activation_tangent: out overlaps d1"):
        dual.activation_tangent(t[0], torch.ones(2, 4, 6), out=t)
    with pytest.raises(InputError, match="kind is 'mish', expected one of relu, gelu"):
        dual.activation_prepare("mish", x, d1=torch.empty_like(x))
    with pytest.raises(InputError, match="there is nothing to compute"):
        dual.softmax_gradient(x)


def test_one_pass_is_offered_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dual.fused(torch.ones(2)) and dual.fused(torch.ones(2).double())
    assert not dual.fused(torch.ones(0)) and not dual.fused(torch.ones(2).half())
    elsewhere = torch.ones(2, device="meta")  # in the place of a GPU: by the reference alone, then with a native module
    assert not dual.fused(elsewhere)
    monkeypatch.setitem(_registry.available(), "meta", replace(_registry.choose(torch.device("cpu")), name="cuda", device_types=("meta",)))
    assert dual.fused(elsewhere)
