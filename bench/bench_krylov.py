"""alpha, dots, update against the read stream of the machine and against torch's mv and addmv.

    pytest bench/bench_krylov.py -s              one table per size, and rows in bench/results/krylov.jsonl
    FASTSHARP_BENCH_N=1e6 pytest ...             other sizes, comma-separated; FASTSHARP_BENCH_REPS: rounds (9)

Target: dots and update at n = 1e7, j = 50, float32 reach 80 % of the measured read stream. Absolute times are nobody's business:
ratios within one interleaved run are.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench import harness, roofline
from fastsharp.ops import _registry, alpha, dots, update
from tests.ops.cases import case, check_alpha, check_dots, check_update

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
SIZES = [int(float(n)) for n in os.environ.get("FASTSHARP_BENCH_N", "1e6,1e7").split(",")]
REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "9"))
TARGET_PCT = 80


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("j", [20, 50])
@pytest.mark.parametrize("n", SIZES)
def test_bandwidth(benchmark: Any, n: int, j: int, dtype: torch.dtype, device: torch.device) -> None:
    for check in (check_alpha, check_dots, check_update):
        check(case(min(j, 7), 10007, dtype, pad=5, device=device))
    basis = torch.empty(j + 1, n, dtype=dtype, device=device).normal_()
    V, w, size = basis[:j], basis[j], basis.element_size()
    ab = torch.tensor([1e-3, 2e-3], dtype=torch.float64, device=device)
    none = torch.zeros_like(ab)
    c = torch.full((j,), 1e-6, dtype=torch.float64, device=device)
    sums, one = torch.empty(j + 1, dtype=torch.float64, device=device), torch.empty(1, dtype=torch.float64, device=device)
    rounded = c.to(dtype)
    variants = [
        *roofline.read_variants(V),
        harness.Variant("alpha", lambda: alpha(V[-1], w, out=one), 2 * n * size),
        harness.Variant("dots", lambda: dots(V, w, ab, out=sums), (j + 2) * n * size),
        harness.Variant("dots, second pass", lambda: dots(V, w, none, out=sums), (j + 1) * n * size),
        harness.Variant("update", lambda: update(V, w, c, out=one), (j + 2) * n * size),
        harness.Variant("torch.mv", lambda: torch.mv(V, w), (j + 1) * n * size),
        harness.Variant("torch.addmv", lambda: torch.addmv(w, V.T, rounded, out=w, alpha=-1), (j + 2) * n * size),
    ]
    timings = harness.interleaved(variants, REPS, device)
    roof, by = roofline.ceiling(timings)
    backend = _registry.choose(device).name
    print(f"\n{backend} on {device}, {dtype}, n = {n}, j = {j}, {torch.get_num_threads()} threads; ceiling {roof:.2f} GB/s ({by})")
    for t in timings.values():
        print(
            f"  {t.variant.name:18s} {1e3 * t.median:9.2f} ms  [{1e3 * t.q20:.2f}, {1e3 * t.q80:.2f}]  {t.gbps:8.2f} GB/s  {100 * t.gbps / roof:5.1f} %"
        )
        if t.variant.name not in roofline.READS:
            benchmark.extra_info[t.variant.name] = {"gbps": t.gbps, "roofline_pct": 100 * t.gbps / roof}
    harness.write_rows(
        harness.RESULTS / "krylov.jsonl", timings, roof, backend=backend, device=str(device), dtype=str(dtype), n=n, j=j, ceiling=by
    )
    if j == 50 and dtype == torch.float32:
        for op in ("dots", "update"):
            benchmark.extra_info[f"{op} meets {TARGET_PCT} %"] = bool(100 * timings[op].gbps / roof >= TARGET_PCT)
    benchmark.pedantic(variants[[v.name for v in variants].index("dots")].run, rounds=3, warmup_rounds=1)
