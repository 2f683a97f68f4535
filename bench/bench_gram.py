"""The whole non-zero spectrum of a batch's Gauss-Newton matrix: its Gram matrix beside m = 100 products with the matrix.

    pytest bench/bench_gram.py -s                one table, and rows in bench/results/gram.jsonl
    FASTSHARP_BENCH_REPS=3                       interleaved rounds (3)

The rival is what any Lanczos or SLQ run pays at least: 100 products of `fastsharp.GGN`, its graph kept, in blocks of 10, without a
basis, without orthogonalisation. It gives some eigenvalues or a density; the Gram matrix gives all of them. Construction and preflight
count on neither side. Target: the dispatch rule (`equivalent_products` against 100) names the faster way on every case whose ratio is
not within a factor of 4 of one; the rule counts FLOPs, and matrix products of different shapes run at different rates.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from bench.harness import RESULTS, Variant, interleaved
from bench.machine import stamp
from fastsharp.api.ggn_spectrum import _eigen
from fastsharp.curvature.gram import gram

QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once, promise nothing
REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "3"))
M = 100


def mlp(samples: int, classes: int) -> tuple[nn.Module, Any]:
    """784-1000-1000-C: each weight serves a sample once."""
    net = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, classes))
    return net, (torch.randn(samples, 784), torch.arange(samples) % classes)


def cnn(samples: int, classes: int) -> tuple[nn.Module, Any]:
    """Three convolutions on 16 x 16 images: explicit rows of the kernels."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip
    return net, (torch.randn(samples, 3, 16, 16), torch.arange(samples) % classes)


CASES = {"mlp, 32 x 10": (mlp, 32, 10), "mlp, 128 x 10": (mlp, 128, 10), "cnn, 32 x 10": (cnn, 32, 10), "cnn, 128 x 10": (cnn, 128, 10)}

if QUICK:
    CASES = {"mlp, 4 x 3": (mlp, 4, 3), "cnn, 4 x 3": (cnn, 4, 3)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_gram_against_a_hundred_products(case: str, benchmark: Any) -> None:
    make, samples, classes = CASES[case]
    torch.manual_seed(0)
    model, batch = make(samples, classes)
    operator = fastsharp.GGN(model, batch)
    result = fastsharp.ggn_spectrum(model, batch, preflight="off")
    top = fastsharp.lanczos(operator, k=1, tol=1e-3, seed=0)
    assert abs(float(top.eigenvalues[0]) / float(result.eigenvalues[0]) - 1) <= 1e-4  # both sides measure the same matrix
    V = torch.randn(10, operator.n)
    out = torch.empty_like(V)

    def products() -> None:
        for _ in range(M // 10):
            operator.apply(V, out)

    def ours() -> None:
        _eigen(gram(operator.objective, 20_000, 8 << 30), vectors=False)

    variants = [Variant("gram", ours, 0), Variant("products", products, 0)]
    timing = benchmark.pedantic(lambda: interleaved(variants, REPS, torch.device("cpu")), rounds=1, iterations=1)
    measured = timing["products"].median / timing["gram"].median
    predicted = M / result.equivalent_products
    row = {
        "case": case,
        "n": result.n,
        "rows": result.rows,
        "gram_s": timing["gram"].median,
        "gram_q": [timing["gram"].q20, timing["gram"].q80],
        f"products_{M}_s": timing["products"].median,
        "speedup": measured,
        "speedup_by_flops": predicted,
        "equivalent_products": result.equivalent_products,
        "reps": REPS,
        "error": result.error,
    }
    benchmark.extra_info.update(row)
    print(f"\n{case}: n = {result.n:,}, {result.rows} rows: Gram {row['gram_s']:.3g} s, {M} products {row[f'products_{M}_s']:.3g} s,"
          f" {measured:.2f} x (by FLOPs {predicted:.2f} x)", flush=True)  # fmt: skip
    if QUICK:
        return
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "gram.jsonl").open("a") as f:
        f.write(json.dumps({**row, **stamp()}) + "\n")
    assert 0.25 <= predicted <= 4.0 or (measured > 1) == (predicted > 1), f"the rule says {predicted:.2g} x, measured {measured:.2g} x"
