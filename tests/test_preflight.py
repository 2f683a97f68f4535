"""The preflight raises no alarm on a healthy network and lets no broken one through."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import fastsharp
from fastsharp.difference import DIFFERENCE_GATE
from fastsharp.errors import (
    DoubleBackwardError,
    InputError,
    NondeterministicOperatorError,
    NotSymmetricError,
    OperatorError,
    UnusedParamWarning,
)
from fastsharp.models import resnet20
from fastsharp.preflight import SYMMETRY_GATE, preflight
from tests.cases import NAMES, cut, net
from tests.unchanged import check_message, refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = nn.CrossEntropyLoss()


# --- no false alarm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_healthy_networks_pass(name, dtype):  # P1-P3, P20
    for seed in range(3):
        n = net(name, dtype, seed)
        with unchanged(n.model), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UnusedParamWarning)
            outcome = preflight(fastsharp.Hessian(n.model, n.batches, n.loss_fn), "full" if seed == 0 else "fast", seed=seed)
        assert outcome["repeat"] == 0.0
        assert outcome["symmetry"] <= SYMMETRY_GATE * torch.finfo(dtype).eps
        assert outcome["finite_difference"] <= DIFFERENCE_GATE


@pytest.mark.slow
def test_a_residual_network_on_images_passes_in_spite_of_its_kinks():
    model = resnet20().eval()
    data = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    with unchanged(model):
        outcome = preflight(fastsharp.Hessian(model, [data], LOSS))
    assert outcome["finite_difference"] <= DIFFERENCE_GATE


def test_zero_pixels_under_zero_biases_are_no_alarm():
    """Every unit sits on its kink exactly at these weights."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].bias)
    x = torch.randn(SAMPLES := 11, 6) * (torch.arange(SAMPLES) % 2)[:, None]
    with unchanged(model):
        outcome = preflight(fastsharp.Hessian(model, [(x, torch.arange(SAMPLES) % 3)], LOSS), "full")
    assert outcome["finite_difference"] <= DIFFERENCE_GATE


def test_a_linear_loss_has_nothing_to_compare_and_passes():
    model = nn.Linear(6, 3)
    outcome = preflight(fastsharp.Hessian(model, [(torch.randn(5, 6), torch.zeros(5))], lambda o, t: o.mean(), reduction="mean"))
    assert outcome["finite_difference"] <= DIFFERENCE_GATE and outcome["symmetry"] == 0.0


@pytest.mark.parametrize(
    "cast", [lambda x: x.float(), lambda x: x.to(torch.float32), lambda x: x.type(torch.float32)], ids=["float", "to", "type"]
)
def test_a_cast_written_into_the_model_is_followed_or_said(cast):
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(cast(self.first(x))))

    model = Casting()
    with unchanged(model):
        result = fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)
    found = result.settings["preflight"]["finite_difference"]
    assert found <= DIFFERENCE_GATE if isinstance(found, float) else found.startswith("not run")
    assert isinstance(found, float) or any(found in note for note in result.notes)


def test_float64_that_fails_is_no_fault_and_is_said():
    class Insisting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                raise TypeError("only float32, please")
            return self.inner(x)

    model = Insisting()
    with unchanged(model):
        result = fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)
    assert "only float32, please" in result.settings["preflight"]["finite_difference"]
    assert any("finite-difference check not run" in note for note in result.notes)


# --- no broken network through -----------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0].cos() * grad


class Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return ctx.x.cos() * grad


class Skewed(torch.autograd.Function):
    """Its backward multiplies by a matrix that is not the transposed of any derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x.cos() * grad + 0.1 * (x * grad).roll(1, -1)


class NearlyRight(torch.autograd.Function):
    """Right to one part in a thousand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (x.cos() + 1e-3 * x.detach()) * grad


