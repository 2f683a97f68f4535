"""Tracker against cold runs on the training of a small CNN: products, values, bounds.

pytest bench/bench_tracker.py -s             a table, and a row per run in bench/results/tracker.jsonl
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from bench.harness import RESULTS
from bench.machine import stamp
from fastsharp import data

QUICK = "FASTSHARP_BENCH_N" in os.environ
EVERY, SAMPLES = 20, 100 if QUICK else 500
RUNS = {  # name: (optimizer, batch, first tracked step)
    "adam 3e-4, from step 200": (lambda p: torch.optim.Adam(p, lr=3e-4), 64, 200),
    "adam 3e-4": (lambda p: torch.optim.Adam(p, lr=3e-4), 64, 0),
    "adam 1e-3": (lambda p: torch.optim.Adam(p, lr=1e-3), 64, 0),
    "sgd 0.05": (lambda p: torch.optim.SGD(p, lr=0.05), 64, 0),
    "sgd 0.01, momentum 0.9": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 64, 0),
}


def network() -> nn.Sequential:
    """1,790 parameters for 28 x 28 images."""
    first = [nn.AvgPool2d(2), nn.Conv2d(1, 6, 3, padding=1, stride=2), nn.GELU()]
    return nn.Sequential(*first, nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(128, 10))


def follow(make: Any, batch: int, first: int, last: int) -> tuple[fastsharp.Tracker, list[fastsharp.Eigenpairs]]:
    """The tracker after training, and a verified cold run at each of its steps."""
    x, y = (torch.cat(p) for p in zip(*data.loader(data.load("fashion_mnist_mini"), batch_size=256), strict=True))
    torch.manual_seed(0)
    model, measured = network(), [(x[:SAMPLES], y[:SAMPLES])]
    tracker = fastsharp.Tracker(model, measured, preflight="off")
    optimizer, g, cold, step = make(model.parameters()), torch.Generator().manual_seed(0), [], 0
    while True:
        for chosen in torch.randperm(len(y), generator=g).split(batch):
            if step >= first and step % EVERY == 0:
                tracker.update(step=step)
                cold.append(fastsharp.lanczos(model, measured, k=1, tol=1e-2, criterion="value", preflight="off"))
            if step == last:
                return tracker, cold
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            step += 1


@pytest.mark.timeout(1200)
def test_products_through_training(benchmark: Any) -> None:
    rows = []
    for name, (make, batch, first) in list(RUNS.items())[: 1 if QUICK else None]:
        tracker, cold = follow(make, batch, first, 240 if QUICK else 600)
        values = [r.eigenvalues[0] for r in tracker.history]
        bounds = [r.error_bounds[0] for r in tracker.history]
        exact = [float(c.eigenvalues[0]) for c in cold]
        off = [abs(v - e) > b + float(c.error_bounds[0]) for v, e, b, c in zip(values, exact, bounds, cold, strict=True)]
        products = [r.n_matvec for r in tracker.history]
        plain, verified = sum(c.n_matvec for c in cold), sum(c.n_matvec + c.n_verify for c in cold)
        row = {
            "case": name,
            "every": EVERY,
            "products": products,
            "cold_products": plain,
            "cold_products_verified": verified,
            "ratio": sum(products) / plain,
            "ratio_verified": sum(products) / verified,
            "values": values,
            "bounds": bounds,
            "cold_values": exact,
            "off_by_more_than_bound": sum(off),
            "tests_green": True,
            **stamp(),
        }
        rows.append(row)
        print(f"{name:28s} {sum(products):4d} of {plain} cold, {verified} verified: {row['ratio_verified']:.2f}; {sum(off)} off")
    benchmark.extra_info["ratio"] = rows[0]["ratio_verified"]
    benchmark.pedantic(lambda: None, rounds=1)
    if QUICK:
        return
    with (RESULTS / "tracker.jsonl").open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
