"""Wasserstein-1 error of the spectral density against dense spectra of trained networks, beside hessian-eigenthings.

    pytest bench/bench_density.py -s             one table, and rows in bench/results/density.jsonl
    FASTSHARP_BENCH_REPS=9                       seeds (9); medians over them

Target: the W1 that the other reaches with 10 probes x 80 steps = 800 products, at 1/20 of its products or fewer, 40. Of the other its
raw nodes and weights count, not the curve broadened for plotting. The dense spectra are LAPACK's of the assembled float64 Hessian, n <= 5,000.
Both sides multiply by the same float64 matrix, so that only the algorithms differ. On the MLP
784-512-512-10 a run of ours with 4 probes x 200 steps stands in for the truth, and both sides use our Hessian's products.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from bench.harness import RESULTS
from bench.machine import stamp
from bench.networks import fashion_mlp
from fastsharp.models import mlp

SEEDS = int(os.environ.get("FASTSHARP_BENCH_REPS", "9"))
QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once, promise nothing
OURS, THEIRS = (1, 40), (10, 80)  # probes, steps

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def networks() -> Iterator[tuple[str, nn.Module, torch.Tensor, torch.Tensor, Loss]]:
    """Four trained networks of 1,400 to 1,950 parameters on the embedded images, pooled to 7 x 7 or 14 x 14."""
    images = fastsharp.data.load("fashion_mnist_mini")
    x, y = (torch.cat(parts) for parts in zip(*fastsharp.data.loader(images, batch_size=len(images)), strict=True))
    x7, x14 = F.avg_pool2d(x, 4), F.avg_pool2d(x, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, tanh = mlp((49, 4, 10) if QUICK else (49, 24, 16, 10)), mlp((49, 32, 10), nn.Tanh)
        coder = nn.Sequential(nn.Flatten(), nn.Linear(49, 16), nn.Tanh(), nn.Linear(16, 49))
        conv = [nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)]
        cnn = nn.Sequential(*conv, nn.Flatten(), nn.Linear(72, 10))
    yield "mlp relu 49-24-16-10", _trained(plain, x7, y, F.cross_entropy, 15), x7, y, F.cross_entropy
    if QUICK:
        return
    yield "mlp tanh 49-32-10", _trained(tanh, x7, y, F.cross_entropy, 60), x7, y, F.cross_entropy
    yield "cnn gelu 8-8", _trained(cnn, x14[:250], y[:250], F.cross_entropy, 15), x14[:250], y[:250], F.cross_entropy
    yield "autoencoder tanh 49-16-49", _trained(coder, x7, x7.flatten(1), F.mse_loss, 15), x7, x7.flatten(1), F.mse_loss


def _trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: Loss, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(1 if QUICK else epochs):
        for chosen in torch.randperm(len(y), generator=g).split(64):
            optimizer.zero_grad()
            loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def assembled(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: Loss) -> torch.Tensor:
    """The float64 Hessian, 16 columns at a time, symmetrised."""
    data = [(x.double(), y.double() if y.is_floating_point() else y)]
    operator = fastsharp.Hessian(model.double(), data, loss)
    unit = torch.eye(operator.n, dtype=torch.float64)
    H = torch.cat([operator.apply(rows.contiguous()) for rows in unit.split(16)])
    assert float((H - H.T).norm()) <= 1e-10 * float(H.norm())
    return (H + H.T) / 2


def rival(operator: fastsharp.SymmetricOperator, probes: int, steps: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw nodes and weights of hessian-eigenthings' spectral_density."""
    algorithms = pytest.importorskip("hessian_eigenthings.algorithms", reason="the rival is not installed")
    base = pytest.importorskip("hessian_eigenthings.operators.base", reason="the rival is not installed")
    wrapped = base.LambdaOperator(lambda v: operator @ v, operator.n, dtype=operator.dtype)
    result = algorithms.spectral_density(wrapped, num_runs=probes, lanczos_steps=steps, num_grid_points=2, seed=seed)
    kept = ~result.raw_eigenvalues.isnan()
    return result.raw_eigenvalues[kept].double(), result.raw_weights[kept].double() / probes


