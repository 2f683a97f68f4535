"""A wrong rule of the engine is found before a number is returned, and the message names the call and the module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.curvature.rop.rule import RULES, Call, Part
from fastsharp.errors import EngineError
from fastsharp.preflight import preflight

aten = torch.ops.aten
BATCH = (torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))


@pytest.fixture(params=["tangent", "backward"])
def spoiled_sigmoid(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rule of sigmoid with one of its answers off by a thousandth."""
    sound = RULES[aten.sigmoid.default]

    def make(call: Call) -> Part | None:
        part = sound(call)
        assert part is not None
        answer = getattr(part, request.param)

        def spoiled(*args: object) -> object:
            result = answer(*args)
            if request.param == "tangent":
                return [result[0][0] * 1.001], result[1]
            return [None if g is None else g * 1.001 for g in result]

        setattr(part, request.param, spoiled)
        return part

    monkeypatch.setitem(RULES, aten.sigmoid.default, make)
    yield


@pytest.mark.parametrize("operator", ["Hessian", "GGN"])
def test_a_wrong_rule_is_named_with_its_module(operator: str, spoiled_sigmoid: None) -> None:
    A = getattr(fastsharp, operator)(network(), BATCH, nn.CrossEntropyLoss(), backend="rop")
    with pytest.raises(EngineError, match=r"sigmoid.default in 3,\nmost in the rows of"):
        preflight(A)


@pytest.mark.parametrize("operator", ["Hessian", "GGN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sound_rules_pass_far_below_the_gate(operator: str, dtype: torch.dtype) -> None:
    A = getattr(fastsharp, operator)(network().to(dtype), (BATCH[0].to(dtype), BATCH[1]), nn.CrossEntropyLoss(), backend="rop")
    assert 0.0 < preflight(A)["engine"] <= 1e-13


def test_autograd_is_not_compared_with_itself() -> None:
    H = fastsharp.Hessian(network(), BATCH, nn.CrossEntropyLoss(), backend="autograd")
    assert "engine" not in preflight(H)


def test_a_layer_that_torch_cannot_differentiate_twice() -> None:
    """hardsigmoid: the engine has its rule, the finite difference of the gradient finds it right, and the result says what was not compared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Hardsigmoid(), nn.Linear(8, 3))
    result = fastsharp.lanczos(model, BATCH, nn.CrossEntropyLoss(), k=1)
    assert bool(result.converged.all())
    assert result.settings["preflight"]["finite_difference"] <= 1e-8
    assert any("no second derivative" in note for note in result.notes)
    with pytest.raises(fastsharp.errors.DoubleBackwardError):
        fastsharp.lanczos(model, BATCH, nn.CrossEntropyLoss(), k=1, backend="autograd")


class Aligned(nn.Module):
    """A loss whose backward torch cannot differentiate, and for which the engine has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.layer(x).log_softmax(-1)[:, None, :]
        return nn.functional.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([len(x)]), torch.tensor([2]))


@pytest.mark.parametrize("backend", ["auto", "rop", "autograd"])
def test_an_operation_without_second_derivative_or_rule_is_named(backend: str) -> None:
    batch = (torch.randn(6, 4), torch.zeros(6))
    with pytest.raises(fastsharp.errors.DoubleBackwardError, match="ctc_loss"):
        fastsharp.lanczos(Aligned(), [batch], lambda out, target: out, reduction="mean", k=1, backend=backend)
