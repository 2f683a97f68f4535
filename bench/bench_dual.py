"""The dual ops against eager torch that does the same with what is cached, and against the read stream of the machine.

    pytest bench/bench_dual.py -s                one table per size, and rows in bench/results/dual.jsonl
    FASTSHARP_BENCH_REPS=15 pytest ...           rounds (9)

The eager variants reuse every primal quantity, write in place where they can, and take all b vectors in one call. Absolute times are
nobody's business: ratios within one interleaved run are.

Sums of two products are timed by torch and, on a GPU, by the Triton kernel. A GPU, dtype and size where the kernel is at least 1.1 times as
fast in all three products is a row of fastsharp/ops/dual_linear.py; until then torch computes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import harness, roofline
from fastsharp.ops import _registry, dual, force
from fastsharp.ops.dual_linear import dual_linear
from tests.ops.dual_cases import check_activation, check_norm, check_softmax
from tests.ops.linear_cases import check_sums

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "9"))
SMOKE = "FASTSHARP_BENCH_N" in os.environ  # sizes of other benchmarks: here they mean small ones


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1000, 100), (4160, 192), (4096, 1024)])
def test_norm(benchmark: Any, rows: int, columns: int, b: int, device: torch.device) -> None:
    _verify(device, lambda: check_norm(True, 2, 7, 33, torch.float32, device))
    rows = min(rows, 50) if SMOKE else rows
    x, y_g, w = _normal(device, rows, columns), _normal(device, rows, columns), _normal(device, columns)
    x_t, y_gt, out = (_normal(device, b, rows, columns) for _ in range(3))
    w_t, bias_t, w_gt, bias_gt = (_normal(device, b, columns) for _ in range(4))
    stats, x_sums, g_sums = (torch.empty(*s, 2, dtype=torch.float64, device=device) for s in ((rows,), (b, rows), (1, rows)))
    f = dual.Norm(x, w, dual.norm_prepare(x, eps=1e-5, center=True, stats=stats), True)
    dual.norm_adjoint(f, y_g[None], out=None, sums=g_sums)
    dual.norm_tangent(f, x_t, out=None, sums=x_sums)
    second = dual.Second(y_g, g_sums, x_t, x_sums, w_t)
    r = stats[:, 1:].float()
    h, g = (x - stats[:, :1].float()) * r, w * y_g
    mean_g, mean_hg = g.mean(-1, keepdim=True), (g * h).mean(-1, keepdim=True)
    projected = g - mean_g - h * mean_hg

    def eager_tangent() -> tuple[Tensor, Tensor, Tensor]:
        s = (h * x_t).mean(-1, keepdim=True)
        h_t = (x_t - x_t.mean(-1, keepdim=True)).addcmul_(h, s, value=-1).mul_(r)
        return h_t, s, (h_t * w).addcmul_(w_t[:, None], h).add_(bias_t[:, None])

    h_t, s, _ = eager_tangent()

    def eager_adjoint() -> Tensor:
        g_t = (y_gt * w).addcmul_(w_t[:, None], y_g)
        w_gt.add_((y_gt * h).addcmul_(y_g, h_t).sum(1))
        bias_gt.add_(y_gt.sum(1))
        along = (h * g_t).mean(-1, keepdim=True) + (h_t * g).mean(-1, keepdim=True)
        x_gt = (g_t - g_t.mean(-1, keepdim=True)).addcmul_(h, along, value=-1).addcmul_(h_t, mean_hg, value=-1)
        return x_gt.addcmul_(projected, r * s, value=-1).mul_(r)

    size = 4 * rows * columns
    variants = [
        harness.Variant(
            "norm_tangent", lambda: dual.norm_tangent(f, x_t, w_t=w_t, bias_t=bias_t, out=out, sums=x_sums), size * (1 + 2 * b)
        ),
        harness.Variant("eager tangent", eager_tangent, size * (1 + 2 * b)),
        harness.Variant(
            "norm_adjoint", lambda: dual.norm_adjoint(f, y_gt, second=second, out=out, w_gt=w_gt, bias_gt=bias_gt), size * (2 + 3 * b)
        ),
        harness.Variant("eager adjoint", eager_adjoint, size * (2 + 3 * b)),
    ]
    _report(benchmark, "norm", _with_twins(variants, device), x, b, device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1000, 100), (4096, 512)])
def test_activation(benchmark: Any, rows: int, columns: int, b: int, device: torch.device) -> None:
    _verify(device, lambda: check_activation("gelu", 2, 7, 33, torch.float32, device))
    rows = min(rows, 50) if SMOKE else rows
    d1, q = _normal(device, rows, columns), _normal(device, rows, columns)
    x_t, y_gt, out = (_normal(device, b, rows, columns) for _ in range(3))
    bias_gt, size = _normal(device, b, columns), 4 * rows * columns
    variants = [
        harness.Variant("activation_tangent", lambda: dual.activation_tangent(d1, x_t, out=out), size * (1 + 2 * b)),
        harness.Variant("eager tangent", lambda: torch.mul(x_t, d1, out=out), size * (1 + 2 * b)),
        harness.Variant("activation_adjoint", lambda: dual.activation_adjoint(d1, y_gt, q=q, a_t=x_t, out=out), size * (2 + 3 * b)),
        harness.Variant("eager adjoint", lambda: torch.mul(y_gt, d1, out=out).addcmul_(q, x_t), size * (2 + 3 * b)),
        harness.Variant(
            "activation_adjoint and bias",
            lambda: dual.activation_adjoint(d1, y_gt, q=q, a_t=x_t, out=out, bias_gt=bias_gt),
            size * (2 + 3 * b),
        ),
        harness.Variant(
            "eager adjoint and bias", lambda: bias_gt.add_(torch.mul(y_gt, d1, out=out).addcmul_(q, x_t).sum(1)), size * (2 + 3 * b)
        ),
    ]
    _report(benchmark, "activation", _with_twins(variants, device), d1, b, device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 10), (2048, 1000), (64, 50257)])
def test_softmax(benchmark: Any, rows: int, columns: int, b: int, device: torch.device) -> None:
    _verify(device, lambda: check_softmax(2, 7, 33, torch.float32, device))
    rows = min(rows, 5) if SMOKE else rows
    p, weight = torch.softmax(_normal(device, rows, columns), 1), torch.rand(rows, device=device)
    u, out = _normal(device, b, rows, columns), _normal(device, b, rows, columns)

    def eager() -> Tensor:
        y = torch.mul(p, u, out=out)
        return y.addcmul_(p, y.sum(-1, keepdim=True), value=-1).mul_(weight[:, None])

    size = 4 * rows * columns
    variants = [
        harness.Variant("softmax_product", lambda: dual.softmax_product(p, u, weight=weight, out=out), size * (1 + 2 * b)),
        harness.Variant("eager product", eager, size * (1 + 2 * b)),
    ]
    _report(benchmark, "softmax", _with_twins(variants, device), p, b, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1000, 256, 256), (4096, 768, 3072)])
def test_linear(benchmark: Any, rows: int, inputs: int, outputs: int, b: int, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and (dtype != torch.float32 or rows > 1000):
        pytest.skip("one way to compute it on a CPU: one size says what it costs")
    _verify(device, lambda: check_sums(3, 70, 35, 66, dtype, device))
    rows = min(rows, 50) if SMOKE else rows
    x, W, y_g = (_normal(device, *s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    x_t, W_t, y_gt = (_normal(device, b, *s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    W_gt = torch.zeros(b, outputs, inputs, device=device, dtype=dtype)
    products: dict[str, Callable[[], Tensor | None]] = {
        "tangent": lambda: dual_linear(None, (x, W_t.mT), (x_t, W.t())),
        "adjoint of x": lambda: dual_linear(None, (y_gt, W), (y_g, W_t)),
        "adjoint of W": lambda: dual_linear(W_gt, (y_gt.mT, x), (y_g.t(), x_t)),
    }
    entries = {"tangent": rows * outputs, "adjoint of x": rows * inputs, "adjoint of W": inputs * outputs}
    read = rows * inputs + inputs * outputs + rows * outputs
    variants = []
    for name, run in products.items():
        size = dtype.itemsize * (1 + b) * (read - entries[name]) + dtype.itemsize * b * entries[name]
        variants.append(harness.Variant(f"{name} by torch", run, size, {"dtype": str(dtype), "outputs": outputs}))
        if _has_twins(device):
            variants.append(harness.Variant(f"{name} by kernel", partial(_by_kernel, run), size, {"dtype": str(dtype), "outputs": outputs}))
    _report(benchmark, f"linear {dtype}", variants, x, b, device)


def _by_kernel(run: Callable[[], Any]) -> Any:
    with force("triton"):
        return run()


def _has_twins(device: torch.device) -> bool:
    return device.type == "cuda" and isinstance(_registry.available()["triton"], _registry.Backend)


def _with_twins(variants: list[harness.Variant], device: torch.device) -> list[harness.Variant]:
    """On a GPU also the Triton twins of our ops."""
    ours = [v for v in variants if not v.name.startswith("eager")] if _has_twins(device) else []
    return variants + [harness.Variant(f"{v.name} (triton)", partial(_by_kernel, v.run), v.bytes) for v in ours]


def _verify(device: torch.device, check: Callable[[], None]) -> None:
    """The checker of the tests, on everything that is timed."""
    with torch.enable_grad():
        check()
        if _has_twins(device):
            _by_kernel(check)


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


def _report(benchmark: Any, op: str, variants: list[harness.Variant], x: Tensor, b: int, device: torch.device) -> None:
    stream = torch.empty(10_000 if SMOKE else 10_000_000, device=device).normal_()
    timings = harness.interleaved([*roofline.read_variants(stream), *variants], REPS, device)
    roof, by = roofline.ceiling(timings)
    backend = _registry.choose(device).name
    print(f"\n{op}: {backend} on {device}, {tuple(x.shape)}, b = {b}, {torch.get_num_threads()} threads; ceiling {roof:.2f} GB/s ({by})")
    for t in timings.values():
        print(f"  {t.variant.name:28s} {1e3 * t.median:9.3f} ms  [{1e3 * t.q20:.3f}, {1e3 * t.q80:.3f}]  {100 * t.gbps / roof:6.1f} %")
        if t.variant.name not in roofline.READS:
            benchmark.extra_info[t.variant.name] = {"gbps": t.gbps, "roofline_pct": 100 * t.gbps / roof}
    harness.write_rows(
        harness.RESULTS / "dual.jsonl", timings, roof, backend=backend, device=str(device), rows=x.shape[0], columns=x.shape[1], b=b
    )
    benchmark.pedantic(variants[0].run, rounds=3, warmup_rounds=1)
