"""Fisher matrices, the covariance of gradients and the residual against dense float64 matrices from explicit loops over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsharp
from fastsharp.curvature.scores import Classes
from tests.cases import SAMPLES, Net, cut, net

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = ("mlp_tanh", "cnn_batchnorm_eval", "vit_block", "tied_language_model", "hf_style", "regression")
SIZES = (4, 5, 2)
DTYPES = [torch.float64, torch.float32]
ROOM = {torch.float64: 1e-10, torch.float32: 1e-5}
SAMPLED = 3


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def flat_gradient(loss: torch.Tensor, n: Net) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(n.model.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in grads])


def logits_of(n: Net, i: int) -> torch.Tensor:
    """The network's output for sample i alone, classes last: (positions, classes), or (1, numbers)."""
    one = cut(n.whole, (i, 1))[1]
    with sdpa_kernel([SDPBackend.MATH]):
        if isinstance(one, dict):
            return n.model(one["input_ids"])["logits"][0]
        z = n.model(one[0])[0]
    return z.T if z.ndim == 2 else z[None]


def labels_of(n: Net, i: int) -> torch.Tensor:
    return (n.whole["labels"] if isinstance(n.whole, dict) else n.whole[1])[i].reshape(-1)


def counted(n: Net) -> float:
    """What the mean over all samples divides by."""
    return float(SAMPLES if n.name == "regression" else sum((labels_of(n, i) != -100).sum() for i in range(SAMPLES)))


def share(n: Net, i: int) -> torch.Tensor:
    """The sum of sample i's losses: L is their sum divided by `counted`."""
    z = logits_of(n, i)
    if n.name == "regression":
        return (z[0] - n.whole[1][i]).square().mean()
    return F.cross_entropy(z, labels_of(n, i), reduction="sum")


def gradients(n: Net) -> torch.Tensor:
    """g_i with L = (1/N) sum l_i, by rows."""
    return torch.stack([flat_gradient(share(n, i), n) for i in range(SAMPLES)]) * SAMPLES / counted(n)


def empirical(n: Net) -> torch.Tensor:
    g = gradients(n)
    return g.T @ g / SAMPLES


def drawn(n: Net, operator: fastsharp.Fisher) -> torch.Tensor:
    """The Monte-Carlo Fisher matrix from the gradients of the losses at the labels that were drawn, one by one."""
    total, start = torch.zeros(operator.n, operator.n, dtype=torch.float64), 0
    for index, batch in operator.objective.batches:
        with operator.objective.quiet():
            value = operator.objective.evaluate(index, batch)
            scores = operator.form.constants(value, batch, operator.objective.loss, operator.objective.draw_seed(index))
        size = SIZES[index]
        for i in range(size):
            z = logits_of(n, start + i)
            if isinstance(scores, Classes):
                labels = scores.label[i].reshape(len(z), -1)
                valid = labels_of(n, start + i) != -100
                losses = [F.cross_entropy(z[t], y) for t in range(len(z)) if valid[t] for y in labels[t]]
            else:  # (2/D) (z - y) = r sqrt(batch size): the batch's own mean is over so many numbers
                targets = z.detach() - scores.r[i].double().T * size**0.5 * z.shape[1] / 2
                losses = [(z[0] - y).square().mean() for y in targets]
            for loss in losses:
                g = flat_gradient(loss, n)
                total += torch.outer(g, g)
        start += size
    return total / SAMPLED / counted(n)


def residual(n: Net) -> torch.Tensor:
    """sum_k (dL/dz_k) d^2 z_k / dtheta^2, by double backward of one number of the output after the other."""
    params = list(n.model.parameters())
    size = sum(p.numel() for p in params)
    total = torch.zeros(size, size, dtype=torch.float64)
    for i in range(SAMPLES):
        z = logits_of(n, i)
        if n.name == "regression":
            slope = 2 * (z - n.whole[1][i]) / z.numel()
        else:
            y = labels_of(n, i)
            slope = (z.softmax(-1) - F.one_hot(y.clamp_min(0), z.shape[1])) * (y != -100)[:, None]
        held = (z * slope.detach()).sum()
        grads = torch.autograd.grad(held, params, create_graph=True)
        g = torch.cat([part.reshape(-1) for part in grads])
        for row in range(size):
            parts = torch.autograd.grad(g[row], params, retain_graph=True, allow_unused=True, materialize_grads=True)
            total[row] += torch.cat([part.reshape(-1) for part in parts])
    return total / counted(n)


