"""The Triton kernels: in triton's interpreter where there is no GPU, compiled where there is one, and ahead of time for both.

tests/conftest.py sets TRITON_INTERPRET before any test module is imported, since triton decides once, at its first import.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsharp.errors import KernelError
from fastsharp.ops import _registry, alpha, dots, force, probes, update
from tests.ops import triton_cases as cases
from tests.ops.triton_cases import (
    DEVICE,
    INTERPRETED,
    STORAGE,
    check_alpha,
    check_combine,
    check_dots,
    check_probes,
    check_update,
    ensemble,
    interpreter_or_skip,
)
from tests.tolerance import exact

interpreter_or_skip()

from fastsharp.ops.triton import krylov  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [  # E, b, j, n: one element, ragged and whole tiles, more than a row group, every count of vectors up to two groups
    (1, 1, 1, 1),
    (2, 1, 3, 130),
    (1, 1, 9, 2300),
    (1, 2, 5, 1024),
    (2, 3, 2, 1025),
    (1, 9, 1, 300),
]


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Ahead-of-time compilation in a process beside the other tests of this file; its own test comes last."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.triton_compile", "80", "90"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with force("triton"):
        yield


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dots(shape: tuple[int, int, int, int], storage: torch.dtype) -> None:
    check_dots(ensemble(*shape, storage), removed=shape[1] == 1)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(shape: tuple[int, int, int, int], storage: torch.dtype) -> None:
    check_update(ensemble(*shape, storage), with_row=shape[1] == 1)


@pytest.mark.parametrize("dtype", STORAGE[:2], ids=str)
@pytest.mark.parametrize(("E", "n"), [(1, 1), (3, 1500)])
def test_alpha(E: int, n: int, dtype: torch.dtype) -> None:
    check_alpha(E, n, dtype)


def test_a_second_stage_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "_SUM_BLOCK", 2)
    check_alpha(1, 5 * krylov.TILE - 1, torch.float32)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize(("k", "j", "n"), [(1, 1, 1), (3, 7, 300), (9, 2, 1025)])
def test_combine(k: int, j: int, n: int, storage: torch.dtype) -> None:
    check_combine(k, j, n, storage)


@pytest.mark.parametrize("dtype", STORAGE[:2], ids=str)
@pytest.mark.parametrize(("seed", "first"), [(0, 0), (-5, 2**32 - 1), (2**64 - 1, 2**61)])
@pytest.mark.parametrize(("kind", "n"), [("rademacher", 1), ("rademacher", 2183), ("normal", 3), ("normal", 1030)])
def test_probes_are_the_stream_of_the_reference(kind: str, n: int, seed: int, first: int, dtype: torch.dtype) -> None:
    check_probes(kind, 2, n, dtype, seed, first)


def test_signs_are_the_published_words_of_philox() -> None:
    """Random123's known answer for counter 0 and key 0."""
    out = torch.zeros(1, 128, device=DEVICE)
    probes("rademacher", out=out, seed=0)
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert out[0].tolist() == [-1.0 if word >> bit & 1 else 1.0 for word in words for bit in range(32)]


def test_zero_coefficients_read_no_row_and_leave_w_bitwise() -> None:
    p = ensemble(1, 1, 2, 1100, torch.float32)
    before = p.w.clone()
    infinite = torch.full_like(p.w[0, 0], torch.inf)
    out = cases.nans(3)
    dots(p.V[0], p.w[0, 0], torch.zeros_like(p.ab[0]), last=(infinite, infinite), out=out)
    assert torch.equal(p.w, before) and bool(out.isfinite().all())


@pytest.mark.parametrize("skipped", [0, 1])
def test_one_zero_coefficient_skips_that_term_alone(skipped: int) -> None:
    p = ensemble(1, 1, 2, 200, torch.float64)
    last = list(p.last)
    last[skipped] = torch.full_like(last[0], torch.inf)
    p.ab[0, skipped] = 0
    want = p.w[0, 0] - p.ab[0, 1 - skipped] * last[1 - skipped][0]
    dots(p.V[0], p.w[0, 0], p.ab[0], last=(last[0][0], last[1][0]), out=cases.nans(3))
    torch.testing.assert_close(p.w[0, 0], want, rtol=0, atol=4e-15)


