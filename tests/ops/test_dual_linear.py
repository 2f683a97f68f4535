"""Sums of two products: a linear layer's tangent and its adjoints, by torch and by the Triton kernel, against float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsharp.ops import _registry, dual_linear, force
from fastsharp.ops.dual_linear import Measured, gather
from tests.ops.linear_cases import check_sums, sums
from tests.ops.test_triton_mutants import altered
from tests.ops.triton_cases import DEVICE, INTERPRETED

SIZES = [(1, 1, 1, 1), (2, 5, 7, 3), (3, 70, 35, 66)]  # b, rows, inputs, outputs: inside and beyond one tile of the kernel
MUTANTS = [  # what is written in the kernel, and the mistake
    ("A += v * A_vector", ""),
    ("range(0, inner, BK)", "range(0, BK, BK)"),
    ("(acc, C, C_stride,", "(acc, A, A_stride,"),
    ("acc *= ALPHA", "acc *= ALPHA * ALPHA"),
    ("if ADD:", "if not ADD:"),
    ("tile // rows * BN", "0 * BN"),
]


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, int, int, int], backend: str, dtype: torch.dtype, alpha: float) -> None:
    if backend == "triton":
        if isinstance(_registry.available()["triton"], str):
            pytest.skip("triton cannot run here")
        if dtype == torch.bfloat16 and INTERPRETED:
            pytest.skip("triton's interpreter multiplies the bits of bfloat16 matrices")
    with force("triton" if backend == "triton" else "reference"):
        check_sums(*size, dtype, DEVICE, alpha)


@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_a_wrong_kernel_is_caught(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if not INTERPRETED:
        pytest.skip("a wrong kernel may write anywhere on a GPU")
    from fastsharp.ops.triton import dual as column

    monkeypatch.setattr(column, "product_kernels", altered(column, "product_kernels", right, wrong, tmp_path))
    with force("triton"), pytest.raises(AssertionError):
        check_sums(3, 70, 35, 66, torch.float32, DEVICE, -0.5)


def test_torchs_path_is_two_calls_with_the_same_bits() -> None:
    out, first, second = sums(2, 5, 7, 3, torch.float32, DEVICE)["adjoint of W"]
    assert out is not None
    want = gather(gather(out.clone(), *first, 2), *second, 2)
    with force("reference"):
        got = dual_linear.dual_linear(out, first, second)
    assert got is out and torch.equal(want, got)


def test_a_missing_pair_is_zero() -> None:
    second = sums(2, 5, 7, 3, torch.float64, DEVICE)["tangent"][2]
    alone = dual_linear.dual_linear(None, None, second)
    assert alone is not None
    torch.testing.assert_close(alone, second[0] @ second[1])
    assert dual_linear.dual_linear(None, None, None) is None


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
