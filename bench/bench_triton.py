"""The Triton kernels against the native CUDA kernels and torch's matrix-vector products; needs a GPU.

    pytest bench/bench_triton.py -s              one table per case, and rows in bench/results/krylov.jsonl
    FASTSHARP_BENCH_N=1e6 pytest ...             other sizes, comma-separated; FASTSHARP_BENCH_REPS: rounds (9)

All variants run interleaved on the same tensors. The interpreter is no rival of anything: without a GPU everything is skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench import harness, roofline
from fastsharp.ops import _registry, alpha, combine, dots, force, probes, update
from tests.ops.triton_cases import check_alpha, check_combine, check_dots, check_probes, check_update, ensemble

SIZES = [int(float(n)) for n in os.environ.get("FASTSHARP_BENCH_N", "1e6,1e7").split(",")]
REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "9"))
J, K = 50, 10
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton is compiled for a GPU, and torch sees none")


@pytest.fixture
def backends() -> list[str]:
    """Triton and, where it is built, the native backend; the checkers pass on Triton before anything is timed."""
    found = _registry.available()
    if isinstance(found["triton"], str):
        pytest.skip(found["triton"])
    with force("triton"):
        check_alpha(1, 10007, torch.float32)
        check_dots(ensemble(1, 1, 7, 10007, torch.float16), removed=True)
        check_update(ensemble(1, 1, 7, 10007, torch.float16), with_row=True)
        check_combine(9, 7, 10007, torch.float32)
        check_probes("normal", 2, 10007, torch.float32, 1, 0)
    return ["triton", *(["cuda"] if not isinstance(found["cuda"], str) else [])]


@pytest.mark.parametrize("storage", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize("n", SIZES)
def test_against_native_and_torch(benchmark: Any, backends: list[str], n: int, b: int, storage: torch.dtype) -> None:
    device, dtype = torch.device("cuda"), torch.float64 if storage == torch.float64 else torch.float32
    V = torch.empty(J, n, dtype=dtype, device=device).normal_().to(storage)
    w = torch.empty(b, n, dtype=dtype, device=device).normal_()
    c = torch.full((b, J), 1e-6, dtype=torch.float64, device=device)
    sums, squares = torch.empty(b, J + 1, dtype=torch.float64, device=device), torch.empty(b, dtype=torch.float64, device=device)
    S, out = torch.randn(K, J, dtype=torch.float64, device=device), torch.empty(K, n, dtype=dtype, device=device)
    rows, vector, result = V.numel() * V.element_size(), n * w.element_size(), out.numel() * out.element_size()

    def variants_of(name: str) -> list[harness.Variant]:
        def forced(op: Any, *args: Any, **kwargs: Any) -> Any:
            def run() -> None:
                with force(name):
                    op(*args, **kwargs)

            return run

        ops = [
            ("dots", forced(dots, V, w, out=sums), rows + b * vector),
            ("update", forced(update, V, w, c, out=squares), rows + 2 * b * vector),
        ]
        if b == 1:
            ops += [
                ("alpha", forced(alpha, w[0], w[0], out=squares), vector),
                ("combine", forced(combine, S, V, out=out), rows + result),
                ("probes", forced(probes, "rademacher", out=out, seed=1), result),
            ]
        return [harness.Variant(f"{name}: {op}", run, moved, {"b": b, "storage": str(storage)}) for op, run, moved in ops]

    variants = [*roofline.read_variants(V), *(v for name in backends for v in variants_of(name))]
    if storage == dtype:
        variants.append(harness.Variant("torch.mv", lambda: V @ w.T, rows + b * vector, {"b": b, "storage": str(storage)}))
    timings = harness.interleaved(variants, REPS, device)
    roof, by = roofline.ceiling(timings)
    print(f"\n{torch.cuda.get_device_name()}, {storage}, n = {n}, j = {J}, b = {b}; ceiling {roof:.2f} GB/s ({by})")
    for t in timings.values():
        print(f"  {t.variant.name:20s} {1e3 * t.median:9.3f} ms  {t.gbps:8.1f} GB/s  {100 * t.gbps / roof:5.1f} %")
    fields = {"device": "cuda", "dtype": str(dtype), "n": n, "j": J, "ceiling": by}
    for name in backends:
        own = {key: t for key, t in timings.items() if key.startswith(name)}
        harness.write_rows(harness.RESULTS / "krylov.jsonl", own, roof, backend=name, **fields)
    rest = {key: t for key, t in timings.items() if not key.startswith(tuple(f"{name}:" for name in backends))}
    harness.write_rows(harness.RESULTS / "krylov.jsonl", rest, roof, backend="torch", **fields)
    benchmark.pedantic(variants_of("triton")[0].run, rounds=3, warmup_rounds=1)
