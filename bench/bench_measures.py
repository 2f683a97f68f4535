"""Relative flatness of a 512 x 10 head on 10,000 samples: the closed form beside the double-backward loop of the published code.

    pytest bench/bench_measures.py -s            one table, and a row in bench/results/measures.jsonl

The loop takes 5,120 second gradients; it is timed on a sample of them, in the same run as the closed form, and its share is stated. Both see the
same features as the inputs of one linear layer, in one batch. Timed of ours: the whole public call, with its checks and hashes of
data and weights, and the pass over the data alone. Target: at least 1,000 times faster.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from bench.harness import RESULTS
from bench.machine import stamp
from fastsharp.measures.facts import one_pass
from fastsharp.measures.head import HeadFinder
from fastsharp.measures.relative_flatness import HeadFlatness
from fastsharp.objective import Objective
from tests.oracles.measures import relative_flatness_as_published

QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once, promise nothing
N, M, C = (200, 16, 10) if QUICK else (10_000, 512, 10)
ENTRIES = 40  # second gradients timed of C M


def verified() -> None:
    """The loop as published and the closed form give one number, on a head small enough for the whole loop."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(12, 10)), (torch.randn(300, 12).relu(), torch.randint(10, (300,)))
    want, _ = relative_flatness_as_published(model, data, "0", lambda call, b: F.cross_entropy(call(b[0]), b[1]), normalize=True)
    got = fastsharp.relative_flatness(model, data).value
    assert abs(got - want) <= 1e-5 * want


def seconds(run: Any, reps: int) -> float:
    found = []
    for _ in range(reps):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@pytest.mark.timeout(600)
def test_closed_form_beside_the_loop(benchmark: Any) -> None:
    verified()
    torch.manual_seed(0)
    model = nn.Linear(M, C)
    x, y = torch.randn(N, M).relu(), torch.randint(C, (N,))
    W = model.weight
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), W, create_graph=True)
    entries = [(c, k) for c in range(C) for k in range(M)][:: max(1, C * M // ENTRIES)]
    per_entry = seconds(iter_of(lambda c, k: torch.autograd.grad(g[c, k], W, retain_graph=True), entries), len(entries))

    objective = Objective(model, (x, y))
    finder = HeadFinder(model)
    one_pass(objective, [finder], what="bench", first_only=True)

    def closed_pass() -> float:
        measure = HeadFlatness(finder.head("bench"), kind="trace", normalize=True, confidence=0.95, room=1 << 34)
        one_pass(objective, [measure], what="bench")
        return measure.result().value

    pass_s = seconds(closed_pass, 9)
    call_s = seconds(lambda: fastsharp.relative_flatness(model, (x, y)), 9)
    loop_s = per_entry * C * M
    row = {
        "op": "relative_flatness",
        "samples": N,
        "features": M,
        "classes": C,
        "loop_s": loop_s,
        "loop_entries_timed": len(entries),
        "loop_entries": C * M,
        "pass_s": pass_s,
        "call_s": call_s,
        "loop_over_pass": loop_s / pass_s,
        "loop_over_call": loop_s / call_s,
    }
    print(
        f"\n{C} x {M} head, {N:,} samples: loop {loop_s:.1f} s ({len(entries)} of {C * M} entries timed), one pass {pass_s * 1e3:.1f} ms "
        f"({loop_s / pass_s:,.0f} x), whole call {call_s * 1e3:.1f} ms ({loop_s / call_s:,.0f} x)"
    )
    if not QUICK:
        with (RESULTS / "measures.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({**row, "tests_green": True, **stamp()}) + "\n")
    benchmark.extra_info.update(row)
    benchmark.pedantic(closed_pass, rounds=1)


def iter_of(f: Any, arguments: list[Any]) -> Any:
    """A call without arguments that takes the next of them each time."""
    rest = iter(arguments)
    return lambda: f(*next(rest))
