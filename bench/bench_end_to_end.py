"""The top 10 eigenpairs to 1e-3 of three networks, wall time from a built operator, against the better of two rivals.

    pytest bench/bench_end_to_end.py -s          a table, and a row per network in bench/results/end_to_end.jsonl
    FASTSHARP_BENCH_REPS=3                       interleaved rounds (3)
    FASTSHARP_BENCH_BATCHES=2                    batches of the ResNet and the ViT, of the four of the table (2)

Targets: 2.2 x (MLP), 1.8 x (ResNet-20), 1.4 x (ViT) faster than curvlinops with scipy's eigsh or hessian-eigenthings' Lanczos,
whichever is faster, criterion "residual", verification counted. hessian-eigenthings has no stop test: it runs the least multiple of ten steps at which
its pairs meet the same tolerance by true residuals, found beforehand and not timed. Preflight is stated apart; the first pass, which linearises, is
counted, and stated as well.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsharp
from bench.harness import RESULTS
from bench.hvp_cases import CASES
from bench.machine import stamp
from bench.networks import fashion_mlp
from fastsharp.preflight import preflight

K, TOL = 10, 1e-3
REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "3"))
BATCHES = int(os.environ.get("FASTSHARP_BENCH_BATCHES", "2"))
QUICK = "FASTSHARP_BENCH_N" in os.environ
TARGETS = {"mlp": 2.2, "resnet-20": 1.8, "vit": 1.4}
LOSS = nn.CrossEntropyLoss()


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def trained(name: str) -> tuple[nn.Module, list[Any]]:
    """The network after some steps of Adam, so that its spectrum has the outliers of a trained one."""
    if name == "mlp":
        model, batches, _ = fashion_mlp(epochs=1 if QUICK else 10, samples=200 if QUICK else 4096)
        return model, batches
    model, batches = CASES[name](32 if QUICK else 1)
    batches = batches[: 1 if QUICK else BATCHES]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(2 if QUICK else 40):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), batches


def meets(values: torch.Tensor, vectors: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether all pairs have true residuals within the tolerance."""
    return all(float((product(x) - value * x).norm()) <= TOL * abs(float(value)) for value, x in zip(values, vectors, strict=True))


def eigenthings(
    model: nn.Module, batches: list[Any], product: Callable[[torch.Tensor], torch.Tensor], near: int
) -> tuple[Callable[[], Any], int]:
    """hessian-eigenthings' run and its steps: the least multiple of ten that meets the tolerance, sought from `near` on."""
    other = pytest.importorskip("hessian_eigenthings", reason="a rival is not installed")
    operator = other.HessianOperator(model, batches, other.supervised_loss(LOSS))

    def run(steps: int) -> Any:
        return other.lanczos(operator, k=K, max_iter=steps, tol=TOL, reorthogonalize=True, which="LA", seed=0)

    def enough(steps: int) -> bool:
        found = run(steps)
        return meets(found.eigenvalues, found.eigenvectors, product)

    if QUICK:
        return lambda: run(20), 20
    steps = max(20, near // 10 * 10)
    with sdpa_kernel(SDPBackend.MATH):
        if enough(steps):
            while steps > 20 and enough(steps - 10):
                steps -= 10
        else:
            steps += 10
            while not enough(steps):
                steps += 10
    return lambda: run(steps), steps


@pytest.mark.timeout(5000)
@pytest.mark.parametrize("name", TARGETS)
def test_top_10(benchmark: Any, name: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="a rival is not installed")
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="a rival's solver is not installed")
    model, batches = trained(name)
    H = fastsharp.Hessian(model, batches, LOSS)
    checked, _ = timed(lambda: preflight(H))
    H.release()
    first, _ = timed(lambda: H @ torch.ones(H.n))
    second, _ = timed(lambda: H @ torch.ones(H.n))
    params = list(model.parameters())
    theirs = curvlinops.HessianLinearOperator(model, LOSS, params, batches, check_deterministic=False).to_scipy()
    products = 0

    def matvec(v: Any) -> Any:
        nonlocal products
        products += 1
        return theirs.matvec(v)

    counted = linalg.LinearOperator(theirs.shape, matvec=matvec, dtype=theirs.dtype)

    def ours(criterion: str = "residual") -> fastsharp.Eigenpairs:
        H.release()  # the first pass is counted
        return fastsharp.lanczos(H, k=K, tol=TOL, criterion=criterion, preflight="off")

    rival, steps = eigenthings(model, batches, lambda x: H @ x, ours().n_matvec)
    runs = {
        "fastsharp": ours,
        "fastsharp, value": lambda: ours("value"),
        "eigsh": lambda: linalg.eigsh(counted, k=K, which="LA", tol=TOL),
        "hessian-eigenthings": rival,
    }
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    results: dict[str, Any] = {}
    for _ in range(1 if QUICK else REPS):
        for label, run in runs.items():
            if label == "eigsh":
                products = 0
            with sdpa_kernel(SDPBackend.MATH):  # the rivals need the kernel with a second derivative
                spent, results[label] = timed(run)
            seconds[label].append(spent)
    result = results["fastsharp"]
    values = torch.from_numpy(results["eigsh"][0].copy()).double().flip(0)
    if not QUICK:
        assert bool(result.converged.all())
        assert float((result.eigenvalues - values).abs().max()) <= TOL * float(values[0])
    median = {label: statistics.median(spent) for label, spent in seconds.items()}
    faster = min(median["eigsh"], median["hessian-eigenthings"]) / median["fastsharp"]
    row = {
        "case": name,
        "k": K,
        "tol": TOL,
        "faster_than_better_rival": faster,
        "target": TARGETS[name],
        "products": {"fastsharp": result.n_matvec, "verification": result.n_verify, "eigsh": products, "hessian-eigenthings": steps},
        "products_value": results["fastsharp, value"].n_matvec,
        "median_s": median,
        "rounds_s": seconds,
        "batches": len(batches),
        "preflight_s": checked,
        "linearising_s": first - second,
        "backend": result.settings.get("backend"),
        "tests_green": True,
        **stamp(),
    }
    print(
        f"\n{name}: {faster:.2f} x the better rival (target {TARGETS[name]}); products {row['products']}; preflight {checked:.2f} s apart"
    )
    print("  " + ", ".join(f"{label} {s:.2f} s" for label, s in median.items()))
    benchmark.extra_info["faster_than_better_rival"] = faster
    benchmark.pedantic(lambda: None, rounds=1)
    if QUICK:
        return
    with (RESULTS / "end_to_end.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
