"""P^-1/2 H P^-1/2 and weight decay from live optimisers, against torch's own steps and dense matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

import fastsharp
from fastsharp.errors import ArgumentTypeError, DtypeError, InputError, ParamError, ShapeError, StaleOperatorError
from fastsharp.operator import DenseOperator
from tests.cases import Net, net
from tests.curvature.checks import DTYPES, PRODUCT_GATE, exact, hessian, product_error
from tests.oracles.dense import dense_hessian
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = ("mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "cnn_residual", "vit_block", "hf_style")


def stepped(n: Net, optimizer: optim.Optimizer, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights before the last step, after it), flat."""
    for _ in range(steps):
        optimizer.zero_grad()
        n.objective(n.model, n.whole).backward()
        before = flat(n.model)
        optimizer.step()
    return before, flat(n.model)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (optim.Adam, {}),
        (optim.Adam, {"amsgrad": True, "weight_decay": 1e-2}),
        (optim.Adam, {"foreach": True, "betas": (0.8, 0.99), "eps": 1e-3}),
        (optim.Adam, {"fused": True}),
        (optim.AdamW, {"weight_decay": 0.0}),
    ],
    ids=["plain", "amsgrad", "foreach", "fused", "adamw"],
)
def test_P_is_what_torch_divides_the_momentum_by(cls, options):
    """theta_new = theta - lr P^-1 m, so that one step of torch's own gives P entry by entry."""
    n = net("mlp_tanh")
    optimizer = cls(n.model.parameters(), lr=1e-2, **options)
    before, after = stepped(n, optimizer)
    m = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in n.model.parameters()])
    P = fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer).diagonal
    # the difference of weights is rounded to eps |theta|
    room = 4 * torch.finfo(torch.float64).eps * (1 + before.abs() / (after - before).abs())
    assert bool(((P / (1e-2 * m / (before - after)) - 1).abs() <= 8 * room).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_products_are_those_of_the_dense_matrix(name, dtype):
    n = net(name, dtype)
    optimizer = optim.Adam(n.model.parameters(), lr=1e-2, eps=1e-3)
    stepped(n, optimizer)
    D = dense_hessian(n.model, n.objective, n.whole)
    P = torch.cat([dense_P(optimizer, p).reshape(-1) for p in n.model.parameters()])
    A = fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer)
    assert product_error(A, D / torch.outer(P.sqrt(), P.sqrt())) <= PRODUCT_GATE[dtype]
    assert product_error(A, D / P[:, None]) > 1e-3


def dense_P(optimizer: optim.Optimizer, p: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    v = optimizer.state[p]["exp_avg_sq"].double()
    return (1 - 0.9**3) * ((v / (1 - 0.999**3)).sqrt() + eps)


def test_its_eigenvalues_are_those_of_P_inverse_H_and_vectors_come_back():
    n = net("mlp_tanh")
    optimizer = optim.AdamW(n.model.parameters(), lr=1e-2)
    stepped(n, optimizer)
    A = fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer)
    result = fastsharp.lanczos(A, k=3, tol=1e-10)
    D, P = dense_hessian(n.model, n.objective, n.whole), A.diagonal
    want = torch.linalg.eigvals(D / P[:, None]).real.sort(descending=True).values
    assert float((result.eigenvalues - want[:3]).abs().max()) <= 1e-9 * float(want[0])
    W = A.to_parameters(result.eigenvectors)
    assert float((W @ D / P - result.eigenvalues[:, None] * W).norm()) <= 1e-7 * float(want[0] * W.norm())
    assert torch.allclose(A.from_parameters(W), result.eigenvectors, atol=1e-14)
    assert A.to_parameters(result.eigenvectors[0]).shape == (131,)


def test_parameters_are_found_by_themselves_whatever_their_order_and_groups():
    n = net("mlp_tanh")
    weights, biases = ([p for p in n.model.parameters() if p.ndim == d] for d in (2, 1))
    optimizer = optim.Adam([{"params": biases[::-1], "eps": 1e-2}, {"params": weights, "lr": 1e-4, "betas": (0.5, 0.9)}], lr=1e-2)
    stepped(n, optimizer)
    A = fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn, params=["2.*", "0.bias"]), optimizer)
    for part, p in zip(A.layout.views(A.diagonal), (n.model[0].bias, n.model[2].weight, n.model[2].bias), strict=True):
        b1, b2, eps = (0.9, 0.999, 1e-2) if p.ndim == 1 else (0.5, 0.9, 1e-8)
        want = (1 - b1**3) * ((optimizer.state[p]["exp_avg_sq"] / (1 - b2**3)).sqrt() + eps)
        assert torch.allclose(part, want, rtol=1e-13, atol=0.0)
    assert any("learning rates from 0.0001 to 0.01" in note for note in A.notes)


