"""Rows D1-D7 of the catalogue of bad input: arguments and the solver, each through the one-line call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.errors import ArgumentTypeError, InputError, NotSymmetricError, ShapeError
from tests.cases import Net, net
from tests.curvature.checks import exact, spectrum
from tests.unchanged import refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread", "row")


@pytest.fixture
def n() -> Net:
    return net("mlp_tanh")


def run(n: Net, **options: object) -> fastsharp.Eigenpairs:
    return fastsharp.lanczos(n.model, n.batches, n.loss_fn, **options)


def test_D1_more_pairs_than_parameters(n):
    with refuses(InputError, "k = 132", "n = 131", "k <= 131", model=n.model):
        run(n, k=132)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize("method", ["auto", "lanczos", "dense"])
def test_D2_as_many_pairs_as_parameters(method):
    n = net("hf_style")
    with unchanged(n.model):
        result = fastsharp.lanczos(n.model, n.batches, k=71, method=method, tol=1e-6)
    assert float((result.eigenvalues - spectrum("hf_style")).abs().max() / spectrum("hf_style")[0]) <= 1e-10
    X = result.eigenvectors
    assert float((X @ X.T - torch.eye(71, dtype=torch.float64)).abs().max()) <= 1e-12


@pytest.mark.parametrize("k", [0, -3])
def test_D3_no_pairs(n, k):
    with refuses(InputError, f"k is {k}", "at least 1", model=n.model):
        run(n, k=k)


@pytest.mark.parametrize("k", [2.5, "3", True, None])
def test_D4_k_that_is_not_an_int(n, k):
    with refuses(ArgumentTypeError, "k is", "expected an int", model=n.model):
        run(n, k=k)
    assert issubclass(ArgumentTypeError, TypeError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_D5_long_runs_have_no_ghosts(dtype):
    n = net("mlp_tanh", dtype)
    with unchanged(n.model):
        result = run(n, k=60, max_iter=131, method="lanczos", tol=1e-4)
    assert result.n_matvec > 60
    error = (result.eigenvalues - spectrum("mlp_tanh")[:60]).abs().max() / spectrum("mlp_tanh")[0]
    assert float(error) <= (1e-5 if dtype == torch.float32 else 1e-7)
    X = result.eigenvectors.double()
    assert float((X @ X.T - torch.eye(60, dtype=torch.float64)).abs().max()) <= 10 * 131 * torch.finfo(dtype).eps


def test_D6_invariant_subspace():
    """One linear layer under squared error with two samples: a Hessian of rank 6 in 21 dimensions."""
    model = nn.Linear(6, 3)
    x, y = torch.randn(2, 6), torch.randn(2, 3)
    with unchanged(model):
        result = fastsharp.lanczos(model, [(x, y)], nn.MSELoss(), k=10, method="lanczos")
    design = torch.cat([x, torch.ones(2, 1)], 1).double()
    values = torch.linalg.eigvalsh(design @ design.T / 3).flip(0).repeat_interleave(3)
    want = torch.cat([values, torch.zeros(4)])
    assert float((result.eigenvalues - want).abs().max()) <= 1e-5 * float(want[0])
    assert bool(result.converged.all())
    assert any("restarted with a random vector" in note for note in result.notes)


def test_D7_operator_that_is_not_symmetric():
    A = exact("mlp_tanh").clone()
    A[3, 5] += 1e-3 * A.abs().max()
    with refuses(NotSymmetricError, "not symmetric", "A.T", model=None):
        fastsharp.lanczos(A)
    with refuses(NotSymmetricError, "u'Hv", model=None):
        fastsharp.lanczos((lambda v: A @ v, len(A), torch.float64), k=3)


def test_D7_model_whose_product_is_not_symmetric():
    class Crooked(torch.autograd.Function):
        """x^2 whose backward has a factor that is not the derivative of anything."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad * (1 + x.roll(1, -1))

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(Crooked.apply(torch.tanh(self.first(x))))

    model, n = Bent(), net("mlp_tanh", torch.float32)
    with refuses(NotSymmetricError, "u'Hv", "autograd.Function", "gradgradcheck", model=model):
        fastsharp.lanczos(model, n.batches, n.loss_fn)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"which": "largest"}, ("which", "'largest'", "'LA'")),
        ({"method": "arnoldi"}, ("method", "'arnoldi'")),
        ({"criterion": "both"}, ("criterion", "'both'")),
        ({"tol": 0.0}, ("tol is 0.0",)),
        ({"tol": float("nan")}, ("tol is nan",)),
        ({"max_iter": 3}, ("max_iter = 3", "k = 5")),
        ({"preflight": "quick"}, ("preflight='quick'", "'fast'")),
        ({"bn": "train"}, ("bn='train'", "'frozen-batch-stats'")),
        ({"dropout": "off"}, ("dropout='off'", "'fixed-masks'")),
        ({"memory": "lots"}, ("memory='lots'", "2GiB")),
        ({"memory": -1}, ("memory=-1", "negative")),
        ({"seed": 2**64}, ("seed", "64-bit")),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(n, options, words):
    with refuses(InputError, *words, model=n.model):
        run(n, **options)


def test_start_vector_that_does_not_fit(n):
    with refuses(ShapeError, "(5,)", "(131,)", model=n.model):
        run(n, v0=torch.ones(5, dtype=torch.float64))
    with refuses(InputError, "zero vector", model=n.model):
        run(n, v0=torch.zeros(131, dtype=torch.float64), method="lanczos")


def test_arguments_of_a_model_beside_a_matrix():
    with refuses(InputError, "loader, loss_fn", "torch.nn.Module"):
        fastsharp.lanczos(torch.eye(3), [1], nn.MSELoss())
    with refuses(ArgumentTypeError, "dict"):
        fastsharp.lanczos({})


def test_model_without_data(n):
    with refuses(InputError, "needs data", "DataLoader", model=n.model):
        fastsharp.lanczos(n.model)
    with refuses(ArgumentTypeError, "int", "DataLoader", model=n.model):
        fastsharp.lanczos(n.model, 7)
