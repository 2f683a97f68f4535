"""Sums of two products: a linear layer's tangent and its adjoints, by torch and by the Triton kernel, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastsharp.ops import _registry, dual_linear, force
from fastsharp.ops.dual_linear import Measured, gather
from tests.ops.triton_cases import DEVICE, INTERPRETED
from tests.tolerance import assert_close, eps, exact

op = dual_linear.dual_linear
SIZES = [(1, 1, 1, 1), (2, 5, 7, 3), (3, 70, 35, 66)]  # b, rows, inputs, outputs: beside and beyond one tile of the kernel


def factors(
    b: int, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor | None, list[Tensor], list[Tensor]]]:
    """out, (A, B), (C, D) of the tangent, the adjoint of x and, added to a part of something wider, that of W."""
    g = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)

    x, W, y_g = normal(rows, inputs), normal(outputs, inputs), normal(rows, outputs)
    x_t, W_t, y_gt = normal(b, rows, inputs), normal(b, outputs, inputs), normal(b, rows, outputs)
    flat = normal(b, outputs * inputs + 5)
    return {
        "tangent": (None, [x, W_t.mT], [x_t, W.t()]),
        "adjoint of x": (None, [y_gt, W], [y_g, W_t]),
        "adjoint of W": (flat[:, 3:-2].view(b, outputs, inputs), [y_gt.mT, x], [y_g.t(), x_t]),
    }


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, int, int, int], backend: str, dtype: torch.dtype, alpha: float) -> None:
    """Off by n + 2 roundings of the sum of moduli at most, and in half precision by one of the result for each call."""
    if backend == "triton":
        if isinstance(_registry.available()["triton"], str):
            pytest.skip("triton cannot run here")
        if dtype == torch.bfloat16 and INTERPRETED:
            pytest.skip("triton's interpreter multiplies the bits of bfloat16 matrices")
    for name, (out, first, second) in factors(*size, dtype).items():
        before = 0 if out is None else exact(out)
        want, terms = before, abs(before)
        for A, B in (first, second):
            want = want + alpha * (exact(A) @ exact(B))
            terms = terms + abs(alpha) * (abs(exact(A)) @ abs(exact(B)))
        length = 2 * first[0].shape[-1]
        with force("triton" if backend == "triton" else _registry.choose(DEVICE)):
            got = op(out, (first[0], first[1]), (second[0], second[1]), alpha)
        assert got is not None and (out is None or got is out)
        inner = dtype if dtype == torch.float64 else torch.float32
        rounding = 0.0 if dtype == inner else 2 * eps(dtype)
        assert_close(got, want, (length + 2) * eps(inner) * terms + rounding * terms + 1e-30, f"{name} by {backend}")


def test_torchs_path_is_two_calls_with_the_same_bits() -> None:
    out, first, second = factors(2, 5, 7, 3, torch.float32)["adjoint of W"]
    assert out is not None
    want = gather(gather(out.clone(), first[0], first[1], 2), second[0], second[1], 2)
    with force("reference"):
        assert torch.equal(want, op(out, (first[0], first[1]), (second[0], second[1])))  # type: ignore[arg-type]


def test_a_missing_pair_is_zero() -> None:
    _, _, second = factors(2, 5, 7, 3, torch.float64)["tangent"]
    alone = op(None, None, (second[0], second[1]))
    assert alone is not None
    torch.testing.assert_close(alone, second[0] @ second[1])
    assert op(None, None, None) is None


def test_the_choice_is_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.ones(2, 64, 32, dtype=torch.bfloat16), torch.ones(32, 16, dtype=torch.bfloat16)
    assert dual_linear.FASTER == () and dual_linear.paired_kernel(left, right) is None
    monkeypatch.setattr(dual_linear, "FASTER", (Measured((9, 0), torch.bfloat16, 64, 16, 32),))
    assert dual_linear.listed((9, 0), left, right)
    assert not dual_linear.listed((8, 0), left, right) and not dual_linear.listed((9, 0), left.float(), right.float())
    assert not dual_linear.listed((9, 0), left[:, 1:], right) and not dual_linear.listed((9, 0), left, right[:, 1:])
    assert not dual_linear.listed((9, 0), left[..., 1:], right[1:])
    assert dual_linear.paired_kernel(left, right) is None  # tensors of a CPU stay with torch


def test_a_backend_with_the_kernel_is_asked_for_what_it_takes() -> None:
    def paired(*_: object) -> Tensor:
        return torch.zeros(0)

    with force(replace(_registry.choose(torch.device("cpu")), paired=paired)):
        assert dual_linear.paired_kernel(torch.ones(2, 3), torch.ones(3, 2)) is paired
        assert dual_linear.paired_kernel(torch.ones(2, 3).double(), torch.ones(3, 2).double()) is None
