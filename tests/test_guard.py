"""Evaluation leaves no trace: model, gradients, modes, random states and flags are bitwise what they were, however a call ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import ModelModeError, NondeterministicOperatorError
from tests.cases import net
from tests.unchanged import flags, refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = nn.CrossEntropyLoss()


# --- nothing changes ---------------------------------------------------------------------------------------------------


@contextmanager
def unusual_flags() -> Iterator[None]:
    """A caller's settings that are none of the defaults."""
    before = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, "highest")
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        stack.callback(torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled())
        stack.callback(torch.backends.cuda.enable_math_sdp, torch.backends.cuda.math_sdp_enabled())
        torch.set_float32_matmul_precision("medium")
        torch.backends.mha.set_fastpath_enabled(True)
        torch.backends.cuda.enable_flash_sdp(False)
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": ExitStack,
    "unusual flags": unusual_flags,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def odd(name: str) -> tuple[nn.Module, list[Any], Any]:
    """A network of `tests.cases` with gradients of its own and a mixture of train and eval modes."""
    n = net(name, torch.float32)
    for i, p in enumerate(n.model.parameters()):
        p.grad = torch.randn_like(p) if i % 2 else None
    for i, m in enumerate(n.model.modules()):
        if not isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout, nn.MultiheadAttention)):
            m.training = bool(i % 2)
    return n.model, n.batches, n.loss_fn


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("name", ["cnn_batchnorm_eval", "transformer_encoder", "lstm", "tied_language_model"])
def test_success_leaves_no_trace(name, context):
    model, batches, loss_fn = odd(name)
    with context(), unchanged(model, *batches[0] if isinstance(batches[0], tuple) else ()):
        fastsharp.lanczos(model, batches, loss_fn, k=2, tol=1e-2, method="lanczos", preflight="full")


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_failure_leaves_no_trace(context):
    model, batches, loss_fn = odd("cnn_batchnorm_eval")
    calls: list[int] = []
    broken = [0]

    def failing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == broken[0]:
            raise OSError("the loss broke")
        return loss_fn(output, target)

    with context():
        for broken[0] in (1, 2, 4, 5, 9):  # in the first look at the buffers, in the first product, in later ones
            calls.clear()
            with unchanged(model), pytest.raises(OSError, match="the loss broke"):
                fastsharp.lanczos(model, batches, failing, k=2, tol=1e-2, reduction="mean", memory=64, preflight="off")


def test_a_buffer_written_in_the_forward_pass_is_refused_and_restored():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.inner(x) * (1 + self.calls)

    model = Counter()
    with refuses(ModelModeError, "calls", "Counter", "model.eval()", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS)


def test_buffers_that_are_replaced_are_put_back():
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x.sum()
            return self.inner(x)

    model = Replacing()
    with refuses(ModelModeError, "last", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS)


def test_running_statistics_written_without_a_mark_are_noticed_and_restored():
    """torch's batch_norm moves the running statistics without counting it as a write."""

    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(self.inner(x), self.mean, self.var, training=True)

    model = OwnNorm()
    with refuses(ModelModeError, "OwnNorm", "mean, var", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS)


def test_random_states_are_put_back_after_a_loss_that_draws():
    def noisy(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(o * (1 + 0.1 * torch.rand(())), t)

    n = net("mlp_tanh", torch.float32)
    with unchanged(n.model):
        fastsharp.lanczos(n.model, n.batches, LOSS, k=2, seed=3)
    with refuses(NondeterministicOperatorError, "batch 0", "random", model=n.model):
        fastsharp.lanczos(n.model, n.batches, noisy, reduction="mean", k=2)


def test_reduced_precision_is_switched_off_inside():
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = flags()
            seen.append((state["mkldnn"], state["autocast"][0], state["mha"], state["sdp"], state["grad"] or state["inference"]))
            return self.inner(x)

    batches = net("mlp_tanh", torch.float32).batches
    model = Watching()
    with unusual_flags(), torch.autocast("cpu", torch.bfloat16), unchanged(model):
        fastsharp.lanczos(model, batches, LOSS, k=1, backend="autograd")  # the engine lets one fused kernel pass, for which it has a rule
    assert seen
    for mkldnn, autocast, mha, (flash, efficient, math, _), _ in seen:
        assert not {"tf32", "bf16"} & set(mkldnn)
        assert not autocast and not mha and not flash and not efficient and math
