"""Hessian-vector products on a GPU, launched kernel by kernel and as CUDA graphs, against autograd and compiled forward-over-reverse.

    pytest bench/bench_hvp_gpu.py -s             ResNet-50 on 64 x 224 x 224, GPT-2 (124M) on 4 x 1024, in float32, TF32 and bf16
    FASTSHARP_BENCH_COMPILE=90                   seconds that torch.compile may take, 0: without it (90; once for each network, in TF32)

Rows go to bench/results/hvp_gpu.jsonl: seconds, multiples of a gradient, the share of the floor (the six matrix products of every layer
alone, see passes.py) that a product reaches. Products are compared with autograd's first; replayed ones must have the bits of launched ones.
Without a GPU everything is skipped; FASTSHARP_BENCH_N asks for tiny sizes, which also run on a CPU.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsharp
from bench.harness import RESULTS, Timing, Variant, interleaved
from bench.hvp_cases import GPU_CASES
from bench.machine import stamp
from bench.passes import floor

QUICK = "FASTSHARP_BENCH_N" in os.environ
REPS = 1 if QUICK else int(os.environ.get("FASTSHARP_BENCH_REPS", "5"))
COMPILE_SECONDS = int(os.environ.get("FASTSHARP_BENCH_COMPILE", "90"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = ("float32", "tf32", "bf16") if DEVICE.type == "cuda" else ("float32", "bf16")
GATES = {"float32": 1e-4, "tf32": 2e-2, "bf16": 0.3}  # of ||Hv|| between two ways to the same product; kinks of ReLU count in full
LOSS = nn.CrossEntropyLoss()

pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cpu" and not QUICK, reason="no GPU"),
    pytest.mark.timeout(600),
]


@contextmanager
def precision_of(name: str) -> Iterator[None]:
    """Flags for what is not ours; our operators set their own."""
    with ExitStack() as stack:
        if DEVICE.type == "cuda":
            backends: Any = torch.backends
            for part in (backends.cuda.matmul, backends.cudnn.conv):
                stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "tf32" if name == "tf32" else "ieee"
        stack.enter_context(torch.autocast(DEVICE.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the kernel with a second derivative
        yield


@contextmanager
def graphs(on: bool) -> Iterator[None]:
    """What operators decide when they first have all batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSHARP_CUDA_GRAPHS", "1" if on else "0")
        yield


def operator(model: nn.Module, batches: list[Any], precision: str, backend: str, graph: bool) -> Any:
    """A warm operator: two products linearise and capture, a third is replayed."""
    H = fastsharp.Hessian(model, batches, LOSS, backend=backend, memory="auto")
    H = H if precision == "float32" else H.cheap(precision)
    v = torch.ones(1, H.n, device=DEVICE) / H.n**0.5
    with graphs(graph):
        for _ in range(3):
            H.apply(v)
    return H


def forward_over_reverse(model: nn.Module, x: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """jvp(grad(loss)) as torch.func writes it, and its arguments: the weights and the tangents that v means."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in weights.values()]
    tangents = {name: t.view_as(p) for (name, p), t in zip(weights.items(), v.split(sizes), strict=True)}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        value: torch.Tensor = LOSS(functional_call(model, weights, (x,)), y)
        return value

    def product(weights: dict[str, torch.Tensor], tangents: dict[str, torch.Tensor]) -> Any:
        return jvp(grad(loss), (weights,), (tangents,))[1]

    return product, (weights, tangents)


def functional(model: nn.Module, x: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """jvp(grad(loss)) as it is and compiled, as far as either runs; printed why not."""
    product, given = forward_over_reverse(model, x, y, v)
    compiled = torch.compile(product, backend="aot_eager" if QUICK else "inductor")
    found: dict[str, Callable[[], Any]] = {}
    for label, f in (("jvp(grad)", product), ("torch.compile(jvp(grad))", compiled)):
        if COMPILE_SECONDS <= 0 and f is compiled:
            continue
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(max(COMPILE_SECONDS, 60))
        try:
            with torch.no_grad():
                f(*given)
        except Exception as e:  # whatever dynamo and inductor raise: a rival that does not run is a row without it
            print(f"  {label}: {type(e).__name__}: {(str(e) or '-').splitlines()[0]}")
        else:
            found[label] = torch.no_grad()(lambda f=f: f(*given))
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return found


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took longer than {max(COMPILE_SECONDS, 60)} s")


def timed(runs: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
    """Interleaved, see `harness`."""
    return interleaved([Variant(label, run, 0) for label, run in runs.items()], REPS, DEVICE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GPU_CASES)
def test_products(benchmark: Any, name: str, precision: str) -> None:
    if name == "resnet-50":
        pytest.importorskip("torchvision")
    model, batches = GPU_CASES[name](16 if QUICK else 1)
    model.to(DEVICE)
    batches = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]
    ((x, y),) = batches
    params = list(model.parameters())
    launched, replayed = (operator(model, batches, precision, "rop", graph) for graph in (False, True))
    v = torch.randn(1, launched.n, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours = launched.apply(v)
    assert torch.equal(replayed.apply(v), ours)
    captured, note = list(replayed.cuda_graph), next((note for note in replayed.notes if "CUDA graph" in note), "")
    held = replayed._sum.nbytes if replayed._sum is not None else 0
    with precision_of(precision):
        timings = timed(
            {
                "gradient": lambda: torch.autograd.grad(LOSS(model(x), y), params),
                "floor": floor(model, LOSS, batches),
                "engine, launched": lambda: launched.apply(v),
                "engine, replayed": lambda: replayed.apply(v),
            }
        )
    benchmark.pedantic(lambda: replayed.apply(v), rounds=1)
    launched.release()  # the rivals get the memory to themselves
    replayed.release()
    kept = operator(model, batches, precision, "autograd", False)
    exact = kept.apply(v)
    assert float((ours - exact).norm()) <= GATES[precision] * float(exact.norm())
    with precision_of(precision):
        timings |= timed({"autograd, kept graph": lambda: kept.apply(v)})
        kept.release()
        if precision == ("tf32" if DEVICE.type == "cuda" else "float32"):
            timings |= timed(functional(model, x, y, v[0]))
    seconds = {label: t.median for label, t in timings.items()}
    row = {
        "case": name,
        "precision": precision,
        "n": launched.n,
        "cuda_graph": captured or note,
        "over_gradient": {label: s / seconds["gradient"] for label, s in seconds.items()},
        "share_of_floor": {label: seconds["floor"] / s for label, s in seconds.items() if label not in ("floor", "gradient")},
        "graph_bytes": held,
        "median_s": seconds,
        "q20_s": {label: t.q20 for label, t in timings.items()},
        "q80_s": {label: t.q80 for label, t in timings.items()},
        "reps": timings["floor"].reps,
        "tests_green": True,
        **stamp(),
    }
    print(
        f"\n{name}, {precision}: times a gradient ({seconds['gradient']:.3g} s); % of the floor reached; {note or f'replayed for b: {captured}'}"
    )
    for label, s in seconds.items():
        print(f"  {label:26s} {s / seconds['gradient']:6.2f}  {100 * seconds['floor'] / s:5.0f} %")
    benchmark.extra_info.update({"over_gradient": row["over_gradient"]["engine, replayed"]})
    if QUICK:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "hvp_gpu.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
