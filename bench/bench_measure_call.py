"""`fastsharp.measure` on ResNet-20 beside the products and passes that it counts, and the noise floor of SAM-sharpness beside the published one.

    pytest bench/bench_measure_call.py -s        two rows in bench/results/measures.jsonl
    FASTSHARP_BENCH_IMAGES=16                    images of the ResNet, of the 2,000 of the target

Whole call: wall time over the sum of single products (Krylov steps), products in blocks of eight (the rest) and passes, each timed alone on
the same batches with the same engine. The preflight, the pass for the measures of the function, and all that is no product or pass are in
the wall time and not in the sum, so that the quotient is an upper bound of what is computed twice. Target: at most 1.3.

Noise floor: on a trained MLP, both estimators of SAM-sharpness with steps that do not move. Target: at least 100 times lower.
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
import torch.nn.functional as F

import fastsharp
from bench.harness import RESULTS
from bench.hvp_cases import CASES
from bench.machine import stamp
from bench.networks import fashion_mlp
from fastsharp.measures.landscape import Landscape
from fastsharp.operator import SymmetricOperator
from tests.oracles.perturbation import published_sam

QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once, promise nothing
IMAGES = 4 if QUICK else int(os.environ.get("FASTSHARP_BENCH_IMAGES", "2000"))
BATCH = 125
PARTS = ("gauss-newton", "perturbation", "trajectory", "function", "landscape")  # with the curvature; layers have products of their own
OPTIONS: dict[str, Any] = {"k": 1, "steps": 15, "rtol": 0.3, "directions": 20, "grid": 5} if IMAGES < 500 else {}


def seconds(run: Callable[[], Any], reps: int = 5) -> float:
    """Median, after one call that is not counted."""
    found = []
    for _ in range(reps + 1):
        start = time.perf_counter()
        with torch.no_grad():  # as in the call
            run()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def products(A: SymmetricOperator, singles: int, rest: int) -> tuple[float, float, float]:
    """(seconds of so many single products and the rest in blocks of eight, of one single, of one in a block)."""
    V = torch.randn(8, A.n, dtype=A.dtype)
    single, block = seconds(lambda: A.apply(V[:1])), seconds(lambda: A.apply(V), 3) / 8
    return singles * single + rest * block, single, block


@pytest.mark.timeout(7200)
def test_the_whole_call_beside_its_products(benchmark: Any) -> None:
    if QUICK:
        pytest.skip("the whole call on a ResNet takes minutes whatever the images; tests/measures runs it on small nets")
    model, _ = CASES["resnet-20"](16)
    g = torch.Generator().manual_seed(2)
    sizes = [min(BATCH, IMAGES - i) for i in range(0, IMAGES, BATCH)]
    data = [(torch.randn(b, 3, 32, 32, generator=g), torch.randint(10, (b,), generator=g)) for b in sizes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastsharp.errors.NotConvergedWarning)
        start = time.perf_counter()
        report = fastsharp.measure(model, data, F.cross_entropy, parts=PARTS, **OPTIONS)
        wall = time.perf_counter() - start
    cost = report.cost
    print(f"\nResNet-20, {IMAGES:,} images: {wall:.1f} s", {name: round(v, 2) for name, v in cost.items()}, flush=True)
    H, G = fastsharp.Hessian(model, data, F.cross_entropy), fastsharp.GGN(model, data, F.cross_entropy)
    steps = int(report.spectrum.settings["krylov_products"])
    rank = report["soft_rank"].n_matvec
    of_g = int(cost["products.gauss-newton"]) - rank
    steps_g = min(of_g, OPTIONS.get("steps", 40))
    for_h, single, block = products(H, steps, int(cost["products"]) - steps)
    for_g, single_g, block_g = products(G, steps_g + rank, of_g - steps_g)
    landscape = Landscape(H.objective)
    delta = 1e-3 * torch.randn(1, H.n)
    one_pass, gradient = seconds(lambda: landscape.changes(delta)), seconds(lambda: landscape.ascent(delta[0]))
    passes = (cost["passes"] - 3) * one_pass + gradient
    needed = for_h + for_g + passes
    row = {
        "op": "measure",
        "network": "resnet-20",
        "images": IMAGES,
        "images_of_the_target": 2000,
        "options": OPTIONS,
        "parts": PARTS,
        "cost": cost,
        "wall_s": wall,
        "needed_s": needed,
        "wall_over_needed": wall / needed,
        "single_s": single,
        "in_block_s": block,
        "single_ggn_s": single_g,
        "in_block_ggn_s": block_g,
        "pass_s": one_pass,
        "gradient_s": gradient,
    }
    print(f"needed {needed:.1f} s (H {for_h:.1f}, G {for_g:.1f}, passes {passes:.1f}): {wall / needed:.2f} x", flush=True)
    record(row)
    benchmark.extra_info.update({k: v for k, v in row.items() if isinstance(v, float)})
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.timeout(600)
def test_the_noise_floor_beside_the_published_one(benchmark: Any) -> None:
    samples = 300 if QUICK else 4000
    model, batches, name = fashion_mlp(samples=samples, batch=1000, epochs=1 if QUICK else 5)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=256, shuffle=True)
    n = sum(p.numel() for p in model.parameters())
    torch.manual_seed(0)
    published = published_sam(model, loader, F.cross_entropy, torch.zeros(10, n), 0.005)
    found = fastsharp.sharpness(model, loader, F.cross_entropy, rho=0.005, directions=20)
    row = {
        "op": "sam_noise_floor",
        "network": "mlp 784-512-512-10",
        "data": name,
        "samples": samples,
        "batch": 256,
        "rho": 0.005,
        "published": published,
        "paired": found.noise_floor,
        "published_over_paired": published / found.noise_floor,
        "sam": found.value,
        "stderr": found.stderr,
    }
    print(
        f"\n{name}, {samples} images in shuffled batches of 256: steps that do not move give {published:.2e} published, {found.noise_floor:.2e} paired "
        f"({published / found.noise_floor:,.0f} x); the measure itself is {found.value:.3e} +- {found.stderr:.1e}"
    )
    record(row)
    benchmark.extra_info.update({k: v for k, v in row.items() if isinstance(v, float)})
    benchmark.pedantic(lambda: None, rounds=1)


def record(row: dict[str, Any]) -> None:
    """Append a row, unless tiny sizes were asked for."""
    if not QUICK:
        with (RESULTS / "measures.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({**row, "tests_green": True, **stamp()}) + "\n")
