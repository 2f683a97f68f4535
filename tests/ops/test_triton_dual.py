"""The Triton twins of the dual ops, in triton's interpreter where there is no GPU, against double backward; and faults made in their source.

Ahead of time they are compiled with the others, in test_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastsharp.ops import dual, force
from tests.ops.dual_cases import CURVES, check_activation, check_norm, check_softmax
from tests.ops.test_triton_mutants import altered
from tests.ops.triton_cases import DEVICE, INTERPRETED

pytest.importorskip("triton")

from fastsharp.ops.triton import dual as column

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy in the interpreter, where -inf - -inf is not used
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with force("triton"):
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that odd sizes do not fit: several to a row, several strips, several shares."""
    for name, value in (("LARGEST_BLOCK", 16), ("STRIP", 32), ("ROWS_OF_A_SHARE", 2), ("SHARES", 2)):
        monkeypatch.setattr(column, name, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CURVES)
def test_activations(name: str, dtype: torch.dtype) -> None:
    check_activation(name, 2, 3, 7, dtype, DEVICE)


@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, center: bool) -> None:
    check_norm(center, 1, 1, 1, dtype, DEVICE)
    check_norm(center, 2, 3, 33, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype: torch.dtype) -> None:
    check_softmax(1, 1, 1, dtype, DEVICE)
    check_softmax(2, 4, 33, dtype, DEVICE)
    check_softmax(1, 4, 300, dtype, DEVICE, scale=100.0)  # most probabilities underflow


def test_several_blocks_strips_and_shares(small: None) -> None:
    check_activation("gelu", 2, 5, 35, torch.float32, DEVICE)
    check_norm(True, 2, 5, 35, torch.float32, DEVICE)
    check_softmax(2, 5, 35, torch.float32, DEVICE)


@pytest.mark.parametrize(("bad", "zeros"), [(-torch.inf, 20), (torch.inf, 0), (torch.nan, 0)])
def test_logits_that_are_not_finite(bad: float, zeros: int, small: None) -> None:
    """-inf is a probability of zero, also for the first blocks of a row; +inf and NaN take their row, and no other."""
    z, p = torch.randn(2, 35, device=DEVICE), torch.full((2, 35), torch.nan, device=DEVICE)
    z[0, : zeros or 1] = bad
    dual.softmax_gradient(z, p=p)
    assert bool(p[1].isfinite().all()) and bool(p[0].isnan().all()) == (zeros == 0)
    if zeros:
        assert not bool(p[0, :zeros].any())
        torch.testing.assert_close(p, torch.softmax(z, 1))


MUTANTS = [  # each stays inside the buffers of its check: what is written there, the mistake, the check that must see it
    ("k, r = row_of(b)", "k, r = 0 * row_of(b)[0], row_of(b)[1]", "norm"),
    ("for r in range(first, end):", "for r in range(first, end - 1):", "norm"),
    ("s1 += (wide(x, at, at < n, 0.0) - middle) * rstd * t", "s1 += (wide(x, at, at < n, 0.0) - middle) * t", "norm"),
    ("(wide(x_t, at, at < n, 0.0) - mean - h * along) * rstd", "(wide(x_t, at, at < n, 0.0) - mean) * rstd", "norm"),
    ("h_t * g_along + (weight", "(weight", "norm"),
    ("tl.where(at < n, tl.load(x + at, mask=at < n, other=0).to(tl.float64) - mean, 0)",
     "tl.load(x + at, mask=at < n, other=0).to(tl.float64) - mean", "norm"),
    ("for share in range(0, shares):", "for share in range(0, 1):", "rows"),
    ("partial += (share * b + k) * 2 * n", "partial += share * b * 2 * n", "norm"),
    ("g += c * tl.load(a_t", "g -= c * tl.load(a_t", "activation"),
    ("density * (2 - a * a)", "density * (1 - a * a)", "activation"),
    ("total += g.to(tl.float64)", "total += g.to(tl.float16)", "activation"),
    ("s * _share_of(m, top) + whole", "s + whole", "softmax"),
    ("mask=(at < n) & live, other=-float", "mask=at < n, other=-float", "softmax"),
    ("tl.where(at == hit, 1 - smoothing", "tl.where(at == hit, 0 * smoothing + 1", "softmax"),
    ("(wide(u, at, (at < n) & live, 0.0) - total)", "wide(u, at, (at < n) & live, 0.0)", "softmax"),
]  # fmt: skip
CHECKS: dict[str, Callable[[], None]] = {
    "rows": lambda: check_norm(True, 2, 5, 35, torch.float32, DEVICE),
    "norm": lambda: check_norm(True, 2, 5, 35, torch.float32, DEVICE),
    "activation": lambda: check_activation("gelu", 2, 5, 35, torch.float32, DEVICE),
    "softmax": lambda: check_softmax(2, 5, 35, torch.float32, DEVICE),
}


@pytest.mark.skipif(not INTERPRETED, reason="a wrong kernel may write anywhere on a GPU")
@pytest.mark.parametrize(("right", "wrong", "check"), MUTANTS, ids=[f"{i}-{m[2]}" for i, m in enumerate(MUTANTS)])
def test_a_wrong_kernel_is_caught(right: str, wrong: str, check: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = "row_kernels" if check == "rows" else f"{check}_kernels"
    monkeypatch.setattr(column, file, altered(column, file, right, wrong, tmp_path))
    with pytest.raises(AssertionError):
        CHECKS[check]()
