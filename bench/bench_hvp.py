"""Hessian-vector products of five networks as multiples of one gradient: every backend, the rivals, and the floor of six passes.

    pytest bench/bench_hvp.py -s                 tables, and in bench/results/hvp.jsonl a row for each network and part
    pytest bench/bench_hvp.py -s -k "blocks and vit"
    FASTSHARP_BENCH_REPS=7                       interleaved rounds (7), recorded in the row

Parts and targets: one vector, 0.7, 1.5, 2.1, 1.7 and 1.9 gradients in the order of `hvp_cases.CASES`, and 1.3 times the floor; blocks of
eight, per vector 0.7 of a single one on the tiny MLP, 1.0 elsewhere, 0.85 where the primal half is recomputed; memory, (2 + b) times the
stored activations. Products are compared with float64 double backward first; the error may be twice that of torch's own float32.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsharp
from bench.harness import RESULTS, Variant, interleaved
from bench.hvp_cases import CASES
from bench.machine import stamp
from bench.memory import Peak, stored_activations
from bench.passes import floor

REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "7"))
QUICK = "FASTSHARP_BENCH_N" in os.environ  # tiny sizes asked for: run everything once on little data, promise nothing
TARGETS = {"tiny mlp": 0.7, "mlp": 1.5, "resnet-20": 2.1, "resnet-18": 1.7, "vit": 1.9}
LOSS = nn.CrossEntropyLoss()


def double_backward(model: nn.Module, batches: list[Any], v: torch.Tensor) -> torch.Tensor:
    """H v of the mean loss over equal batches, from a graph built anew: what a user would write in torch."""
    params = list(model.parameters())
    parts = [p.view_as(q) for p, q in zip(v.split([q.numel() for q in params]), params, strict=True)]
    total = torch.zeros_like(v)
    for x, y in batches:
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(LOSS(model(x), y), params, create_graph=True)
        product = torch.autograd.grad(grads, params, parts)
        total += torch.cat([p.reshape(-1) for p in product])
    return total / len(batches)


def rivals(model: nn.Module, batches: list[Any], v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Products of the other libraries that are installed."""
    found: dict[str, Callable[[], Any]] = {}
    try:
        import curvlinops

        operator = curvlinops.HessianLinearOperator(model, LOSS, list(model.parameters()), batches, check_deterministic=False)
        found["curvlinops"] = sdpa_kernel(SDPBackend.MATH)(lambda: operator @ v)  # the kernel with a second derivative
    except ImportError:
        print("  curvlinops is not installed: not compared")
    try:
        import hessian_eigenthings

        supervised = hessian_eigenthings.supervised_loss(LOSS)
        other = hessian_eigenthings.HessianOperator(model, batches, supervised)
        found["hessian-eigenthings"] = sdpa_kernel(SDPBackend.MATH)(lambda: other.matvec(v))
    except ImportError:
        print("  hessian-eigenthings is not installed: not compared")
    return found


def error_ratio(model: nn.Module, batches: list[Any], product: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """Relative errors of our product and of torch's own in float32, against float64."""
    exact = double_backward(copy.deepcopy(model).double(), [(x.double(), y) for x, y in batches], v.double())
    theirs = double_backward(model, batches, v)
    size = float(exact.norm())
    return float((product.double() - exact).norm()) / size, float((theirs.double() - exact).norm()) / size


def memory_ratio(model: nn.Module, batches: list[Any], b: int) -> float:
    """Bytes alive at the worst moment of a block of b products of one batch, over the stored activations of its gradient."""
    x, y = batches[0]
    stored = stored_activations(lambda: LOSS(model(x), y), model.parameters())
    with Peak() as seen:
        H = fastsharp.Hessian(model, [(x, y)], LOSS)
        V = torch.randn(b, H.n)
        H.apply(V)
        seen.peak = seen.live
        H.apply(V)
        return (seen.peak - 3 * V.numel() * V.element_size()) / stored


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CASES)
def test_products(benchmark: Any, name: str) -> None:
    """One vector."""
    model, batches = CASES[name](32 if QUICK else 1)
    params = list(model.parameters())
    backends = {backend: fastsharp.Hessian(model, batches, LOSS, backend=backend) for backend in ("auto", "rop", "autograd")}
    n = backends["auto"].n
    v = torch.randn(n, generator=torch.Generator().manual_seed(2))
    ours, torchs = error_ratio(model, batches, backends["auto"] @ v, v)
    assert ours <= max(2 * torchs, 2e-7), f"error {ours:.1e}, torch's own {torchs:.1e}"
    runs: dict[str, Callable[[], Any]] = {
        "gradient": lambda: [torch.autograd.grad(LOSS(model(x), y), params) for x, y in batches],
        "floor": floor(model, LOSS, batches),
        "double backward": lambda: double_backward(model, batches, v),
        "kept graph": lambda: backends["autograd"] @ v,
        "engine": lambda: backends["rop"] @ v,
        "auto": lambda: backends["auto"] @ v,
    } | rivals(model, batches, v)
    fields = _timed(name, runs)
    seconds = fields["median_s"]
    fields |= {"target": TARGETS[name], "over_floor": seconds["auto"] / seconds["floor"], "error": ours, "error_of_torch": torchs}
    print(f"  auto / floor {fields['over_floor']:.2f}; to reach {TARGETS[name]} gradients; error {ours:.1e} (torch {torchs:.1e})")
    benchmark.extra_info.update({"over_gradient": fields["over_gradient"]["auto"], "over_floor": fields["over_floor"]})
    benchmark.pedantic(runs["auto"], rounds=1)
    _record(name, "one vector", n, fields)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CASES)
