"""What rounding and kinks do is told apart from a fault: networks trained to a loss near zero, float32 inside, thousands of ReLUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import DoubleBackwardError, NonFiniteError
from fastsharp.models import mlp
from fastsharp.preflight import ROUNDING_NOTE, UNDECIDED, preflight

pytestmark = pytest.mark.usefixtures("one_thread")


def classes(n: int, of: int) -> torch.Tensor:
    return torch.arange(n) % of


@pytest.mark.parametrize("backend", ["autograd", "rop", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_network_trained_to_a_loss_near_zero_passes_and_its_rounding_is_told(activation, dtype, backend):
    model = mlp((8, 32, 10), activation).to(dtype)
    data = (torch.randn(40, 8, dtype=dtype), classes(40, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2500):  # autograd in float32 has lost three digits by then
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3
    hessian = fastsharp.Hessian(model, data, backend=backend)
    outcome = preflight(hessian)
    assert outcome["finite_difference"] <= UNDECIDED
    # autograd's 1 - p for p near 1 keeps few digits: its product is off, and the result says by how much; our own rules keep them
    if dtype == torch.float32 and backend == "autograd":
        assert outcome["rounding"] > ROUNDING_NOTE
        exact = fastsharp.Hessian(mlp((8, 32, 10), activation).double(), (data[0].double(), data[1]))
        exact.objective.model.load_state_dict(model.state_dict())
        V = torch.randn(4, hessian.n)
        want = exact.refresh().apply(V.double())
        seen = float((hessian.apply(V).double() - want).norm() / want.norm())
        assert seen / 30 <= outcome["rounding"] <= 30 * seen  # one probe on 32 samples, against four on all
        assert any("rounding changes products by" in note for note in hessian.notes)
    else:
        assert outcome["rounding"] <= ROUNDING_NOTE and not any("rounding" in note for note in hessian.notes)


class Kinked(nn.Module):
    """A residual ReLU network: tens of thousands of kinks."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.leak = leak
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for conv in self.blocks:
            x = F.relu(x + conv(x))
        y = self.head(F.max_pool2d(x, 2).mean((2, 3)))
        return y + self.leak * y * y.detach()


@pytest.mark.parametrize("leak", [1e-1, 1e-3])
def test_kinks_do_not_hide_a_detached_term(leak):
    with pytest.raises(DoubleBackwardError, match="misses the finite difference"):
        preflight(fastsharp.Hessian(Kinked(leak), (torch.randn(32, 3, 12, 12), classes(32, 10))))
    assert preflight(fastsharp.Hessian(Kinked(0.0), (torch.randn(32, 3, 12, 12), classes(32, 10))))["finite_difference"] <= 1e-5


class Upcast(nn.Module):
    """Normalises in float32 whatever comes in, as language models do, and returns float32 logits."""

    def __init__(self, fault: bool) -> None:
        super().__init__()
        self.fault, self.first, self.last = fault, nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        scaled = h.to(torch.float32)
        size = torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.last((scaled * (size.detach() if self.fault else size)).to(h.dtype)).float()


def test_casts_to_float32_are_followed_to_float64():
    data = (torch.randn(32, 8), classes(32, 10))
    assert preflight(fastsharp.Hessian(Upcast(False), data))["finite_difference"] <= 1e-8
    with pytest.raises(DoubleBackwardError):
        preflight(fastsharp.Hessian(Upcast(True), data))


def test_float32_constants_of_a_loss_are_no_fault():
    weights = torch.rand(10)
    hessian = fastsharp.Hessian(
        mlp((8, 6, 10), nn.Tanh),
        (torch.randn(32, 8), classes(32, 10)),
        lambda o, t: F.cross_entropy(o, t, weight=weights),
        reduction="mean",
    )
    assert preflight(hessian)["finite_difference"] <= 1e-8


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_weights_are_part_of_the_check(kind):
    class Faulty(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = kind(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            h = self.rnn(x)[0][:, -1]
            return self.last(h * h.detach())

    with pytest.raises(DoubleBackwardError):
        preflight(fastsharp.Hessian(Faulty(), (torch.randn(8, 5, 3), classes(8, 3)), params="rnn.*"))


def test_a_point_without_a_second_derivative_is_refused():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x * self.w.square().sum().sqrt()

    with pytest.raises(NonFiniteError, match=r"(?s)in (the rows of )?w, though the loss is finite"):
        preflight(fastsharp.Hessian(Norm(), (torch.randn(6, 3), classes(6, 3))))
