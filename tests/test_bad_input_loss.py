"""Rows C1-C7 of the catalogue of bad input: losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import (
    ArgumentTypeError,
    BatchFormatError,
    DisconnectedLossError,
    DoubleBackwardError,
    InputError,
    LossShapeError,
    OutputFormatError,
)
from tests.cases import Net, net
from tests.curvature.checks import spectrum
from tests.unchanged import refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread", "row")


@pytest.fixture
def n() -> Net:
    return net("mlp_tanh")


def run(n: Net, loss_fn: Any, **options: Any) -> fastsharp.Eigenpairs:
    return fastsharp.lanczos(n.model, n.batches, loss_fn, **({"method": "lanczos", "tol": 1e-9} | options))


@pytest.mark.parametrize(
    "loss_fn",
    [lambda o, t: F.cross_entropy(o.detach(), t), lambda o, t: o.detach().sum() + torch.zeros((), requires_grad=True)],
    ids=["no graph", "a graph to something else"],
)
def test_C1_loss_without_a_path_to_the_parameters(n, loss_fn):
    with refuses(DisconnectedLossError, "no path", "detach", model=n.model):
        run(n, loss_fn, reduction="mean")


def test_C1_chosen_parameters_without_a_path():
    n = net("unused")
    with refuses(DisconnectedLossError, "spare.weight", "no path", model=n.model):
        run(n, n.loss_fn, params="spare.*", k=2)


@pytest.mark.parametrize("share", [1.0, 0.02], ids=["large", "small"])
def test_C2_detach_in_one_term(n, share):
    def loss(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(o, t) + share * (o.detach() * o).mean()

    with refuses(DoubleBackwardError, "finite difference", ".detach()", "of its norm", model=n.model):
        run(n, loss, reduction="mean")


def test_C3_zero_hessian():
    model = nn.Linear(6, 3).double()
    n = net("mlp_tanh")
    for method in ("lanczos", "dense"):
        with unchanged(model):
            result = fastsharp.lanczos(model, n.batches, lambda o, t: o.mean(), reduction="mean", k=3, method=method)
        assert not bool(result.eigenvalues.any()) and not bool(result.residuals.any())
        assert bool(result.converged.all())
        assert torch.allclose(result.eigenvectors @ result.eigenvectors.T, torch.eye(3, dtype=torch.float64), atol=1e-13, rtol=0)


def test_C4_loss_that_is_not_a_scalar(n):
    with refuses(LossShapeError, "(4,)", ".mean()", model=n.model):
        run(n, lambda o, t: (o - 1).square().sum(1))
    with refuses(LossShapeError, "CrossEntropyLoss", "reduction='none'", model=n.model):
        run(n, nn.CrossEntropyLoss(reduction="none"))
    with refuses(LossShapeError, "float", "scalar tensor", model=n.model):
        run(n, lambda o, t: 3.0)


def test_C5_output_without_a_loss_or_logits(n):
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"scores": self.inner(x), "hidden": x}

    model = Wrapped(n.model)
    with refuses(OutputFormatError, "'scores', 'hidden'", "batch_loss", model=model):
        fastsharp.lanczos(model, n.batches, nn.CrossEntropyLoss())
    with refuses(OutputFormatError, "'scores', 'hidden'", "batch_loss", model=model):
        fastsharp.lanczos(model, n.batches)
    regression = net("regression")
    with refuses(OutputFormatError, "class indices", "loss_fn(output, target)", model=regression.model):
        fastsharp.lanczos(regression.model, regression.batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_C6_scaled_loss(factor, dtype):
    n = net("mlp_tanh", dtype)
    eps = torch.finfo(dtype).eps
    options = {"reduction": "mean", "tol": 1e-9 if dtype == torch.float64 else 1e-5}
    plain = run(n, lambda o, t: F.cross_entropy(o, t), **options)
    with unchanged(n.model):
        scaled = run(n, lambda o, t: factor * F.cross_entropy(o, t), **options)
    room = 10 * eps * float(plain.eigenvalues[0])  # ten roundings of the norm, for each eigenvalue (Weyl)
    assert float((scaled.eigenvalues / factor - plain.eigenvalues).abs().max()) <= room
    assert bool(scaled.converged.all())


def test_C7_negative_spectrum(n):
    result = run(n, lambda o, t: -F.cross_entropy(o, t), reduction="mean", which="SA")
    assert float((result.eigenvalues.flip(0) + spectrum("mlp_tanh")[:5]).abs().max()) <= 1e-10
    traces = [
        fastsharp.trace(n.model, n.batches, lambda o, t, sign=sign: sign * F.cross_entropy(o, t), reduction="mean", rtol=0.1)
        for sign in (1.0, -1.0)
    ]
    assert float(traces[0]) == -float(traces[1]) and traces[0].n_matvec == traces[1].n_matvec
    assert float(spectrum("mlp_tanh").sum()) == pytest.approx(float(traces[0]), rel=0.2)


def test_loss_of_a_wrong_type(n):
    with refuses(ArgumentTypeError, "str", "loss_fn(output, target)", model=n.model):
        run(n, "cross_entropy")
    with refuses(InputError, "reduction='average'", "'mean'", model=n.model):
        run(n, nn.CrossEntropyLoss(), reduction="average")
    with refuses(BatchFormatError, "tensor of shape (4, 6)", "without a target", model=n.model):
        fastsharp.lanczos(n.model, n.batches[0][0], nn.CrossEntropyLoss())


def test_loss_without_second_derivative_at_this_point():
    model = nn.Linear(6, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    n = net("mlp_tanh")
    with refuses(fastsharp.errors.NonFiniteError, "batch 0", "weight", "small constant", model=model):
        fastsharp.lanczos(model, n.batches, lambda o, t: o.square().sum().sqrt(), reduction="mean")
