"""Products and eigenvalues against a dense Hessian by forward-over-reverse on one big batch: another route through autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

import fastsharp
from fastsharp.errors import (
    DoubleBackwardError,
    EmptyLoaderError,
    LabelError,
    LabelShapeError,
    ModelModeError,
    NonFiniteError,
    NoParametersError,
)

X, Y = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(24) % 3


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    bn = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    bn(torch.randn(50, 6))
    frozen = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    frozen[0].weight.requires_grad_(False)
    return {
        "tanh": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        "relu": nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)),
        "bn_eval": bn.eval(),
        "conv": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)),
        "frozen": frozen,
    }


def dense(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model = copy.deepcopy(model).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    sizes = [params[k].numel() for k in names]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {k: t.view(params[k].shape) for k, t in zip(names, flat.split(sizes), strict=True)}  # type: ignore[no-untyped-call]
        return F.cross_entropy(functional_call(model, params | parts, (x,)), y)

    return hessian(loss)(torch.cat([params[k].reshape(-1) for k in names]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", list(nets()))
def test_products_and_eigenvalues_over_uneven_batches_are_those_of_the_dense_hessian(name: str, dtype: torch.dtype) -> None:
    model, room = nets()[name].to(dtype), 1e-10 if dtype == torch.float64 else 1e-5
    x = X.to(dtype)
    H = dense(model, x.double(), Y)
    batches = [(x[:11], Y[:11]), (x[11:], Y[11:])]
    M = torch.randn(len(H), 3, dtype=torch.float64).to(dtype)
    product = (fastsharp.Hessian(model, batches) @ M).double()
    assert float((product - H @ M.double()).norm() / (H @ M.double()).norm()) <= room
    result = fastsharp.lanczos(model, batches, k=5, method="lanczos", tol=1e-6)
    exact = torch.linalg.eigvalsh(H).flip(0)[:5]
    assert float((result.eigenvalues - exact).abs().max() / exact[0]) <= room
    assert bool(result.converged.all())


def test_mutant_that_forgets_a_batch_is_seen() -> None:
    model = nets()["tanh"].double()
    v = torch.randn(fastsharp.Hessian(model, [(X, Y)]).n, dtype=torch.float64)
    wrong = fastsharp.Hessian(model, [(X[:11], Y[:11])]) @ v
    exact = dense(model, X, Y) @ v
    assert float((wrong - exact).norm() / exact.norm()) > 1e-3


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda m, x, y: (nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), x, y, None), ModelModeError),  # A1
        (lambda m, x, y: (nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1)), x, y, None), ModelModeError),  # A2
        (lambda m, x, y: (m, x.index_fill(0, torch.tensor([3]), float("nan")), y, None), NonFiniteError),  # A12
        (lambda m, x, y: (m, x.index_fill(0, torch.tensor([3]), float("inf")), y, None), NonFiniteError),  # A13
        (lambda m, x, y: (m, x, y + 1, None), LabelError),  # A14
        (lambda m, x, y: (nn.Linear(6, 1), x, y.float(), F.mse_loss), LabelShapeError),  # A15
        (lambda m, x, y: (m.requires_grad_(False), x, y, None), NoParametersError),  # B3
        (lambda m, x, y: (m, x, y, lambda o, t: F.cross_entropy(o, t) + (o * o.detach()).mean()), DoubleBackwardError),  # C2
    ],
    ids=["A1", "A2", "A12", "A13", "A14", "A15", "B3", "C2"],
)
def test_bad_input_ends_as_the_catalogue_says(spoil, error) -> None:
    model, x, y, loss = spoil(nets()["tanh"], X.float(), Y)
    before = [p.detach().clone() for p in model.state_dict().values()]
    rng = torch.get_rng_state()
    with pytest.raises(error) as caught:
        fastsharp.lanczos(model, [(x, y)], loss, k=2)
    assert caught.value.code in str(caught.value) and len(str(caught.value).splitlines()) <= 5
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())


def test_A7_an_empty_loader_is_refused() -> None:
    with pytest.raises(EmptyLoaderError):
        fastsharp.lanczos(nets()["tanh"], [], k=2)
