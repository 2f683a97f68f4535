"""What is promised of every measurement of a network, end to end: residuals, scale, notes, memory (P5, P8, P12, P16)."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import NotConvergedWarning, UnusedParamWarning
from tests.cases import NAMES, net
from tests.curvature.checks import DTYPES, exact, spectrum
from tests.tolerance import eps

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]


# --- P5: residuals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_P5_reported_residuals_are_those_of_the_dense_hessian_and_none_is_falsely_converged(name, dtype):
    """Within 1 % + 10 n eps ||H||, for pairs that converged and, with a budget of 12 products, for pairs that did not."""
    n, H = net(name, dtype), exact(name)
    norm = float(spectrum(name).abs().max())
    room = 10 * len(H) * eps(dtype) * norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        warnings.simplefilter("ignore", UnusedParamWarning)
        A = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
        results = [fastsharp.lanczos(A, k=4, tol=tol, max_iter=most, method="lanczos") for tol, most in ((1e-3, None), (1e-6, 12))]
    for result, tol in zip(results, (1e-3, 1e-6), strict=True):
        X = result.eigenvectors.double()
        true = (X @ H - result.eigenvalues[:, None] * X).norm(dim=1)
        assert bool(((result.residuals - true).abs() <= 0.01 * true + room).all())
        gate = torch.clamp(tol * result.eigenvalues.abs(), min=32 * eps(dtype) * norm)
        assert bool((true <= 1.01 * gate + room)[result.converged].all())
    assert bool(results[0].converged.all()) and not bool(results[1].converged.all())


# --- P8: scale ----------------------------------------------------------------------------------------------------------


def scaled(factor: float) -> Any:
    return lambda o, t: factor * F.cross_entropy(o, t)


@pytest.mark.parametrize("backend", ["mlp", "rop", "autograd"])
@pytest.mark.parametrize("power", [-80, -1, 60])
def test_P8_a_power_of_two_before_the_loss_changes_no_bit(power, backend):
    n = net("mlp_tanh", torch.float32)
    options = {"reduction": "mean", "k": 3, "method": "lanczos"}
    if backend == "mlp":  # the native kernel knows torch's own loss alone, whose class weights carry a factor
        losses = [nn.CrossEntropyLoss(weight=torch.full((3,), 2.0**p), reduction="sum") for p in (0, power)]
        options["reduction"] = "sum"
    else:
        losses = [scaled(1.0), scaled(2.0**power)]
    plain, other = (fastsharp.lanczos(n.model, n.batches, loss, backend=backend, **options) for loss in losses)
    assert torch.equal(other.eigenvalues, 2.0**power * plain.eigenvalues)
    assert torch.equal(other.residuals, 2.0**power * plain.residuals)
    assert torch.equal(other.eigenvectors, plain.eigenvectors) and torch.equal(other.converged, plain.converged)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_eval", "transformer_encoder"])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_P8_losses_of_any_size_in_float32(factor, name):
    """Ten roundings of the norm for each eigenvalue; no NaN in any measurement."""
    n = net(name, torch.float32)
    options = {"reduction": "mean", "k": 2, "method": "lanczos", "tol": 1e-5}
    plain = fastsharp.lanczos(n.model, n.batches, scaled(1.0), **options)
    result = fastsharp.lanczos(n.model, n.batches, scaled(factor), **options)
    assert float((result.eigenvalues / factor - plain.eigenvalues).abs().max()) <= 10 * eps(torch.float32) * float(plain.eigenvalues[0])
    assert bool(result.converged.all())
    density = fastsharp.density(n.model, n.batches, scaled(factor), reduction="mean", steps=15, probes=2)
    assert abs(float(density.weights.sum()) - 1) <= 1e-6 and bool(torch.isfinite(density.nodes).all())
    trace = fastsharp.trace(n.model, n.batches, scaled(factor), reduction="mean", rtol=0.2)
    low, high = (end / factor for end in trace.interval)
    assert low - 1e-4 * abs(low) <= float(exact(name).trace()) <= high + 1e-4 * abs(high)


# --- P12: what is not promised --------------------------------------------------------------------------------------------


def test_P12_results_say_what_is_not_promised_and_the_documentation_says_the_same():
    stated = fastsharp.Eigenpairs.not_promised
    page = (ROOT / "docs" / "concepts" / "residuals-and-bounds.md").read_text()
    listed = re.findall(r"^- (.+)$", page.partition("## Not promised")[2].partition("## ")[0], flags=re.MULTILINE)
    assert len(stated) == len(listed) == 4
    for said, line in zip(stated, listed, strict=True):
        assert line.lower().startswith(said.lower())
    for word in ("multiple", "interior", "kink", "bits"):
        assert sum(word in said for said in stated) == 1


def test_P12_notes_of_a_result_name_kinks_and_an_unsettled_list():
    n = net("mlp_relu")
    with pytest.warns(NotConvergedWarning):
        result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=4, tol=1e-9, max_iter=5, method="lanczos")
    assert any("kinks of relu" in note for note in result.notes)
    assert any("an eigenvalue may be missing" in note for note in result.notes)
    smooth = net("mlp_tanh")
    with pytest.warns(NotConvergedWarning):
        result = fastsharp.lanczos(smooth.model, smooth.batches, smooth.loss_fn, k=4, tol=1e-9, max_iter=5, method="lanczos")
    assert not any("kink" in note for note in result.notes)


KINKED = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "prelu": nn.PReLU(),
    "hardtanh": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardshrink": nn.Hardshrink(0.1),
    "softshrink": nn.Softshrink(0.1),
    "threshold": nn.Threshold(0.1, 0.2),
    "max_pool": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(3, 1, 1), nn.Flatten()),
}
SMOOTH = {"tanh": nn.Tanh(), "gelu": nn.GELU(), "silu": nn.SiLU(), "softplus": nn.Softplus(), "norm": nn.LayerNorm(6)}


@pytest.mark.parametrize("word", [*KINKED, *SMOOTH])
def test_P12_operations_with_kinks_are_noted_and_no_others(word):
    model = nn.Sequential(nn.Linear(6, 6), {**KINKED, **SMOOTH}[word], nn.Linear(6, 3)).double()
    notes = fastsharp.Hessian(model, net("mlp_tanh").batches, nn.CrossEntropyLoss()).notes
    found = [note for note in notes if "kinks of" in note]
    assert [word in note for note in found] == ([True] if word in KINKED else [])


@pytest.mark.parametrize(
    "operation", [torch.abs, lambda x: x.clamp(min=0), lambda x: torch.maximum(x, -x / 2), lambda x: x - x.amax(1, True)]
)
def test_P12_kinks_written_as_functions(operation):
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, lambda o, t: F.cross_entropy(operation(o), t), reduction="mean")
    assert any("kinks of" in note for note in H.notes)


# --- P16: memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["return", "error", "Ctrl-C"])
@pytest.mark.parametrize("memory", ["auto", 64], ids=["kept", "streamed"])
def test_P16_fifty_calls_leave_no_tensor_alive(memory, end):
    n = net("regression", torch.float32)
    calls = [0]

    def loss(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] % 7 == 0 and end != "return":
            raise RuntimeError("no more") if end == "error" else KeyboardInterrupt
        return F.mse_loss(o, t)

    def call() -> None:
        calls[0] = 0
        try:
            fastsharp.lanczos(n.model, n.batches, loss, reduction="mean", k=1, tol=0.1, method="lanczos", memory=memory)
        except (RuntimeError, KeyboardInterrupt):
            assert end != "return"

    call()
    before = _alive()
    for _ in range(50):
        call()
    assert _alive() == before


def _alive() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


GROWTH = """
import ctypes, gc, sys
import torch
from torch import nn
import fastsharp

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

