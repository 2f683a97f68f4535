"""Hessians by inputs and activations against dense ones from torch's double backward, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsharp
from fastsharp.errors import ArgumentTypeError, BatchFormatError, DtypeError, InputError, OutputFormatError, ShapeError, StaleOperatorError
from tests.cases import Net, net
from tests.curvature.checks import DTYPES, PRODUCT_GATE, product_error
from tests.unchanged import check_message, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = ("mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "cnn_residual", "vit_block", "gru")
INNER = {
    "mlp_tanh": "1",
    "cnn_batchnorm_eval": "4",
    "transformer_encoder": "layer.norm1",
    "tied_language_model": "embed",
    "hf_style": "embed",
}


def dense(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """d^2 f / dx^2 by two reverse passes of torch's own, row by row."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(lambda z: f(z.view(x.shape)), x.reshape(-1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def shifted(n: Net, module: str) -> torch.Tensor:
    """d^2 L / da^2 by the output of a module."""
    inner = dict(n.model.named_modules())[module]
    shapes: list[torch.Tensor] = []
    handle = inner.register_forward_hook(lambda m, i, o: shapes.append(torch.zeros_like(o)))
    n.objective(n.model, n.whole)
    handle.remove()

    def f(z: torch.Tensor) -> torch.Tensor:
        handle = inner.register_forward_hook(lambda m, i, o: o + z)
        try:
            return n.objective(n.model, n.whole)
        finally:
            handle.remove()

    return dense(f, shapes[-1].detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_by_the_input_as_dense(name, dtype):
    n, double = net(name, dtype), net(name)
    D = dense(lambda z: F.cross_entropy(double.model(z), double.whole[1]), double.whole[0])
    with unchanged(n.model, *n.whole):
        A = fastsharp.InputHessian(n.model, n.whole, n.loss_fn)
        result = fastsharp.lanczos(A, k=1)
    assert product_error(A, D) <= PRODUCT_GATE[dtype]
    assert A.layout.shapes == (tuple(n.whole[0].shape),) and result.settings["preflight"]["level"] == "fast"
    blocks = D.view(11, D.shape[0] // 11, 11, -1)
    apart = blocks.clone()
    apart[torch.arange(11), :, torch.arange(11)] = 0.0
    assert float(apart.norm()) <= 1e-14 * float(D.norm())  # samples do not see each other: the oracle says so


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INNER)
def test_by_an_activation_as_dense(name, dtype):
    n = net(name, dtype)
    D = shifted(net(name), INNER[name])
    tensors = n.whole.values() if isinstance(n.whole, dict) else n.whole
    with unchanged(n.model, *tensors):
        A = fastsharp.ActivationHessian(n.model, n.whole, n.loss_fn, module=INNER[name])
        result = fastsharp.lanczos(A, k=1)
    assert product_error(A, D) <= PRODUCT_GATE[dtype]
    assert result.settings["preflight"]["level"] == "fast"
    assert result.settings["operator"] == f"hessian by the output of {INNER[name]}"


def test_one_sample_and_a_sum_over_samples_give_the_samples_own_hessians():
    n = net("mlp_tanh")
    x, y = n.whole
    one = fastsharp.InputHessian(n.model, (x[3:4], y[3:4]), nn.CrossEntropyLoss())
    D = dense(lambda z: F.cross_entropy(n.model(z), y[3:4]), x[3:4])
    assert one.n == 6 and product_error(one, D) <= 1e-10
    whole = fastsharp.InputHessian(n.model, n.whole, nn.CrossEntropyLoss(reduction="sum"))
    full = whole.apply(torch.eye(whole.n, dtype=torch.float64))
    assert float((full[18:24, 18:24] - D).norm()) <= 1e-10 * float(D.norm())


@pytest.mark.parametrize("wrt", [0, 1])
def test_one_of_several_inputs(wrt):
    n = net("two_inputs")
    (a, b), y = n.whole
    A = fastsharp.InputHessian(n.model, n.whole, n.loss_fn, wrt=wrt)
    D = dense(lambda z: F.cross_entropy(n.model(*((z, b) if wrt == 0 else (a, z))), y), (a, b)[wrt])
    assert product_error(A, D) <= 1e-10


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Embedding(5, 4)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.a(torch.tanh(features * self.b(tokens)))


def named() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    batch = {"features": torch.randn(6, 4, dtype=torch.float64), "tokens": torch.arange(6) % 5, "labels": torch.arange(6) % 3}
    return Named().double(), batch


@pytest.mark.parametrize("as_pair", [False, True])
def test_dict_batches(as_pair):
    model, batch = named()
    given = ({"features": batch["features"], "tokens": batch["tokens"]}, batch["labels"]) if as_pair else batch
    for A, x in (
        (fastsharp.InputHessian(model, given, nn.CrossEntropyLoss()), batch["features"]),
        (fastsharp.ActivationHessian(model, given, nn.CrossEntropyLoss(), module="b"), model.b(batch["tokens"]).detach()),
    ):
        other = model.b(batch["tokens"]).detach() if x is batch["features"] else batch["features"]
        D = dense(lambda z, other=other: F.cross_entropy(model.a(torch.tanh(z * other)), batch["labels"]), x)
        assert product_error(A, D) <= 1e-10


def test_gauss_newton_by_the_input_is_positive_semidefinite_and_other_than_the_hessian():
    n = net("mlp_tanh")
    G = fastsharp.InputHessian(n.model, n.whole, n.loss_fn, operator="ggn")
    x, y = n.whole
    J = torch.autograd.functional.jacobian(lambda z: n.model(z), x).reshape(33, 66)
    z = n.model(x).detach()
    L = torch.autograd.functional.hessian(lambda t: F.cross_entropy(t, y), z).reshape(33, 33)
    assert product_error(G, J.T @ L @ J) <= 1e-10
    assert G.settings["operator"] == "ggn by the input"


def test_it_watches_the_model_and_takes_its_new_weights():
    n = net("mlp_tanh")
    A = fastsharp.InputHessian(n.model, n.whole, n.loss_fn)
    B = fastsharp.ActivationHessian(n.model, n.whole, n.loss_fn, module="1")
    seen = (A.provenance, B.provenance)
    with torch.no_grad():
        n.model[4].weight.mul_(1.5)
    for operator, before in zip((A, B), seen, strict=True):
        with pytest.raises(StaleOperatorError):
            operator.check_unchanged()
        operator.refresh()
        assert operator.provenance["weights_hash"] != before["weights_hash"] and operator.provenance["model"] == "Sequential"
        assert operator.provenance["input_hash"] == before["input_hash"]
    x, y = n.whole
    assert product_error(A, dense(lambda z: F.cross_entropy(n.model(z), y), x)) <= 1e-10
    assert product_error(B, shifted(n, "1")) <= 1e-10


def test_all_weights_may_be_frozen_and_large_batches_are_checked_on_some_samples():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().requires_grad_(False)
    batch = (torch.randn(70, 4, dtype=torch.float64), torch.arange(70) % 3)
    A = fastsharp.InputHessian(model, batch, lambda z, y: F.cross_entropy(z, y))  # the reduction is found by halving the batch
    result = fastsharp.lanczos(A, k=2, tol=1e-8)
    D = dense(lambda z: F.cross_entropy(model(z), batch[1]), batch[0])
    assert float((result.eigenvalues - torch.linalg.eigvalsh(D).flip(0)[:2]).abs().max()) <= 1e-10


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(torch.tanh(self.a(x))))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.reshape(-1, 3)).reshape(len(x), 8))


