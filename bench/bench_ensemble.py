"""The top eigenvalue of 100 small nets in one call, against a loop of single runs by autograd.

    pytest bench/bench_ensemble.py -s            one table, and a row in bench/results/ensemble.jsonl
    FASTSHARP_BENCH_REPS=5                       interleaved rounds (5)

Target: at least 20 x faster, same values to 1e-5. Both sides start from models and data: operators, preflight (on both sides, or on
neither), products, verification and records are counted. Beside it stand a bare loop (torch's double backward on a kept graph under the
same Lanczos engine: no frozen data, checks, hashes or records), and one product of all members against as many by autograd.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from bench.harness import RESULTS
from bench.machine import stamp
from fastsharp.curvature.ensemble import MlpEnsemble
from fastsharp.krylov.lanczos import lanczos as krylov_lanczos
from fastsharp.operator import CallableOperator

REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "5"))
QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once on few nets, promise nothing
MEMBERS = 6 if QUICK else 100
SAMPLES = 50
TARGET = 20.0


def member(e: int) -> tuple[nn.Module, list[Any]]:
    """A net 2-100-100-2 trained for a while on 50 points of the XOR problem."""
    torch.manual_seed(e)
    model = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
    x = torch.randn(SAMPLES, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5 if QUICK else 100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model, [(x, y)]


def bare(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> fastsharp.Eigenpairs:
    """The top eigenvalue with nothing around it."""
    params = list(model.parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(batch[0]), batch[1]), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])

    def product(v: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return torch.cat([h.reshape(-1) for h in torch.autograd.grad(flat, params, v, retain_graph=True)])

    return krylov_lanczos(CallableOperator(product, flat.numel()), k=1, check="off")


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("preflight", ["off", "fast"])
def test_top_eigenvalue_of_many_nets(benchmark: Any, preflight: str) -> None:
    models, data = zip(*(member(e) for e in range(MEMBERS)), strict=True)

    def ours() -> list[fastsharp.Eigenpairs]:
        return fastsharp.lanczos(list(models), list(data), k=1, preflight=preflight)

    def loop() -> list[fastsharp.Eigenpairs]:
        options: dict[str, Any] = {"k": 1, "backend": "autograd", "preflight": preflight}
        return [fastsharp.lanczos(model, loader, **options) for model, loader in zip(models, data, strict=True)]

    alone = [fastsharp.Hessian(model, loader, backend="autograd") for model, loader in zip(models, data, strict=True)]
    together = MlpEnsemble(alone[0], models, [A.objective.batches for A in alone])
    V = torch.randn(MEMBERS, together.n)
    seconds: dict[str, list[float]] = {"together": [], "loop": [], "bare loop": [], "product together": [], "products one by one": []}
    runs: dict[str, Callable[[], Any]] = {
        "together": ours,
        "loop": loop,
        "bare loop": lambda: [bare(model, loader[0]) for model, loader in zip(models, data, strict=True)],
        "product together": lambda: together.apply(V),
        "products one by one": lambda: [A @ v for A, v in zip(alone, V, strict=True)],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastsharp.errors.NotConvergedWarning)
        for round_ in range(1 if QUICK else REPS + 1):
            outcome = {name: timed(run) for name, run in runs.items()}
            if round_ or QUICK:  # the first round warms up
                for name, (spent, _) in outcome.items():
                    seconds[name].append(spent)
    error = max(
        abs(float(a.eigenvalues[0] / b.eigenvalues[0]) - 1.0) for a, b in zip(outcome["together"][1], outcome["loop"][1], strict=True)
    )
    assert error <= 1e-5

    def ratio(fast: str, slow: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[fast], seconds[slow], strict=True))

    row = {
        "case": f"{MEMBERS} nets 2-100-100-2, {SAMPLES} samples, top eigenvalue, preflight {preflight!r}",
        "target": TARGET,
        "speedup": ratio("together", "loop"),
        "speedup_over_bare_loop": ratio("together", "bare loop"),
        "speedup_of_a_product": ratio("product together", "products one by one"),
        "median_s": {name: statistics.median(spent) for name, spent in seconds.items()},
        "rounds_s": seconds,
        "largest_relative_difference": error,
        "products": sum(r.n_matvec + r.n_verify for r in outcome["together"][1]),
        "tests_green": True,
        **stamp(),
    }
    print(
        f"\n{row['case']}: {row['speedup']:.1f} x faster (bare loop {row['speedup_over_bare_loop']:.1f} x, products {row['speedup_of_a_product']:.1f} x; target {TARGET:g} x), values agree to {error:.0e}"
    )
    print("  " + ", ".join(f"{name} {spent:.3f} s" for name, spent in row["median_s"].items()))
    benchmark.extra_info.update({key: row[key] for key in ("speedup", "speedup_of_a_product", "largest_relative_difference")})
    benchmark.pedantic(ours, rounds=1)
    if QUICK:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "ensemble.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
