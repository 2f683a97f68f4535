"""Top 5 eigenpairs of every weight layer of ResNet-20: `layer_spectra` against one run a layer, by autograd's kept graph and by our engine.

    pytest bench/bench_layers.py -s              one table, and a row in bench/results/layers.jsonl
    FASTSHARP_BENCH_N=32                         samples (32)

Target: at least 5 times faster than one run a layer with backend="autograd" and 1.5 times than one with backend="rop", at equal tolerance,
k and data, all without a preflight. The single runs take turns layer by layer, the sweep runs before, amid and after them. The sweep gives the traces
too, which the single runs do not; the coupling, which costs products with the whole matrix, is timed by itself.
A wrong answer would not count: values of all three are compared first.
"""

from __future__ import annotations

import json
import os
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from bench.bench_lanczos import timed
from bench.harness import RESULTS
from bench.machine import stamp
from fastsharp import data
from fastsharp.models import ResNetCIFAR, resnet20

K, TOL = 5, 1e-3
SAMPLES = int(os.environ.get("FASTSHARP_BENCH_N", "32"))
STEPS = 10


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
        return isinstance(module, (nn.Conv2d, nn.Linear))

    def sweep(coupling: str | None = None) -> fastsharp.LayerSpectra:
        return fastsharp.layer_spectra(model, batches, loss, layers=weighty, coupling=coupling, **shared)

    sweep()  # warms up torch's kernels and imports
    seconds: dict[str, list[float]] = {"sweep": [], "rop": [], "autograd": []}
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
        print(
            f"  {layer.name:16} {layer.route:12} {layer.n_matvec:4} products; rop {seconds['rop'][-1]:.2f} s, autograd {spent:.2f} s",
            flush=True,
        )
        if i == len(spectra) // 2:
            seconds["sweep"].append(timed(sweep)[0])
    seconds["sweep"].append(timed(sweep)[0])
    coupled = timed(lambda: sweep("total"))[0]
    whole = {"sweep": statistics.median(seconds["sweep"]), "rop": sum(seconds["rop"]), "autograd": sum(seconds["autograd"])}
    row = {
        "case": f"ResNet-20, {STEPS} steps on {name}, {SAMPLES} samples in one batch, {len(spectra)} layers",
        "k": K,
        "tol": TOL,
        "criterion": "residual",
        "routes": [layer.route for layer in spectra],
        "products": [layer.n_matvec for layer in spectra],
        "total_s": whole,
        "sweep_with_coupling_s": coupled,
        "autograd_over_sweep": whole["autograd"] / whole["sweep"],
        "rop_over_sweep": whole["rop"] / whole["sweep"],
        "values_apart": worst,
        "seconds": seconds,
        "tests_green": True,
        **stamp(),
    }
    print(f"\n{row['case']}: top {K} to {TOL:g} (residual)")
    print(f"  sweep {whole['sweep']:.2f} s ({', '.join(f'{s:.2f}' for s in seconds['sweep'])}), with the coupling {coupled:.2f} s")
    print(f"  one run a layer by the engine {whole['rop']:.1f} s, {row['rop_over_sweep']:.1f} times as long")
    print(f"  one run a layer by autograd {whole['autograd']:.1f} s, {row['autograd_over_sweep']:.1f} times as long")
    benchmark.extra_info.update({key: row[key] for key in ("autograd_over_sweep", "rop_over_sweep")})
    benchmark.pedantic(sweep, rounds=1)
    if SAMPLES < 32:
        return
    with (RESULTS / "layers.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
