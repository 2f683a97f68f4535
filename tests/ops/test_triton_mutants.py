"""Triton kernels with one mistake each, made in their source: the checkers behind tests/ops/test_triton.py must go red on all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastsharp.ops import force
from tests.ops.triton_cases import (
    INTERPRETED,
    check_alpha,
    check_combine,
    check_dots,
    check_probes,
    check_update,
    ensemble,
    interpreter_or_skip,
)

interpreter_or_skip()

from fastsharp.ops.triton import krylov  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a wrong kernel may write anywhere on a GPU")

MUTANTS = [  # each stays inside the buffers of its check: file, what is written there, the mistake, the check that must see it
    ("kernels", "return program // tiles, tile, start, n - start", "return 0 * tile, tile, start, n - start", "dots E"),
    ("kernels", "first * tl.load(v1", "-first * tl.load(v1", "dots"),
    ("kernels", "tl.load(ab + 1 + one)", "tl.load(ab + one)", "dots"),
    ("kernels", "tl.store(to_w, x, mask=here & changed)", "", "dots"),
    ("kernels", "tl.sum(x, axis=3).to(tl.float64), axis=2", "tl.sum(x, axis=3).to(tl.float16).to(tl.float64), axis=2", "dots"),
    ("kernels", "mask=(i < b) & (r < j))", "mask=(i < b) & (r <= j))", "dots"),
    ("kernels", "(r < j)[:, :, None, None] & inside, other=0).to(x.dtype)", "(r < j)[:, :, None, None], other=0).to(x.dtype)", "dots"),
    ("kernels", "outer % groups * B", "0 * B", "dots b"),
    ("kernels", "c + (i * c_row + r)", "c + r", "update b"),
    ("kernels", "tl.sum(a * rows, axis=1, keep_dims=True)", "tl.sum(a.to(tl.float16) * rows, axis=1, keep_dims=True)", "update"),
    ("kernels", "tl.load(factor) * x", "x", "update"),
    ("kernels", "row += e * row_member + start", "row += e * row_member", "update"),
    ("kernels", "vector % b * out_row", "0", "update b"),
    ("kernels", "range(0, tiles, BLOCK)", "range(0, BLOCK, BLOCK)", "alpha"),
    ("vectors", "tl.join(tl.join(a, c), tl.join(b, d))", "tl.join(tl.join(a, b), tl.join(c, d))", "probes"),
    ("vectors", "(stream >> 32).to(tl.uint32)", "tl.zeros_like(stream).to(tl.uint32)", "probes"),
    ("vectors", "radius * tl.cos(angle), radius * tl.sin(angle)", "radius * tl.sin(angle), radius * tl.cos(angle)", "normal"),
    ("vectors", "range(0, k, K)", "range(0, K, K)", "combine"),
]  # fmt: skip
CHECKS: dict[str, Callable[[], None]] = {
    "dots": lambda: check_dots(ensemble(1, 1, 5, 1100, torch.float32), removed=True),
    "dots E": lambda: check_dots(ensemble(2, 1, 2, 200, torch.float32), removed=False),
    "dots b": lambda: check_dots(ensemble(1, 9, 1, 50, torch.float32), removed=False),
    "update": lambda: check_update(ensemble(1, 1, 5, 1100, torch.float32), with_row=True),
    "update b": lambda: check_update(ensemble(1, 3, 2, 200, torch.float32), with_row=False),
    "alpha": lambda: check_alpha(1, 5 * krylov.TILE - 1, torch.float32),
    "probes": lambda: check_probes("rademacher", 2, 300, torch.float32, 7, 2**33),
    "normal": lambda: check_probes("normal", 2, 300, torch.float32, 7, 2**33),
    "combine": lambda: check_combine(9, 3, 200, torch.float32),
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_pass_what_their_mutants_fail(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "_SUM_BLOCK", 2)
    with force("triton"):
        CHECKS[check]()


@pytest.mark.parametrize(("file", "right", "wrong", "check"), MUTANTS, ids=[f"{i}-{m[3]}" for i, m in enumerate(MUTANTS)])
def test_a_wrong_kernel_is_caught(file: str, right: str, wrong: str, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, file, altered(krylov, file, right, wrong, tmp_path))
    monkeypatch.setattr(krylov, "_SUM_BLOCK", 2)
    with force("triton"), pytest.raises(AssertionError):
        CHECKS[check]()


def altered(column: ModuleType, file: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """The kernels with one mistake; a file of their own, since triton reads the source."""
    text = Path(getattr(column, file).__file__).read_text(encoding="utf-8")
    assert text.count(right) >= 1, f"{right!r} is no longer in {file}.py"
    path = folder / f"mutant_{file}.py"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