def bad(kind: str) -> Any:
    n = net("mlp_tanh")
    x, y = n.whole
    if kind == "dtype":
        return fastsharp.InputHessian(n.model, (x.float(), y), n.loss_fn)
    if kind == "batches":
        return fastsharp.InputHessian(n.model, n.batches, n.loss_fn)
    if kind == "no data":
        return fastsharp.InputHessian(n.model, None, n.loss_fn)
    if kind == "params":
        return fastsharp.InputHessian(n.model, n.whole, n.loss_fn, params="0.*")
    if kind == "batch_loss":
        return fastsharp.InputHessian(n.model, n.whole, fastsharp.batch_loss(lambda m, b: m(b[0]).sum()))
    if kind == "operator":
        return fastsharp.InputHessian(n.model, n.whole, n.loss_fn, operator="fisher")
    if kind == "model":
        return fastsharp.InputHessian(torch.eye(3), n.whole, n.loss_fn)
    if kind == "integers":
        return fastsharp.InputHessian(*(lambda m: (m.model, m.whole, m.loss_fn))(net("tied_language_model")))
    if kind == "integer by name":
        return fastsharp.InputHessian(*named(), nn.CrossEntropyLoss(), wrt="tokens")
    if kind == "several":
        return fastsharp.InputHessian(*(lambda m: (m.model, m.whole, m.loss_fn))(net("two_inputs")))
    if kind == "unknown":
        return fastsharp.InputHessian(n.model, n.whole, n.loss_fn, wrt="pixels")
    if kind == "module":
        return fastsharp.ActivationHessian(n.model, n.whole, n.loss_fn, module="9")
    if kind == "twice":
        return fastsharp.ActivationHessian(Twice().double(), n.whole, n.loss_fn, module="a")
    if kind == "flat":
        return fastsharp.ActivationHessian(Flat().double(), n.whole, n.loss_fn, module="a")
    recurrent = net("gru")
    return fastsharp.ActivationHessian(recurrent.model, recurrent.whole, recurrent.loss_fn, module="rnn")


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("dtype", DtypeError, ("float32", "float64")),
        ("batches", BatchFormatError, ("several batches", "expected one")),
        ("no data", InputError, ("data",)),
        ("params", InputError, ("params=",)),
        ("batch_loss", InputError, ("batch_loss", "loss_fn(output, target)")),
        ("operator", InputError, ("'fisher'", "'ggn'")),
        ("model", ArgumentTypeError, ("Tensor",)),
        ("integers", DtypeError, ("int64", "ActivationHessian")),
        ("integer by name", DtypeError, ("'tokens'", "int64", "ActivationHessian")),
        ("several", InputError, ("0 (torch.float64), 1 (torch.float64)", "wrt=")),
        ("unknown", InputError, ("'pixels'",)),
        ("module", InputError, ("'9'", "0, 1, 2")),
        ("twice", InputError, ("'a'", "2 times")),
        ("flat", ShapeError, ("'a'", "(22, 4)", "11 samples")),
        ("tuple", OutputFormatError, ("'rnn'", "tuple")),
    ],
)
def test_what_has_no_such_derivative_is_refused_by_name(kind, error, words):
    with pytest.raises(error) as caught:
        bad(kind)
    check_message(caught.value, *words)
