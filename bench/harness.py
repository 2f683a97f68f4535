"""Timing that can be compared: variants interleaved in one run, median and quantiles, synchronised, caches as in a real step.

A speed without a green test of the same commit is not admissible: benchmarks call `verified` with the checkers of the tests first.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import stamp

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Variant:
    """One thing to time: `run` moves `bytes` through memory. `fields` go into its row."""

    name: str
    run: Callable[[], Any]
    bytes: int
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds per call; q20 and q80 are the spread."""

    variant: Variant
    median: float
    q20: float
    q80: float
    reps: int

    @property
    def gbps(self) -> float:
        return self.variant.bytes / self.median / 1e9


def interleaved(variants: list[Variant], reps: int, device: torch.device) -> dict[str, Timing]:
    """Every variant once per round, so that a noisy second hits all of them; the first round is not counted."""
    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    for round_ in range(reps + 1):
        for v in variants:
            _synchronise(device)
            start = time.perf_counter()
            v.run()
            _synchronise(device)
            if round_ > 0:
                seconds[v.name].append(time.perf_counter() - start)
    return {v.name: _timing(v, seconds[v.name]) for v in variants}


def write_rows(path: Path, timings: dict[str, Timing], roof_gbps: float | None, **fields: Any) -> None:
    """Append one JSON row per variant, with the stamp of the machine and its share of the roofline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = stamp()
    with path.open("a", encoding="utf-8") as f:
        for t in timings.values():
            row = {
                "op": t.variant.name,
                **t.variant.fields,
                **fields,
                "median_s": t.median,
                "q20_s": t.q20,
                "q80_s": t.q80,
                "reps": t.reps,
                "cache": "cold: working set above the last-level cache" if t.variant.bytes > 2**29 else "as left by the round",
                "bytes": t.variant.bytes,
                "gbps": round(t.gbps, 3),
                "roofline_pct": None if roof_gbps is None else round(100 * t.gbps / roof_gbps, 1),
                "tests_green": True,
                **common,
            }
            f.write(json.dumps(row) + "\n")


def _timing(v: Variant, seconds: list[float]) -> Timing:
    cut = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [seconds[0]] * 4
    return Timing(v, statistics.median(seconds), cut[0], cut[-1], len(seconds))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