def test_it_follows_the_optimizer():
    n = net("mlp_tanh")
    optimizer = optim.Adam(n.model.parameters(), lr=1e-2)
    stepped(n, optimizer)
    A = fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer)
    A.check_unchanged()
    optimizer.state[n.model[0].weight]["exp_avg_sq"].mul_(4)
    with pytest.raises(StaleOperatorError) as caught:
        fastsharp.lanczos(A, k=1)
    check_message(caught.value, "optimizer has stepped", "refresh()")
    stepped(n, optimizer)
    fresh = fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer)
    assert torch.equal(A.refresh().diagonal, fresh.diagonal)
    v = torch.randn(A.n, dtype=torch.float64)
    assert torch.allclose(A @ v, fresh @ v, rtol=1e-12)


def test_a_given_diagonal_needs_no_model():
    M, d = torch.randn(5, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    A = fastsharp.Preconditioned(DenseOperator(M + M.T), d)
    assert product_error(A, (M + M.T) / torch.outer(d.sqrt(), d.sqrt())) <= 1e-14
    wide = fastsharp.Preconditioned(DenseOperator(torch.eye(2)), torch.tensor([1e-8, 1.0]))
    assert any("P spans a factor of 1e+08" in note for note in wide.notes)


class Own(optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def spoiled(kind: str) -> Any:
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    params = list(n.model.parameters())
    if kind == "copy":
        return fastsharp.Preconditioned(H, optim.Adam(copy.deepcopy(n.model).parameters()))
    if kind == "partly":
        return fastsharp.Preconditioned(H, optim.Adam(params[1:]))
    if kind in ("no step", "maximize"):
        return fastsharp.Preconditioned(H, optim.Adam(params, maximize=kind == "maximize"))
    if kind in ("sgd", "own"):
        return fastsharp.Preconditioned(H, (optim.SGD if kind == "sgd" else Own)(params, lr=0.1))
    if kind == "no eps":
        optimizer = optim.Adam(params, eps=0.0)
        stepped(n, optimizer)
        optimizer.state[params[0]]["exp_avg_sq"][0, 0] = 0.0
        return fastsharp.Preconditioned(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer)
    return fastsharp.Preconditioned(
        H, {"length": torch.ones(3, dtype=torch.float64), "dtype": torch.ones(131)}.get(kind, H.objective.model)
    )


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("copy", ParamError, ("0.weight", "not a copy")),
        ("partly", ParamError, ("0.weight",)),
        ("no step", InputError, ("no state yet", "0.weight", "step")),
        ("maximize", InputError, ("maximize",)),
        ("sgd", InputError, ("SGD", "diagonal of P")),
        ("own", InputError, ("Own",)),
        ("no eps", InputError, ("0.weight", "eps > 0")),
        ("length", ShapeError, ("(3,)", "(131,)")),
        ("dtype", DtypeError, ("float32", "float64")),
        ("model", ArgumentTypeError, ("Sequential", "Optimizer")),
    ],
)
def test_what_has_no_preconditioner_is_refused_by_name(kind, error, words):
    with pytest.raises(error) as caught:
        spoiled(kind)
    check_message(caught.value, *words)


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_weight_decay_is_the_hessian_of_the_penalty(name, dtype):
    n, D, decays = net(name, dtype), exact(name), {"*weight": 0.05, "*bias": 0.002}
    each = {k: decays["*weight" if k.endswith("weight") else "*bias"] for k, _ in n.model.named_parameters()}
    wd = torch.cat([torch.full((p.numel(),), each[k], dtype=torch.float64) for k, p in n.model.named_parameters()])
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    made = fastsharp.with_weight_decay(H, decays)
    assert product_error(made, D + torch.diag(wd)) <= PRODUCT_GATE[dtype]
    groups = [{"params": [p], "weight_decay": each[k]} for k, p in n.model.named_parameters()]
    v = torch.randn(made.n, dtype=dtype)
    for cls in (optim.SGD, optim.Adam):
        assert torch.equal(fastsharp.with_weight_decay(H, cls(groups[::-1], lr=0.1)) @ v, made @ v)
    assert product_error(fastsharp.with_weight_decay(H, 0.05), D + 0.05 * torch.eye(made.n, dtype=torch.float64)) <= PRODUCT_GATE[dtype]


