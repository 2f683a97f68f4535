"""The basis in float16, and restarted, against all rows in float32: what it does to the values, the memory and the products.

    pytest bench/bench_basis.py -s        rows in bench/results/basis.jsonl

On the Hessian of a trained network, not on a synthetic spectrum: top 12 to 1e-3 (residual). Targets: float16 rows move the values by
1e-6 at most and halve the basis. FASTSHARP_BENCH_N below 1e6 makes a smoke run that writes nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastsharp
from bench.harness import RESULTS
from bench.machine import stamp
from bench.networks import fashion_mlp
from fastsharp.krylov import lanczos, plan
from fastsharp.preflight import preflight

QUICK = float(os.environ.get("FASTSHARP_BENCH_N", "1e7").split(",")[0]) < 1e6
K, TOL = 12, 1e-3


def test_float16_and_restarted_bases_on_a_network(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "UNRATIONED", 0)
    model, batches, name = fashion_mlp(256, 128, 1) if QUICK else fashion_mlp()
    operator = fastsharp.Hessian(model, batches, F.cross_entropy)
    preflight(operator)
    row = plan.padded(operator.n) * 4
    budgets = {"float32": None, "float16": (2 * K + 3) * row + 80 * row // 2, "restarted": (2 * K + K + 10) * row}

    def run(memory: int | None) -> Any:
        return lanczos(operator, k=K, tol=TOL, check="off", memory=memory, seed=0)

    results = {label: run(memory) for label, memory in budgets.items()}
    whole = results["float32"]
    print(f"\nmlp 784-512-512-10 on {name}, n = {operator.n}: top {K} to {TOL:g}")
    rows = []
    for label, result in results.items():
        kept = result.settings["plan"]
        used = (result.n_matvec + 1 if label != "restarted" else kept["rows"]) * row // (2 if kept["storage"] == "float16" else 1)
        change = float(((result.eigenvalues - whole.eigenvalues) / whole.eigenvalues).abs().max())
        print(
            f"  {label:10s} {result.n_matvec} + {result.n_verify} products, {used / 2**20:6.1f} MiB of rows, values moved by {change:.2g}, "
            f"worst residual {float((result.residuals / result.eigenvalues.abs()).max()):.2g}, {int(result.converged.sum())} converged"
        )
        assert kept["storage"] == ("float16" if label == "float16" else "float32")
        rows.append(
            {"basis": label, "products": result.n_matvec, "row_bytes": used, "change": change, **{f"plan_{k}": v for k, v in kept.items()}}
        )
    benchmark.extra_info.update({f"{r['basis']} change": r["change"] for r in rows})
    benchmark.pedantic(lambda: run(budgets["float16"]), rounds=1)
    if QUICK:
        return
    common = {"case": f"mlp 784-512-512-10 on {name}", "n": operator.n, "k": K, "tol": TOL, "tests_green": True, **stamp()}
    with (RESULTS / "basis.jsonl").open("a", encoding="utf-8") as f:
        for r in rows:
            f.write(json.dumps({**r, **common}) + "\n")
    assert results["float16"].n_matvec == whole.n_matvec
    assert rows[1]["change"] <= 1e-6 and 2 * rows[1]["row_bytes"] <= rows[0]["row_bytes"]
    assert torch.equal(results["float16"].converged, whole.converged)