def w1(nodes: torch.Tensor, weights: torch.Tensor, truth: tuple[Any, Any]) -> float:
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(truth[0], nodes.numpy(), truth[1], weights.numpy()))


def compare(operator: fastsharp.SymmetricOperator, truth: tuple[Any, Any], seeds: int, rivals: int) -> dict[str, Any]:
    """Median W1 of both sides; ours at 40, 60, 80 and 800 products."""

    def ours(probes: int, steps: int, **arguments: Any) -> tuple[float, float]:
        runs = [fastsharp.density(operator, probes=probes, steps=steps, seed=s, preflight="off", **arguments) for s in range(seeds)]
        assert all(run.n_matvec <= probes * steps for run in runs)
        return statistics.median(w1(r.nodes, r.weights, truth) for r in runs), statistics.median(r.w1_bound for r in runs)

    theirs = statistics.median(w1(*rival(operator, *THEIRS, seed=1000 * s), truth) for s in range(rivals))
    row: dict[str, Any] = {"n": operator.n, "their_products": THEIRS[0] * THEIRS[1], "their_w1": theirs}
    for label, shape in {"40": OURS, "60": (1, 60), "80": (1, 80), "800": THEIRS}.items():
        row[f"w1_{label}"], row[f"bound_{label}"] = ours(*shape)
    row["w1_40_rademacher"] = ours(*OURS, kind="rademacher")[0]
    row["w1_40_plain"] = statistics.median(
        w1(*fastsharp.density(operator, steps=40, seed=s, preflight="off").probes[0], truth) for s in range(seeds)
    )
    return row


def _report(name: str, row: dict[str, Any], seeds: int) -> None:
    ratios = {key: row[key] / row["their_w1"] for key in row if key.startswith("w1_")}
    print(f"\n{name}, n = {row['n']:,}: their W1 {row['their_w1']:.3g} with {row['their_products']} products; ours / theirs")
    print(
        "  "
        + "  ".join(f"{key.removeprefix('w1_')}: {value:.2f}" for key, value in ratios.items())
        + f"  bound at 40: {row['bound_40']:.3g}"
    )
    if QUICK:
        return
    with (RESULTS / "density.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({"case": name, "seeds": seeds, **row, "ratios": ratios, "tests_green": True, **stamp()}) + "\n")


@pytest.mark.timeout(1200)
def test_w1_against_dense_spectra(benchmark: Any) -> None:
    pytest.importorskip("scipy.stats", reason="the distance is scipy's")
    reached = []
    for name, model, x, y, loss in networks():
        H = assembled(model, x, y, loss)
        operator = fastsharp.DenseOperator(H)
        row = compare(operator, (torch.linalg.eigvalsh(H).numpy(), None), 1 if QUICK else SEEDS, 1 if QUICK else SEEDS)
        _report(name, row, SEEDS)
        reached.append(row["w1_40"] <= row["their_w1"])
    benchmark.extra_info["reached_at_40_products"] = f"{sum(reached)} of {len(reached)}"
    benchmark.pedantic(lambda: fastsharp.density(operator, steps=40, preflight="off"), rounds=1)


@pytest.mark.timeout(3000)
def test_w1_against_a_long_run_on_an_mlp(benchmark: Any) -> None:
    pytest.importorskip("scipy.stats", reason="the distance is scipy's")
    if QUICK:
        pytest.skip("minutes even at the smallest size")
    model, batches, name = fashion_mlp(samples=1024)
    operator = fastsharp.Hessian(model, batches, nn.CrossEntropyLoss())
    long = fastsharp.density(operator, probes=4, steps=200, seed=12345, preflight="off")
    row = compare(operator, (long.nodes.numpy(), long.weights.numpy()), 3, 1)
    _report(f"mlp 784-512-512-10 on {name}, long run 4 x 200", row, 3)
    benchmark.pedantic(lambda: fastsharp.density(operator, steps=40, preflight="off"), rounds=1)
