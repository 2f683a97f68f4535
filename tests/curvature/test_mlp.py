"""backend="mlp": the same products as autograd's on every net it takes, and a reason for every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.curvature import GGN, Hessian
from fastsharp.errors import EngineError

G = torch.Generator().manual_seed(0)
X = torch.randn(23, 4, generator=G, dtype=torch.float64)
LABELS = torch.randint(0, 3, (23,), generator=G)
VALUES = torch.randn(23, 3, generator=G, dtype=torch.float64)


def sequential(phi: Callable[[], nn.Module], bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(4, 9, bias=bias), phi(), nn.Dropout(0.5), nn.Sequential(nn.Linear(9, 7), phi()), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double().eval()


class Plain(nn.Module):
    """A net with its own forward; `wrong` names what it does beside the layers."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.out, self.inner, self.square = nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(6, 6)
        self.wrong = wrong
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2  # of the data alone
        h = F.relu(self.inner(x))
        if self.wrong == "skip":
            return self.out(h + torch.tanh(self.square(h)))
        if self.wrong == "mixed":
            return self.out(torch.tanh(self.square(h)))
        if self.wrong == "twice":
            return self.out(F.relu(self.square(F.relu(self.square(h)))))
        if self.wrong == "sigmoid":
            return self.out(torch.sigmoid(self.square(h)))
        if self.wrong == "scaled":
            return self.out(F.relu(self.square(h))) * 2
        return self.out(F.relu(self.square(h)))


def products(kind: Any, backend: str, model: nn.Module, loss: Any, target: torch.Tensor, **options: Any) -> torch.Tensor:
    data = [(X[:14], target[:14]), (X[14:], target[14:])]
    operator = kind(model, data, loss, backend=backend, **options)
    V = torch.randn(3, operator.n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    result: torch.Tensor = operator.apply(V)
    assert operator.backend == backend
    return result


CASES: dict[str, tuple[Callable[[], nn.Module], Any, torch.Tensor]] = {
    "relu": (lambda: sequential(nn.ReLU), None, LABELS),
    "tanh, no bias": (lambda: sequential(nn.Tanh, bias=False), nn.MSELoss(), VALUES),
    "gelu, sum": (lambda: sequential(nn.GELU), nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "gelu by tanh": (lambda: sequential(lambda: nn.GELU(approximate="tanh")), nn.MSELoss(reduction="sum"), VALUES),
    "in place": (lambda: sequential(lambda: nn.ReLU(inplace=True)), F.cross_entropy, LABELS),
    "class weights": (
        lambda: sequential(nn.ReLU),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64), ignore_index=2),
        LABELS,
    ),
    "own forward": (Plain, F.mse_loss, VALUES),
}


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_autograd(name: str, kind: Any) -> None:
    make, loss, target = CASES[name]
    torch.testing.assert_close(
        products(kind, "mlp", make(), loss, target), products(kind, "autograd", make(), loss, target), rtol=1e-11, atol=1e-13
    )


def hooked() -> nn.Module:
    model = sequential(nn.ReLU)
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def frozen() -> nn.Module:
    model = sequential(nn.ReLU)
    model[1].weight.requires_grad_(False)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, torch.Tensor, str]] = {
    "skip connection": (lambda: Plain("skip"), None, LABELS, "no part of a chain|does not follow|is no linear layer"),
    "two kinds": (lambda: Plain("mixed"), None, LABELS, "the activations differ between layers: relu, tanh, identity"),
    "tied": (lambda: Plain("twice"), None, LABELS, "weights are shared"),
    "unknown activation": (lambda: Plain("sigmoid"), None, LABELS, "sigmoid is no linear layer"),
    "scaled output": (lambda: Plain("scaled"), None, LABELS, "mul is no linear layer"),
    "hook": (hooked, None, LABELS, "mul is no linear layer"),
    "frozen": (frozen, None, LABELS, "frozen"),
    "smoothing": (lambda: sequential(nn.ReLU), nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, "label smoothing"),
    "own loss": (lambda: sequential(nn.ReLU), lambda z, y: ((z - y) ** 2).mean(), VALUES, "is no linear layer"),
    "scaled loss": (lambda: sequential(nn.ReLU), lambda z, y: 3 * F.mse_loss(z, y), VALUES, "the loss goes through"),
    "one layer of many": (
        lambda: nn.Sequential(nn.Conv1d(4, 3, 1), nn.Flatten()).double(),
        nn.MSELoss(),
        VALUES,
        "conv1d is no part of a chain",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_with_the_reason(name: str) -> None:
    make, loss, target, reason = REFUSED[name]
    x = X[:, :, None] if "layer" in name else X
    operator = Hessian(make(), [(x, target)], loss, backend="mlp", reduction="mean")
    with pytest.raises(EngineError, match=f"backend='mlp' cannot compute this model's products: .*({reason})"):
        operator.apply(torch.ones(1, operator.n, dtype=torch.float64))


def test_eigenvalues_are_those_of_autograd() -> None:
    results = [
        fastsharp.lanczos(sequential(nn.GELU).float(), [(X.float(), LABELS)], k=2, tol=1e-5, criterion="value", backend=b, progress=False)
        for b in ("mlp", "autograd")
    ]
    torch.testing.assert_close(results[0].eigenvalues, results[1].eigenvalues, rtol=1e-5, atol=0.0)
    assert results[0].settings["backend"] == "mlp"