def test_blocks(benchmark: Any, name: str) -> None:
    """Eight vectors, with the primal half kept and recomputed."""
    model, batches = CASES[name](32 if QUICK else 1)
    params = list(model.parameters())
    kept = fastsharp.Hessian(model, batches, LOSS)
    tight = fastsharp.Hessian(model, batches, LOSS, memory=sum(x.nbytes + y.nbytes for x, y in batches) * 2 + 1)  # graphs never fit
    block = torch.randn(8, kept.n, generator=torch.Generator().manual_seed(2))
    v = block[0].clone()
    one = kept @ v
    for together in (kept.apply(block)[0], tight.apply(block)[0]):  # the same sums in another order
        assert float((together - one).norm()) <= 100 * torch.finfo(one.dtype).eps * float(one.norm())
    runs: dict[str, Callable[[], Any]] = {
        "gradient": lambda: [torch.autograd.grad(LOSS(model(x), y), params) for x, y in batches],
        "auto": lambda: kept @ v,
        "auto, b = 8": lambda: kept.apply(block),
        "recomputed": lambda: tight @ v,
        "recomputed, b = 8": lambda: tight.apply(block),
    }
    fields = _timed(name, runs)
    seconds = fields["median_s"]
    fields["block_of_8_per_vector"] = seconds["auto, b = 8"] / 8 / seconds["auto"]
    fields["recomputed_block_of_8_per_vector"] = seconds["recomputed, b = 8"] / 8 / seconds["recomputed"]
    print("  per vector of one: kept {block_of_8_per_vector:.2f}, recomputed {recomputed_block_of_8_per_vector:.2f}".format(**fields))
    benchmark.extra_info.update({label: fields[label] for label in fields if label.endswith("per_vector")})
    benchmark.pedantic(runs["auto"], rounds=1)
    _record(name, "blocks", kept.n, fields)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CASES)
def test_memory(name: str) -> None:
    """Counted, not timed."""
    model, batches = CASES[name](32 if QUICK else 1)
    ratios = {b: memory_ratio(model, batches, b) for b in (1, 8)}
    print(f"\n{name}: memory over activations, by b: " + ", ".join(f"{b}: {ratio:.2f}" for b, ratio in ratios.items()))
    _record(name, "memory", sum(p.numel() for p in model.parameters()), {"memory_over_activations": ratios})


def _timed(name: str, runs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The fields of a row that every timed part has; prints the table."""
    repeat = 20 if name == "tiny mlp" and not QUICK else 1  # below a millisecond a single call is mostly noise
    variants = [Variant(label, lambda f=f: [f() for _ in range(repeat)], 0) for label, f in runs.items()]
    timings = interleaved(variants, 1 if QUICK else REPS, torch.device("cpu"))
    seconds = {label: t.median / repeat for label, t in timings.items()}
    ratios = {label: s / seconds["gradient"] for label, s in seconds.items()}
    print(f"\n{name}: times a gradient ({seconds['gradient']:.2g} s)")
    for label, ratio in ratios.items():
        print(f"  {label:20s} {ratio:6.2f}")
    return {
        "over_gradient": ratios,
        "median_s": seconds,
        "q20_s": {label: t.q20 / repeat for label, t in timings.items()},
        "q80_s": {label: t.q80 / repeat for label, t in timings.items()},
        "reps": timings["gradient"].reps,
    }


def _record(name: str, part: str, n: int, fields: dict[str, Any]) -> None:
    if not QUICK:
        with (RESULTS / "hvp.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({"case": name, "part": part, "n": n, **fields, "tests_green": True, **stamp()}) + "\n")