DENSE: dict[str, Callable[[Net], torch.Tensor]] = {
    "empirical-fisher": empirical,
    "gradient-covariance": lambda n: torch.cov(gradients(n).T, correction=0),
    "residual": residual,
}
MADE: dict[str, Callable[..., Any]] = {
    "empirical-fisher": lambda *args, **more: fastsharp.Fisher(*args, kind="empirical", **more),
    "gradient-covariance": fastsharp.GradientCovariance,
    "residual": fastsharp.Residual,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", DENSE)
def test_products_are_those_of_the_dense_matrix_over_uneven_batches(kind, name):
    exact = DENSE[kind](net(name))
    for dtype in DTYPES:
        n = net(name, dtype)
        V = torch.randn(3, len(exact), dtype=torch.float64).to(dtype)
        for backend in ("auto", "autograd"):
            operator = MADE[kind](n.model, cut(n.whole, SIZES), n.loss_fn, backend=backend)
            assert relative(operator.apply(V), V.double() @ exact) <= ROOM[dtype]
            assert operator.settings["operator"] == kind and operator.backend == ("rop" if backend == "auto" else backend)


@pytest.mark.parametrize("name", NETS)
def test_monte_carlo_products_are_those_of_the_drawn_labels(name):
    for dtype in DTYPES:
        n = net(name, dtype)
        operators = [
            fastsharp.Fisher(n.model, cut(n.whole, SIZES), n.loss_fn, mc_samples=SAMPLED, seed=5, backend=backend)
            for backend in ("auto", "autograd")
        ]
        exact = drawn(net(name), operators[0])
        V = torch.randn(3, operators[0].n, dtype=torch.float64).to(dtype)
        for operator in operators:
            assert relative(operator.apply(V), V.double() @ exact) <= ROOM[dtype]


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical-fisher", "gradient-covariance"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_semidefinite_to_rounding(kind, dtype):
    for name in NETS:
        n = net(name, dtype)
        operator = fastsharp.api.subject.OPERATORS[kind](n.model, n.batches, n.loss_fn)
        A = operator.apply(torch.eye(operator.n, dtype=dtype)).double()
        values = torch.linalg.eigvalsh((A + A.T) / 2)
        assert relative(A.T, A) <= 16 * torch.finfo(dtype).eps
        assert float(values[0]) >= -(operator.n**0.5) * 16 * torch.finfo(dtype).eps * float(values[-1])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_covariance_with_its_degrees_of_freedom(ddof, reduction):
    n = net("mlp_tanh")
    g = gradients(n)
    exact = torch.cov(g.T, correction=ddof) * (SAMPLES if reduction == "sum" else 1)
    loss = torch.nn.CrossEntropyLoss(reduction=reduction)
    operator = fastsharp.GradientCovariance(n.model, n.batches, loss, ddof=ddof)
    assert relative(operator.apply(torch.eye(operator.n, dtype=torch.float64)), exact) <= 1e-12
    sums = fastsharp.Fisher(n.model, n.batches, loss, kind="empirical").apply(torch.eye(operator.n, dtype=torch.float64))
    assert relative(sums, g.T @ g / (1 if reduction == "sum" else SAMPLES)) <= 1e-12


def test_class_weights_make_the_examples_gradients_those_of_the_weighted_loss():
    n = net("mlp_tanh")
    weight = torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64)
    x, y = n.whole
    rows = torch.stack([flat_gradient(weight[y[i]] * F.cross_entropy(n.model(x[i : i + 1]), y[i : i + 1]), n) for i in range(SAMPLES)])
    rows *= SAMPLES / weight[y].sum()
    operator = fastsharp.Fisher(n.model, n.batches, torch.nn.CrossEntropyLoss(weight=weight), kind="empirical")
    assert relative(operator.apply(torch.eye(operator.n, dtype=torch.float64)), rows.T @ rows / SAMPLES) <= 1e-12
    mean = flat_gradient(F.cross_entropy(n.model(x), y, weight=weight), n)
    assert relative(rows.mean(0), mean) <= 1e-12


def test_batches_do_not_matter_and_ignored_sequences_count():
    n = net("tied_language_model")
    n.whole[1][3] = -100
    V = torch.randn(2, sum(p.numel() for p in n.model.parameters()), dtype=torch.float64)
    for kind in DENSE:
        first = MADE[kind](n.model, [n.whole], n.loss_fn).apply(V)
        for sizes in ((3, 1, 7), (1,) * SAMPLES):
            assert relative(MADE[kind](n.model, cut(n.whole, sizes), n.loss_fn).apply(V), first) <= 1e-12
    assert relative(MADE["empirical-fisher"](n.model, [n.whole], n.loss_fn).apply(V), V @ empirical(n)) <= 1e-12


def test_the_residual_is_small_without_cancellation():
    """At targets near the output, R is 1e-9 of H, and is known to 1e-12 of itself all the same."""
    n = net("regression")
    with torch.no_grad():
        z = n.model(n.whole[0])
    y = z + 1e-9 * n.whole[1]
    V = torch.randn(2, sum(p.numel() for p in n.model.parameters()), dtype=torch.float64)
    small = fastsharp.Residual(n.model, (n.whole[0], y), n.loss_fn).apply(V)
    large = fastsharp.Residual(n.model, (n.whole[0], z + n.whole[1]), n.loss_fn).apply(V)
    assert relative(small / 1e-9, large) <= 1e-6  # y - z itself is rounded to 1e-16 / 1e-9
    assert float(small.norm()) <= 1e-7 * float(fastsharp.Hessian(n.model, (n.whole[0], y), n.loss_fn).apply(V).norm())


def test_the_residual_of_a_linear_network_is_zero():
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(5, 3), (torch.randn(9, 5), torch.arange(9) % 3)
    for backend in ("rop", "autograd"):
        operator = fastsharp.Residual(model, batch, backend=backend)
        assert not bool((operator @ torch.randn(operator.n)).any())
    found = fastsharp.lanczos(model, batch, operator="residual", k=1)
    assert float(found.eigenvalues[0]) == 0.0