def test_beta_is_ignored_for_the_first_row() -> None:
    p = ensemble(1, 1, 1, 200, torch.float32)
    p.ab[0, 1] = torch.nan
    out = cases.nans(2)
    dots(p.V[0], p.w[0, 0], p.ab[0], out=out)
    assert bool(out.isfinite().all()) and bool(p.w.isfinite().all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy in the interpreter
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_reaches_the_results_and_inf_stays_inf(bad: float) -> None:
    """Also beside the columns that a ragged tile does not have, where inf * 0 must not become a NaN."""
    p = ensemble(1, 1, 3, 1100, torch.float32)
    p.c[0, 0, 1], p.ab[0, 0] = bad, bad
    squares = cases.nans(1), cases.nans(4)
    update(p.V[0], p.w[0, 0].clone(), p.c[0, 0], out=squares[0])
    dots(p.V[0], p.w[0, 0], p.ab[0], last=(p.last[0][0], p.last[1][0]), out=squares[1])
    for ww in (squares[0][0], squares[1][3]):
        assert bool(ww == torch.inf) if bad == torch.inf else bool(ww.isnan())


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extreme_scales_neither_overflow_nor_underflow(scale: float) -> None:
    for check in (lambda p: check_dots(p, True), lambda p: check_update(p, True)):
        p = ensemble(1, 1, 3, 1100, torch.float32)
        p.w.mul_(scale)
        p.ab.mul_(min(scale, 1.0))
        p.c.mul_(min(scale, 1.0))
        check(p)


def test_results_are_bitwise_repeatable_and_independent_of_stride() -> None:
    results = []
    for pad in (0, 0, 5):
        p = ensemble(1, 1, 5, 3000, torch.float32, pad)
        out, square = cases.nans(6), cases.nans(1)
        dots(p.V[0], p.w[0, 0], p.ab[0], out=out)
        update(p.V[0], p.w[0, 0], p.c[0, 0], out=square)
        results.append(torch.cat([out, square, p.w[0, 0].double()]))
    assert torch.equal(results[0], results[1]) and (not INTERPRETED or torch.equal(results[0], results[2]))


@pytest.mark.skipif(not INTERPRETED, reason="needs 8 GiB of device memory; the interpreter runs it on memory that is never touched")
def test_rows_and_members_beyond_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets are int64 in elements; bytes would wrap at half of that in int32."""
    from triton.runtime.interpreter import GridExecutor

    # the interpreter copies whole storages in and out; on the CPU it need not, and here it must not
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    far, n = 2**31 + 16, 70
    memory = mmap.mmap(-1, 2 * (3 * far + n), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    flat = torch.from_numpy(np.frombuffer(memory, dtype=np.float16))
    V = flat.as_strided((2, 2, n), (2 * far, far, 1))
    V.copy_(torch.randn(2, 2, n))
    w, out, square, c = torch.randn(2, n), cases.nans(2, 3), cases.nans(2), torch.randn(2, 2, dtype=torch.float64)
    dots(V, w, out=out)
    np.testing.assert_allclose(out[:, :2].numpy(), np.einsum("ejn,en->ej", exact(V), exact(w)).astype(float), atol=1e-4)
    want = w.double() - torch.einsum("ej,ejn->en", c, V.double())
    update(V, w, c, out=square)
    torch.testing.assert_close(w.double(), want, rtol=1e-6, atol=1e-6)


def test_a_failing_launch_is_a_kernel_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int]) -> Any:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(krylov.kernels, "alpha", Broken())
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(KernelError, match=r"Triton kernel failed: .*illegal memory access.*Use force\('reference'\)"):
        alpha(x, x, out=cases.nans(1))


def test_it_is_used_by_force_alone_imported_by_the_first_op_and_says_why_it_is_missing() -> None:
    code = """if True:
        import os, sys, torch, fastsharp
        from fastsharp.ops import _registry, alpha, force, triton as column
        x, out = torch.ones(3), torch.zeros(1, dtype=torch.float64)
        alpha(x, x, out=out)
        assert "triton" not in sys.modules and _registry.choose(x.device).name != "triton"
        print(column.backend())
        import triton
        os.environ["TRITON_INTERPRET"] = "1"
        print(column.backend())
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    early, late = run.stdout.splitlines()
    assert early.startswith("torch sees no GPU (TRITON_INTERPRET=1")
    assert late.startswith("triton was imported before TRITON_INTERPRET=1 was set, and torch sees no GPU")


def test_without_triton_the_backend_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsharp.ops import triton as column

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert column.backend() == "triton is not installed"


def test_backend_is_listed() -> None:
    assert isinstance(_registry.available()["triton"], _registry.Backend)


def test_every_kernel_compiles_for_gpus_that_are_not_here(compiler: subprocess.Popen[str]) -> None:
    """To machine code of sm_80 and sm_90, with no atomics, and with loads of 16 bytes where n is a multiple of 16."""
    output, errors = compiler.communicate(timeout=240)
    assert compiler.returncode == 0, errors
    head, *rows = [json.loads(line) for line in output.splitlines()]
    if "skipped" in head:
        pytest.skip(head["skipped"])
    names = {row["kernel"].partition("[")[0] for row in rows}
    duals = {*_registry.Dual.__dataclass_fields__, "norm_gradients", "add_partials", "paired"}
    assert names == {"alpha", "dots", "update", "sum_partials", "combine", "rademacher", "normal", *duals} and len(rows) == 33
    assert {row["sm"] for row in rows} == {80, 90}
    for row in rows:
        assert row["bytes"] > 1000 and row["atomics"] == 0 and not row["recompiled_for"], row
        assert row["vector_loads"] or not row["kernel"].startswith(("alpha", "dots", "update", "combine", *duals)), row
    assert all(row["rounds_bf16"] for row in rows if row["kernel"].startswith("update[bf16"))
