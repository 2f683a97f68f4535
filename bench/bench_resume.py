"""What a log costs: the top 10 of a trained network with `resume=` and without, and a finished log replayed.

    pytest bench/bench_resume.py -s              one table, and a row in bench/results/resume.jsonl
    FASTSHARP_BENCH_REPS=5                       interleaved rounds (5)
    FASTSHARP_BENCH_DIR=/some/disk               folder of the log (the system's temporary one)

Target: at most 5 % of the wall time: the share is what a recorded product takes beyond the product itself, in the same run, so that
the noise of two runs is not in it. The same bits are checked first. The log lies on a real disk, `fsync` included.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from bench.harness import RESULTS
from bench.machine import stamp
from bench.networks import fashion_mlp
from fastsharp.recorded import RecordedOperator

REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "5"))
QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once on little data, promise nothing
K, TOL = (1, 1e-1) if QUICK else (10, 1e-3)


@pytest.mark.timeout(1200)
def test_cost_of_a_log(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, name = fashion_mlp(epochs=1 if QUICK else 10, samples=200 if QUICK else 4096)
    spent: dict[str, float] = {}
    calls = 0

    def timed(what: str, f: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += what == "fsync"
            began = time.perf_counter()
            try:
                return f(*arguments)
            finally:
                spent[what] = spent.get(what, 0.0) + time.perf_counter() - began

        return call

    monkeypatch.setattr(os, "fsync", timed("fsync", os.fsync))
    monkeypatch.setattr(os, "pwritev", timed("write", os.pwritev))
    monkeypatch.setattr(fastsharp.Hessian, "_apply", timed("products", fastsharp.Hessian._apply))
    monkeypatch.setattr(RecordedOperator, "_apply", timed("products and log", RecordedOperator._apply))

    def run(path: Path | None) -> tuple[float, fastsharp.Eigenpairs]:
        began = time.perf_counter()
        result = fastsharp.lanczos(model, batches, nn.CrossEntropyLoss(), k=K, tol=TOL, preflight="off", resume=path)
        return time.perf_counter() - began, result

    seconds: dict[str, list[float]] = {label: [] for label in ("without", "with", "replayed", "log", "write", "fsync")}
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTSHARP_BENCH_DIR")) as folder:
        for round_ in range(REPS + 1):
            path = Path(folder) / f"{round_}.log"
            plain, want = run(None)
            spent.clear()
            calls = 0
            logged, got = run(path)
            parts = {"log": spent["products and log"] - spent["products"], "write": spent["write"], "fsync": spent["fsync"]}
            syncs = calls
            replayed, again = run(path)
            size = path.stat().st_size
            path.unlink()
            assert all(torch.equal(r.eigenvectors, want.eigenvectors) and torch.equal(r.residuals, want.residuals) for r in (got, again))
            if round_:  # the first one warms up
                for label, value in (("without", plain), ("with", logged), ("replayed", replayed), *parts.items()):
                    seconds[label].append(value)
    median = {label: statistics.median(values) for label, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    share = statistics.median(log / whole for log, whole in zip(seconds["log"], seconds["with"], strict=True))
    row = {
        "case": f"mlp 784-512-512-10 on {name}, {sum(len(y) for _, y in batches)} samples, top {K} to {TOL:g}",
        "products": got.n_matvec + got.n_verify,
        "log_bytes": size,
        "fsyncs": syncs,
        "wall_ratio": ratio,
        "log_share": share,
        "median_s": median,
        "rounds_s": seconds,
        "tests_green": True,
        **stamp(),
    }
    print(f"\n{row['case']}: {row['products']} products, log of {size / 1e6:.1f} MB, {syncs} fsyncs")
    print(f"  wall ratio       {ratio:.3f} (medians {median['with']:.2f} s and {median['without']:.2f} s)")
    print(
        f"  the log's share  {share:.1%}: {median['log']:.3f} s, of which write {median['write']:.3f} s and fsync {median['fsync']:.3f} s"
    )
    print(f"  replayed         {median['replayed']:.2f} s")
    benchmark.extra_info.update({k: row[k] for k in ("products", "wall_ratio", "log_share")})
    benchmark.pedantic(lambda: run(None), rounds=1)
    if QUICK:
        return
    with (RESULTS / "resume.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