class Broken(nn.Module):
    """tanh layers with `between` in the middle."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.between = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.middle(torch.tanh(self.first(x)))))


def detached_factor(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x.detach())


def small_detached_factor(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) + 0.02 * x * x.detach()


def noisy(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x + 1e-4 * torch.randn_like(x))


FAULTS: dict[str, tuple[Any, type[OperatorError], str]] = {
    "detached factor": (detached_factor, DoubleBackwardError, "finite difference"),
    "small detached factor": (small_detached_factor, DoubleBackwardError, "finite difference"),
    "constant backward": (Constant.apply, DoubleBackwardError, "finite difference"),
    "backward off by a thousandth": (NearlyRight.apply, DoubleBackwardError, "finite difference"),
    "once_differentiable": (Once.apply, DoubleBackwardError, "Once"),
    "dropout as a function": (lambda x: F.dropout(torch.tanh(x), 0.01), NondeterministicOperatorError, "random"),
    "noise": (noisy, NondeterministicOperatorError, "random"),
    "not symmetric": (Skewed.apply, NotSymmetricError, "gradgradcheck"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_broken_networks_are_refused(name, dtype):
    between, error, word = FAULTS[name]
    for seed in range(3):
        n = net("mlp_tanh", dtype, seed)
        torch.manual_seed(seed)
        model = Broken(between).to(dtype)
        with refuses(error, word, model=model):
            fastsharp.lanczos(model, n.batches, LOSS, k=1, seed=seed)


def test_once_differentiable_is_found_even_beside_other_custom_functions():
    class Fine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    model = Broken(lambda x: Once.apply(Fine.apply(x)))
    with pytest.raises(DoubleBackwardError) as caught:
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)
    check_message(caught.value, "Once has no second derivative")
    assert "Fine" not in str(caught.value)


def test_a_fault_in_a_kinked_network_is_found():
    model = resnet20().eval()
    data = torch.randn(8, 3, 32, 32), torch.arange(8) % 10

    def loss(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(o, t) + 0.05 * (o * o.detach()).mean()

    with refuses(DoubleBackwardError, "finite difference", model=model):
        fastsharp.lanczos(model, [data], loss, reduction="mean", k=1)


def test_a_fault_on_one_shape_of_batch_alone_is_found_by_full():
    """Sequences beyond a length take another path, as in attention by chunks."""

    def between(x: torch.Tensor) -> torch.Tensor:
        return detached_factor(x) if x.shape[1] > 4 else torch.tanh(x)

    model = Broken(between)
    data = [(torch.randn(5, length, 6), torch.randn(5, length, 3)) for length in (3, 6)]
    fastsharp.lanczos(model, data[:1], nn.MSELoss(), k=1, preflight="full")
    with refuses(DoubleBackwardError, "finite difference", model=model):
        fastsharp.lanczos(model, data, nn.MSELoss(), k=1, preflight="full")


def test_random_numbers_without_effect_are_no_alarm():
    model, n = Broken(lambda x: torch.tanh(x) + 0.0 * torch.rand(())), net("mlp_tanh", torch.float32)
    with unchanged(model):
        fastsharp.lanczos(model, n.batches, LOSS, k=1, tol=1e-2)


# --- levels and record -------------------------------------------------------------------------------------------------


def test_off_checks_nothing_and_says_so():
    model, n = Broken(detached_factor), net("mlp_tanh", torch.float32)
    result = fastsharp.lanczos(model, n.batches, LOSS, k=1, preflight="off", method="dense")
    assert result.settings["preflight"]["level"] == "off" and "symmetry" not in result.settings["preflight"]
    assert "unchecked: preflight='off'" in result.notes


def test_what_was_measured_is_kept_with_the_result():
    n = net("mlp_tanh")
    result = fastsharp.lanczos(n.model, n.batches, LOSS, k=1)
    kept = result.settings["preflight"]
    assert kept["level"] == "fast" and kept["data"] == "read once" and kept["repeat"] == 0.0
    assert {"symmetry", "finite_difference"} <= set(kept)


def test_an_operator_is_checked_on_its_first_use_only():
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, LOSS)
    assert H.preflight == {"level": "off"}
    fastsharp.lanczos(H, k=1)
    first = H.preflight
    assert first["level"] == "fast"
    fastsharp.lanczos(H, k=1)
    assert H.preflight is first
    assert H.refresh().preflight["level"] in ("off", "fast")


def test_a_level_that_is_none():
    with pytest.raises(InputError) as caught:
        preflight(fastsharp.Hessian(net("mlp_tanh").model, net("mlp_tanh").batches, LOSS), "half")
    check_message(caught.value, "'half'", "'full'")


def test_a_batch_that_cannot_be_cut_is_used_whole():
    """Graph data: the adjacency matrix has no batch dimension to cut along."""
    n = net("mlp_tanh")
    A = torch.softmax(torch.randn(11, 11, dtype=torch.float64), 1)
    loss = fastsharp.batch_loss(lambda model, batch: F.cross_entropy(batch["A"] @ model(batch["x"]), batch["y"]))
    batch = {"A": A, "x": n.whole[0], "y": n.whole[1]}
    with unchanged(n.model):
        result = fastsharp.lanczos(n.model, batch, loss, reduction="mean", k=1)
    assert result.settings["preflight"]["finite_difference"] <= DIFFERENCE_GATE
    assert len(cut(n.whole)) == 3