def test_the_gradient_that_sgd_steps_along_has_this_derivative():
    """(g(theta + hv) - g(theta - hv)) / 2h with g read off torch's own step."""
    n = net("mlp_tanh")
    optimizer = optim.SGD(n.model.parameters(), lr=1.0, weight_decay=0.03)
    made = fastsharp.with_weight_decay(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer)
    v = torch.randn(made.n, dtype=torch.float64)
    product = made @ v
    start, h, g = flat(n.model), 1e-5, []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * h * v, n.model.parameters())
        before, after = stepped(n, optimizer, 1)
        g.append(before - after)
    assert float(((g[0] - g[1]) / (2 * h) - product).norm()) <= 1e-8 * float(product.norm())


def test_it_follows_the_groups_and_decoupled_decay_is_taken_only_on_demand():
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    optimizer = optim.SGD(n.model.parameters(), lr=0.1, weight_decay=0.5)
    made = fastsharp.with_weight_decay(H, optimizer)
    assert made.settings["parts"][1] == {"operator": "weight decay", "weight_decay": 0.5}
    optimizer.param_groups[0]["weight_decay"] = 0.25
    with pytest.raises(StaleOperatorError, match="weight_decay changed"):
        made.check_unchanged()
    assert made.refresh().settings["parts"][1]["weight_decay"] == 0.25
    adamw = optim.AdamW(n.model.parameters(), weight_decay=0.5)
    with pytest.raises(InputError) as caught:
        fastsharp.with_weight_decay(H, adamw)
    check_message(caught.value, "AdamW", "outside of the loss", "decoupled=True")
    asked = fastsharp.with_weight_decay(H, adamw, decoupled=True)
    v = torch.randn(H.n, dtype=torch.float64)
    assert torch.allclose(asked @ v, H @ v + 0.5 * v, rtol=1e-13)
    assert any("as if it were a penalty" in note for note in asked.notes)
    nothing = fastsharp.with_weight_decay(H, optim.AdamW(n.model.parameters(), weight_decay=0.0))
    assert torch.equal(nothing @ v, H @ v) and not nothing.parts[1].notes


def test_preconditioned_with_decay_is_what_adam_sees():
    n = net("mlp_tanh")
    optimizer = optim.Adam(n.model.parameters(), lr=1e-2, weight_decay=0.05)
    stepped(n, optimizer)
    A = fastsharp.Preconditioned(fastsharp.with_weight_decay(fastsharp.Hessian(n.model, n.batches, n.loss_fn), optimizer), optimizer)
    D = dense_hessian(n.model, n.objective, n.whole) + 0.05 * torch.eye(131, dtype=torch.float64)
    assert product_error(A, D / torch.outer(A.diagonal.sqrt(), A.diagonal.sqrt())) <= 1e-10
    assert A.settings["operator"] == "preconditioned (hessian + weight decay)"


@pytest.mark.parametrize(
    ("decay", "error", "words"),
    [
        (-0.1, InputError, ("-0.1", ">= 0")),
        (float("inf"), InputError, ("inf",)),
        ("1e-4", ArgumentTypeError, ("str",)),
        (True, ArgumentTypeError, ("bool",)),
        ({"7.*": 0.1}, ParamError, ("7.*", "0.weight")),
        ({"0.*": 0.1, "*.bias": 0.2}, InputError, ("0.bias", "0.1", "0.2")),
        (lambda m: optim.SGD([m[0].weight], lr=0.1, weight_decay=0.1), ParamError, ("0.bias",)),
        (lambda m: optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1, maximize=True), InputError, ("maximize",)),
        (lambda m: Own(m.parameters(), weight_decay=0.1), InputError, ("Own", "not known")),
    ],
)
def test_what_is_no_weight_decay_is_refused_by_name(decay, error, words):
    H = hessian("mlp_tanh")
    with pytest.raises(error) as caught:
        fastsharp.with_weight_decay(H, decay(H.objective.model) if callable(decay) else decay)
    check_message(caught.value, *words)


def test_a_plain_matrix_has_no_parameters_to_decay():
    with pytest.raises(InputError) as caught:
        fastsharp.with_weight_decay(DenseOperator(torch.eye(3)), 0.1)
    check_message(caught.value, "DenseOperator")


def test_two_models_behind_one_sum_have_no_one_optimizer():
    a, b = net("mlp_tanh"), net("mlp_tanh")
    both = fastsharp.Hessian(a.model, a.batches, a.loss_fn) + fastsharp.Hessian(b.model, b.batches, b.loss_fn)
    with pytest.raises(InputError) as caught:
        fastsharp.with_weight_decay(both, optim.SGD(a.model.parameters(), lr=0.1))
    check_message(caught.value, "different models", "0.weight")
    assert exact("mlp_tanh").shape == (both.n, both.n)
