"""The Gauss-Newton matrix against J' H_L J from dense Jacobians in float64."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev

import fastsharp
from fastsharp.errors import InputError
from tests.cases import cut, net

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = ("mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "cnn_residual", "vit_block", "lstm")
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, z.shape[1]).to(z.dtype)),
    "nonconvex": lambda z, y: (z.sin().sum(1) * (y + 1)).mean(),
}


def dense(model: nn.Module, loss_fn: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """J' H_L J (n, n) of a mean loss over one batch."""
    weights = {k: p.detach() for k, p in model.named_parameters()}
    sizes = [p.numel() for p in weights.values()]

    def output(flat: torch.Tensor) -> torch.Tensor:
        parts = {k: t.view(weights[k].shape) for k, t in zip(weights, flat.split(sizes), strict=True)}
        return functional_call(model, parts, (x,))

    flat = torch.cat([p.reshape(-1) for p in weights.values()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = jacrev(output)(flat).reshape(-1, len(flat))
        z = output(flat)
    return J.T @ hessian(lambda t: loss_fn(t, y))(z).reshape(z.numel(), z.numel()) @ J


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
def test_products_are_those_of_the_dense_matrix_over_uneven_batches(name, loss, dtype):
    exact, n = net(name), net(name, dtype)
    with torch.no_grad():
        G = dense(exact.model, LOSSES[loss], *exact.whole)
    operator = fastsharp.GGN(n.model, cut(n.whole, (4, 5, 2)), LOSSES[loss], reduction="mean")
    V = torch.randn(3, operator.n, dtype=torch.float64).to(dtype)
    assert relative(operator.apply(V), V.double() @ G) <= (1e-12 if dtype == torch.float64 else 2e-5)
    assert operator.settings["operator"] == "ggn"


def test_semidefinite_and_symmetric_for_a_convex_loss():
    n = net("mlp_tanh")
    operator = fastsharp.GGN(n.model, n.batches, n.loss_fn)
    G = operator.apply(torch.eye(operator.n, dtype=torch.float64))
    values = torch.linalg.eigvalsh((G + G.T) / 2)
    assert relative(G, G.T) <= 16 * torch.finfo(torch.float64).eps
    assert float(values[0]) >= -operator.n * torch.finfo(torch.float64).eps * float(values[-1])


def test_it_is_the_hessian_where_the_network_is_linear():
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3).double(), (torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3)
    H, G = fastsharp.Hessian(model, batch), fastsharp.GGN(model, batch)
    V = torch.randn(2, H.n, dtype=torch.float64)
    assert relative(G.apply(V), H.apply(V)) <= 1e-14


def test_eigenpairs_and_trace_in_one_line():
    n = net("mlp_tanh")
    with torch.no_grad():
        G = dense(n.model, n.loss_fn, *n.whole)
    found = fastsharp.lanczos(n.model, n.batches, n.loss_fn, operator="ggn", k=3, tol=1e-8)
    exact = torch.linalg.eigvalsh(G).flip(0)[:3]
    assert relative(found.eigenvalues, exact) <= 1e-8
    checked = found.settings["preflight"]
    assert checked["least_curvature"] >= -1e-14 and checked["rounding"] <= 1e-13 and "finite_difference" not in checked
    low, high = fastsharp.trace(n.model, n.batches, n.loss_fn, operator="ggn", rtol=0.2).interval
    assert low <= float(G.trace()) <= high


def test_a_loss_that_is_not_convex_is_noted():
    n = net("mlp_tanh")
    found = fastsharp.lanczos(n.model, n.batches, lambda z, y: -F.cross_entropy(z, y), operator="ggn", k=1, reduction="mean")
    assert any("not convex" in note for note in found.notes)


class Logits(nn.Module):
    """As transformers' models: logits and, where labels are given, their loss."""

    def __init__(self, penalty: bool = False) -> None:
        super().__init__()
        self.inner, self.penalty = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), penalty

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        z = self.inner(x)
        loss = F.cross_entropy(z.float() if z.dtype == torch.float16 else z * 1.0, labels)
        return types.SimpleNamespace(logits=z, loss=loss + self.inner[0].weight.square().sum() if self.penalty else loss)


def test_a_models_own_loss_is_split_at_its_logits():
    torch.manual_seed(0)
    model = Logits().double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    operator = fastsharp.GGN(model, [{"x": x, "labels": y}])
    plain = fastsharp.GGN(model.inner, [(x, y)])
    v = torch.randn(operator.n, dtype=torch.float64)
    assert relative(operator @ v, plain @ v) <= 1e-14


def refused(model: nn.Module, data: Any, loss_fn: Any, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        operator = fastsharp.GGN(model, data, loss_fn, reduction="mean")
        operator @ torch.ones(operator.n)
    assert all(word in str(caught.value) for word in words) and len(str(caught.value).splitlines()) <= 5


def test_losses_that_cannot_be_split():
    torch.manual_seed(0)
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    model = nn.Linear(6, 3)
    refused(model, [(x, y)], fastsharp.batch_loss(lambda m, b: F.cross_entropy(m(b[0]), b[1])), "batch_loss", "loss_fn(output, target)")
    refused(Logits(penalty=True), [{"x": x, "labels": y}], None, "inner.0.weight", "penalty", "operator='hessian'")
    refused(model, [(x, y)], lambda z, t: F.cross_entropy(z, t) + model.weight.square().sum(), "weight", "penalty")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    refused(Two(), [(x, y)], lambda z, t: F.cross_entropy(z[0] + z[1], t), "2 differentiable tensors")


def test_a_loss_linear_in_the_output_has_no_curvature():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    operator = fastsharp.GGN(model, [(torch.randn(9, 6), torch.arange(9) % 3)], lambda z, t: z.mean(), reduction="mean")
    assert not bool((operator @ torch.ones(operator.n)).any())


def test_cheap_products_and_kept_ones():
    n = net("mlp_tanh", torch.float32)
    operator = fastsharp.GGN(n.model, n.batches, n.loss_fn)
    V = torch.randn(2, operator.n)
    first = operator.apply(V)
    assert torch.equal(operator.apply(V), first)
    assert torch.equal(fastsharp.GGN(n.model, n.batches, n.loss_fn, memory=0).apply(V), first)
    assert 2.0**-10 <= relative(operator.cheap("bf16").apply(V), first) <= 2.0**-4
