"""Cheap Hessian products: bf16 inside, nothing changed outside, and eigenpairs that the exact products have the last word on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp import guard
from fastsharp.errors import DeviceError, DtypeError, InputError, StaleOperatorError
from fastsharp.krylov.ladder import ladder
from tests.cases import NAMES, SAMPLES, net
from tests.curvature.checks import PRODUCT_GATE, exact, hessian, spectrum
from tests.unchanged import check_message, flags, refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
SMOOTH = [name for name in NAMES if name not in ("mlp_relu", "cnn_batchnorm_eval", "cnn_residual", "unused")]
BF16 = 2.0**-8


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", SMOOTH)
def test_the_engine_rounds_no_more_than_autograd(name):
    """Both run the forward pass under autocast; ours rounds tangents as it rounds activations, autograd rounds its second backward."""
    V = torch.randn(3, exact(name).shape[0])
    want = V.double() @ exact(name)
    errors = {}
    for backend in ("rop", "autograd"):
        cheap = hessian(name, torch.float32, backend=backend).cheap("bf16")
        errors[backend] = relative(cheap.apply(V), want)
        assert cheap.backend == backend
    assert errors["rop"] <= 2 * errors["autograd"]


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("trained", [False, True])
def test_norms_of_half_precision_activations_have_their_rule(norm, trained):
    """Activations in bfloat16 beside weights in float32: by the rule, in float32 inside, as torch's own kernels."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).train(trained)
    x, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    options = {"bn": "frozen-batch-stats"} if trained else {}
    V = torch.randn(2, sum(p.numel() for p in model.parameters()))
    H = {b: fastsharp.Hessian(model, [(x, y)], nn.CrossEntropyLoss(), backend=b, **options) for b in ("rop", "autograd")}
    products = {b: H[b].cheap("bf16").apply(V) for b in H}
    cheap = H["rop"].cheap("bf16")
    cheap.apply(V)
    assert not any("double backward" in note for note in cheap.notes)
    want = H["autograd"].apply(V)
    assert relative(products["rop"], want) <= 2 * relative(products["autograd"], want)


@pytest.mark.parametrize("name", SMOOTH)
def test_products_are_those_of_the_matrix_up_to_bf16(name):
    """A handful of roundings of relative size 2^-8 one after the other; and not fewer than one, or the products are not cheap."""
    H = hessian(name, torch.float32)
    cheap = H.cheap("bf16")
    V = torch.randn(3, H.n)
    error = relative(cheap.apply(V), V.double() @ exact(name))
    assert BF16 / 4 <= error <= 16 * BF16
    assert relative(H.apply(V), V.double() @ exact(name)) <= PRODUCT_GATE[torch.float32]  # the exact ones next to it are exact
    assert cheap.noise == BF16 and H.noise == 0.0
    assert "products in bf16" in cheap.notes and cheap.settings["products"] == "bf16" and H.settings["products"] == "float32"


@pytest.mark.parametrize("which", ["LA", "BE"])
@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_residual", "vit_block"])
def test_eigenpairs_are_those_of_the_dense_hessian(name, which):
    n, H = net(name, torch.float32), exact(name)
    result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, which=which, k=4, precision="bf16", method="lanczos", tol=1e-3)
    assert bool(result.converged.all()) and result.verified and not result.settings["fallback"]
    room = PRODUCT_GATE[torch.float32] * float(spectrum(name).abs().max())  # P4: a float32 product
    values = spectrum(name)
    want = values[:4] if which == "LA" else torch.cat([values[:2], values[-2:]])
    assert bool(((result.eigenvalues - want).abs() <= result.error_bounds + room).all())
    X = result.eigenvectors.double()
    true = (X @ H - result.eigenvalues[:, None] * X).norm(dim=1)
    assert float((result.residuals - true).abs().max()) <= room
    assert bool((true <= 1e-3 * result.eigenvalues.abs() + room).all())
    assert result.settings["cheap_products"] == result.n_matvec and result.settings["exact_products"] == result.n_verify
    assert any(f"{result.n_matvec} cheap products" in note for note in result.notes) and "products in bf16" not in result.notes


@contextmanager
def own_autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.float16, cache_enabled=True):
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {"plain": ExitStack, "autocast": own_autocast, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("name", ["transformer_encoder", "lstm", "cnn_batchnorm_eval"])
def test_nothing_changes(name, context):
    n = net(name, torch.float32)
    with context(), unchanged(n.model, *n.batches[0]):
        fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=2, tol=1e-2, precision="bf16", method="lanczos")


def test_nothing_changes_when_the_loss_breaks():
    n = net("mlp_tanh", torch.float32)
    H = hessian("mlp_tanh", torch.float32)
    calls: list[int] = []

    def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:  # beyond the first look at the data, in a cheap product
            raise OSError("the loss broke")
        return nn.functional.cross_entropy(output, target)

    with unchanged(n.model), pytest.raises(OSError, match="the loss broke"):
        fastsharp.lanczos(
            n.model, n.batches, failing, k=2, reduction="mean", precision="bf16", preflight="off", method="lanczos", memory=64
        )
    assert H.n