def in_use():
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd

def resident():
    gc.collect()
    libc.malloc_trim(0)
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

libc = ctypes.CDLL(None)
mallinfo2 = libc.mallinfo2
mallinfo2.restype = Info
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 2))
data = [(torch.randn(8, 40), torch.arange(8) % 2)]
backend, count, used = sys.argv[1], int(sys.argv[2]), {"in use": in_use, "resident": resident}[sys.argv[3]]

def calls(count):
    for _ in range(count):
        fastsharp.lanczos(model, data, k=1, tol=0.1, method="lanczos", backend=backend)

calls(count // 2 if count < 1000 else count)  # caches of the process, arenas of the allocator
before = used()
calls(count)
print((used() - before) / count)
"""
CALLS = int(os.environ.get("FASTSHARP_MEMORY_CALLS", "60"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the allocator's own count, glibc 2.33")
@pytest.mark.parametrize("backend", ["mlp", "rop", "autograd"])
def test_P16_memory_does_not_drift(backend):
    """Less than 1 kB a call in a process of its own: what the allocator has handed out, which neither Python nor torch need know of.

    One vector of this net has 8 kB. FASTSHARP_MEMORY_CALLS=1000 looks at the resident memory of as many calls after as many, less than 1 MB.
    """
    what = "resident" if CALLS >= 1000 else "in use"
    run = subprocess.run([sys.executable, "-c", GROWTH, backend, str(CALLS), what], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(run.stdout) < 1000, f"{run.stdout.strip()} bytes a call"
