"""Top 5 eigenpairs of every weight layer of ResNet-20: `layer_spectra` against one run a layer, by autograd's kept graph and by our engine.

    pytest bench/bench_layers.py -s              one table, and a row in bench/results/layers.jsonl
    FASTSHARP_BENCH_IMAGES=16                    images (16)

Target: at least 5 times faster than one run a layer with backend="autograd" and 1.5 times than one with backend="rop", at equal tolerance,
k and data, all without a preflight. The single runs take turns layer by layer, the sweep runs before, amid and after them. The sweep gives the traces
too, which the single runs do not; the coupling, which costs products with the whole matrix, is timed by itself.
Wall time and the process's CPU time are both kept: a machine that stalls shows in the first alone.
A wrong answer would not count: values of all three are compared first.
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
from fastsharp import data
from fastsharp.models import ResNetCIFAR, resnet20

QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once, promise nothing
K, TOL = (1, 0.3) if QUICK else (5, 1e-3)
SAMPLES = 2 if QUICK else int(os.environ.get("FASTSHARP_BENCH_IMAGES", "16"))
STEPS = 10


def timed(f: Any) -> tuple[tuple[float, float], Any]:
    """((wall, CPU) seconds, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = f()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def trained(samples: int) -> tuple[ResNetCIFAR, list[tuple[torch.Tensor, torch.Tensor]], str]:
    """ResNet-20 after a few steps of Adam on Fashion-MNIST, padded to 32 x 32, and one batch of its images."""
    images = data.load("fashion_mnist_mini")
    x, y = (torch.cat(parts) for parts in zip(*data.loader(images, batch_size=len(images)), strict=True))
    x = F.pad(x, (2, 2, 2, 2))
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet20(in_channels=x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS if samples >= 16 else 2):
        chosen = torch.randint(len(y), (32,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), [(x[:samples], y[:samples])], images.name


@pytest.mark.timeout(1200)
def test_all_layers_of_resnet20(benchmark: Any) -> None:
    model, batches, name = trained(SAMPLES)
    loss = nn.CrossEntropyLoss()
    shared: dict[str, Any] = {"k": K, "tol": TOL, "preflight": "off", "progress": False}

    def weighty(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear if QUICK else (nn.Conv2d, nn.Linear))

    def sweep(coupling: str | None = None) -> fastsharp.LayerSpectra:
        return fastsharp.layer_spectra(model, batches, loss, layers=weighty, coupling=coupling, **shared)

    sweep()  # warms up torch's kernels and imports
    seconds: dict[str, list[tuple[float, float]]] = {"sweep": [], "rop": [], "autograd": []}
    spent, spectra = timed(sweep)
    seconds["sweep"].append(spent)
    worst = 0.0
    for i, layer in enumerate(spectra):
        for backend in ("rop", "autograd"):
            run = lambda: fastsharp.lanczos(model, batches, loss, params=list(layer.params), backend=backend, **shared)  # noqa: B023, E731
            spent, pairs = timed(run)
            seconds[backend].append(spent)
            assert bool(pairs.converged.all())
            apart = float((pairs.eigenvalues[: len(layer.eigenvalues)] - layer.eigenvalues).abs().max()) / float(layer.eigenvalues[0])
            assert apart <= TOL, f"{layer.name} by {backend}: {apart:.1e}"
            worst = max(worst, apart)
        ours, theirs = (seconds[backend][-1][0] for backend in ("rop", "autograd"))
        print(f"  {layer.name:16} {layer.route:12} {layer.n_matvec:4} products; rop {ours:.2f} s, autograd {theirs:.2f} s", flush=True)
        if i == len(spectra) // 2:
            seconds["sweep"].append(timed(sweep)[0])
    seconds["sweep"].append(timed(sweep)[0])
    coupled = timed(lambda: sweep("total"))[0]
    whole = {
        "sweep": tuple(statistics.median(times) for times in zip(*seconds["sweep"], strict=True)),
        **{backend: tuple(map(sum, zip(*seconds[backend], strict=True))) for backend in ("rop", "autograd")},
    }
    ratios = {backend: [a / b for a, b in zip(whole[backend], whole["sweep"], strict=True)] for backend in ("rop", "autograd")}
    row = {
        "case": f"ResNet-20, {STEPS} steps on {name}, {SAMPLES} samples in one batch, {len(spectra)} layers",
        "k": K,
        "tol": TOL,
        "criterion": "residual",
        "routes": [layer.route for layer in spectra],
        "products": [layer.n_matvec for layer in spectra],
        "total_wall_and_cpu_s": whole,
        "sweep_with_coupling_wall_and_cpu_s": coupled,
        "autograd_over_sweep": ratios["autograd"][0],
        "autograd_over_sweep_cpu": ratios["autograd"][1],
        "rop_over_sweep": ratios["rop"][0],
        "rop_over_sweep_cpu": ratios["rop"][1],
        "values_apart": worst,
        "seconds": seconds,
        "tests_green": True,
        **stamp(),
    }
    print(f"\n{row['case']}: top {K} to {TOL:g} (residual)")
    print(
        f"  sweep {whole['sweep'][0]:.2f} s ({', '.join(f'{wall:.2f}' for wall, _ in seconds['sweep'])}), with the coupling {coupled[0]:.2f} s"
    )
    for backend in ("rop", "autograd"):
        wall, cpu = ratios[backend]
        print(f"  one run a layer by {backend} {whole[backend][0]:.1f} s, {wall:.1f} times as long (CPU time: {cpu:.1f})")
    benchmark.extra_info.update({key: row[key] for key in ("autograd_over_sweep", "rop_over_sweep")})
    benchmark.pedantic(sweep, rounds=1)
    if QUICK:
        return
    with (RESULTS / "layers.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