def test_autocast_is_on_in_cheap_products_alone():
    seen: list[tuple[bool, Any, bool]] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(flags()["autocast"])
            return self.inner(x)

    H = fastsharp.Hessian(Watching(), net("mlp_tanh", torch.float32).batches)
    v = torch.randn(H.n)
    seen.clear()
    with torch.autocast("cpu", torch.float16):
        H.cheap("bf16") @ v
        assert seen and all(on and dtype == torch.bfloat16 and not cache for on, dtype, cache in seen)
        seen.clear()
        H @ v
    assert seen and not any(on for on, _, _ in seen)


@pytest.mark.parametrize("memory", ["auto", 2000, 0], ids=["kept", "recomputed", "streamed"])
def test_products_do_not_depend_on_what_is_kept(memory):
    V = torch.randn(2, exact("mlp_tanh").shape[0])
    kept = hessian("mlp_tanh", torch.float32).cheap("bf16").apply(V)
    cheap = hessian("mlp_tanh", torch.float32, memory=memory).cheap("bf16")
    assert torch.equal(cheap.apply(V), kept) and torch.equal(cheap.apply(V), kept)


def test_graphs_of_both_operators_share_one_budget():
    full = hessian("mlp_tanh", torch.float32, backend="rop")  # whose graphs outweigh those of bf16
    v = torch.randn(full.n)
    full @ v
    budget = int(1.5 * full._kept_bytes) + full.objective.batches.nbytes
    H = hessian("mlp_tanh", torch.float32, memory=budget, backend="rop")
    cheap = H.cheap("bf16")
    cheap @ v, H @ v
    assert cheap._kept_bytes > 0 and H._kept_bytes + cheap._kept_bytes <= H.objective.graph_budget
    assert len(H._kept) < len(full._kept)
    del cheap  # its graphs are gone, and with them its share
    H.refresh() @ v
    assert len(H._kept) == len(full._kept)


def test_weights_are_watched_and_taken_anew_together():
    n = net("mlp_tanh", torch.float32)
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    cheap, v = H.cheap("bf16"), torch.randn(H.n)
    cheap @ v
    with torch.no_grad():
        n.model[0].weight.mul_(2)
    with pytest.raises(StaleOperatorError, match=r"0\.weight"):
        cheap @ v
    H.refresh()
    with pytest.raises(StaleOperatorError) as seen:
        cheap @ v
    check_message(seen.value, "another operator", "refresh()")
    assert relative(cheap.refresh() @ v, H @ v) <= 16 * BF16


def test_frozen_statistics_and_masks_are_those_of_the_exact_products():
    """A BatchNorm in train mode and Dropout: the cheap operator runs first, and the exact one must not see its statistics."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    options: dict[str, Any] = {"bn": "frozen-batch-stats", "dropout": "fixed-masks"}
    batches = net("mlp_tanh", torch.float32).batches
    H = fastsharp.Hessian(model, batches, **options)
    v = torch.randn(H.n)
    cheap = H.cheap("bf16") @ v
    assert torch.equal(H @ v, fastsharp.Hessian(model, batches, **options) @ v)
    assert relative(cheap, H @ v) <= 16 * BF16


def test_what_has_no_cheap_products():
    n = net("mlp_tanh")
    with refuses(DtypeError, "float64", "precision='auto'", model=n.model):
        fastsharp.lanczos(n.model, n.batches, n.loss_fn, precision="bf16")
    with refuses(InputError, "'fp8'", "'bf16'", model=n.model):
        hessian("mlp_tanh", torch.float32).cheap("fp8")
    if not torch.cuda.is_available():
        n = net("mlp_tanh", torch.float32)
        with refuses(DeviceError, "tf32", "cpu", model=n.model):
            fastsharp.lanczos(n.model, n.batches, n.loss_fn, precision="tf32")


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_tf32_flags_are_set_inside_and_put_back(before):
    """The flags of CUDA can be written without a CUDA device; only the device of the guard is a stand-in."""
    backends: Any = torch.backends
    parts = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    with ExitStack() as stack:
        for part in parts:
            stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = before
        model = nn.Linear(2, 2)
        for tf32 in (True, False):
            with unchanged(None), ExitStack() as inside:
                guard._set_precision(inside, model, torch.device("cuda"), tf32)
                assert all((part.fp32_precision == "tf32") == tf32 for part in parts)


def test_a_cheap_hessian_is_an_operator_of_its_own():
    """The plain solver takes it, within what its noise allows."""
    cheap = hessian("mlp_tanh", torch.float32).cheap("bf16")
    result = fastsharp.lanczos(cheap, k=1, tol=0.1)
    assert float((result.eigenvalues - spectrum("mlp_tanh")[:1]).abs()) <= 16 * BF16 * float(spectrum("mlp_tanh")[0])
    assert "products in bf16" in result.notes


def test_the_ladder_takes_fewer_exact_products_than_a_plain_run():
    n = net("deep", torch.float32)
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    counted = fastsharp.CountingOperator(H)
    result = ladder(H.cheap("bf16"), counted, k=1, tol=1e-3, check="off", method="lanczos")
    plain = fastsharp.lanczos(H, k=1, tol=1e-3, method="lanczos")
    assert counted.count == result.settings["exact_products"] < plain.n_matvec + plain.n_verify
    assert result.provenance["samples"] == SAMPLES
