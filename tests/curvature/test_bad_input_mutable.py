"""Models that change in the forward pass and hooks that change values, by each backend: right products, or an error that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsharp
from fastsharp.errors import EngineError, InputError, NondeterministicOperatorError, StaleOperatorError
from tests.curvature.explicit import GATE, KINDS, backends, check, error, explicit, kinds, small
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")


# --- models that change -------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Counts its calls in `calls`: a buffer written in place, a buffer replaced, or a number; output x (1 + share * calls)."""

    def __init__(self, how: str, share: float = 0.0) -> None:
        super().__init__()
        self.net, self.how, self.share = small()[0], how, share
        if how == "number":
            self.calls: Any = 0
        else:
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.net(x) * (1.0 + self.share * self.calls)


@kinds
@backends
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_model_that_writes_its_buffers_is_refused_by_name(how, backend, kind):
    with pytest.raises(InputError, match="calls") as caught:
        KINDS[kind](Counts(how), small()[1], backend=backend)
    check_message(caught.value)


@kinds
@backends
def test_a_counter_that_changes_nothing_is_let_be(backend, kind):
    model = Counts("number")
    operator = KINDS[kind](model, small()[1], nn.CrossEntropyLoss(), backend=backend)
    assert error(operator, lambda V: explicit(kind, model, model.parameters(), small()[1], V)) <= GATE


@backends
def test_a_model_that_drifts_from_call_to_call_is_refused(backend):
    with pytest.raises(NondeterministicOperatorError) as caught:
        fastsharp.lanczos(Counts("number", 0.01), small()[1], k=1, backend=backend)
    check_message(caught.value)


class Edits(nn.Module):
    """Writes its own weights in the forward pass: seen by autograd's counters, past them, or as another module."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = small()[0], how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            with torch.no_grad():
                self.net[0].weight.mul_(0.99)
        elif self.how == "through .data":
            self.net[0].weight.data.mul_(0.99)
        else:
            self.net[2] = nn.Linear(4, 3).double()
        return self.net(x)


@pytest.mark.parametrize("preflight", ["fast", "off"])
@backends
@pytest.mark.parametrize("how", ["in place", "through .data", "another module"])
def test_a_model_that_edits_its_weights_is_refused(how, backend, preflight):
    with pytest.raises((StaleOperatorError, NondeterministicOperatorError, EngineError)) as caught:
        fastsharp.lanczos(Edits(how), small()[1], nn.CrossEntropyLoss(), k=1, backend=backend, preflight=preflight)
    check_message(caught.value)


class Remembers(nn.Module):
    """Keeps what it saw, with its graph; `share` of the last output is added to the next one."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.net, self.share, self.seen = small()[0], share, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if self.share and self.seen:
            z = z + self.share * self.seen[-1].mean(0)
        self.seen.append(z)
        return z


@kinds
@backends
def test_a_model_that_keeps_its_activations(backend, kind):
    model = Remembers(0.0)
    operator = KINDS[kind](model, small()[1], nn.CrossEntropyLoss(), backend=backend)
    assert error(operator, lambda V: explicit(kind, model, model.parameters(), small()[1], V)) <= GATE


@backends
def test_a_model_that_adds_its_last_output_is_refused(backend):
    with pytest.raises((NondeterministicOperatorError, EngineError), match=r"differ|before this evaluation") as caught:
        fastsharp.lanczos(Remembers(0.5), small()[1], nn.CrossEntropyLoss(), k=1, backend=backend)
    check_message(caught.value)


# --- hooks --------------------------------------------------------------------------------------------------------------


def _doubles_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output + output.sin()


def _in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2.0)


def _before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].square(),)


@kinds
@backends
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("hook", [_doubles_output, _before], ids=lambda h: h.__name__)
def test_a_hook_that_changes_values_belongs_to_the_model(hook, layer, backend, kind):
    model, batches = small()
    register = model[layer].register_forward_pre_hook if hook is _before else model[layer].register_forward_hook
    register(hook)
    plain = KINDS[kind](small()[0], batches, nn.CrossEntropyLoss())
    assert error(plain, lambda V: explicit(kind, model, model.parameters(), batches, V)) > 1e-3  # the hook matters
    check(kind, backend, model, batches)


@kinds
@backends
def test_a_hook_that_writes_into_the_output(backend, kind):
    model, batches = small()
    model[0].register_forward_hook(_in_place)
    check(kind, backend, model, batches)


@kinds
def test_the_native_kernel_does_not_miss_a_hook(kind):
    model, batches = small()
    model[1].register_forward_hook(_doubles_output)
    with pytest.raises(EngineError, match=r"no part of a chain|is no linear layer") as caught:
        KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend="mlp") @ torch.ones(39, dtype=torch.float64)
    check_message(caught.value)


@kinds
@backends
def test_a_hook_on_gradients_is_autograds(backend, kind):
    """It changes what backward returns, so that the products of torch are those of no function: only autograd can follow it."""
    model, batches = small()
    model[1].register_full_backward_hook(lambda module, into, out: None)
    operator = KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend=backend)
    if backend == "rop":
        with pytest.raises(EngineError, match="hook"):
            operator @ torch.ones(operator.n, dtype=torch.float64)
    else:
        assert error(operator, lambda V: explicit(kind, model, model.parameters(), batches, V)) <= GATE
        assert operator.backend == "autograd"
