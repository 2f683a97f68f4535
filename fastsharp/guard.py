"""Evaluate a model for second derivatives and leave no trace: every flag, mode, buffer and RNG state is put back.

What is switched inside: gradients on, inference mode and autocast off, attention on the MATH kernel (the fused ones have
no second derivative), TF32 and bf16 matmuls off, cuDNN RNNs off, BatchNorm and Dropout as the caller chose.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastsharp.errors import InputError, ModelModeError

BN_CHOICES = (None, "eval", "frozen-batch-stats")
DROPOUT_CHOICES = (None, "eval", "fixed-masks")


class Modes:
    """What BatchNorm and Dropout do during an evaluation; refuses by module name what has not been chosen.

    bn       None: BatchNorm that would use batch statistics is refused; "eval": it uses its running statistics;
             "frozen-batch-stats": each batch is normalised by its own statistics, held constant (no derivative through them).
    dropout  None: active Dropout is refused; "eval": switched off; "fixed-masks": one mask a batch, the same in every product.
    """

    def __init__(self, model: nn.Module, bn: str | None, dropout: str | None) -> None:
        for name, value, choices in (("bn", bn, BN_CHOICES), ("dropout", dropout, DROPOUT_CHOICES)):
            if value not in choices:
                raise InputError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")
        self.model = model
        self.bn = bn
        self.dropout = dropout
        self._stats: dict[tuple[Any, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.check()

    def check(self) -> None:
        """Raise ModelModeError for each module whose forward pass is not a function of weights and batch alone."""
        by_batch = [name for name, m in self._norms() if self.bn is None or (self.bn == "eval" and m.running_mean is None)]
        if by_batch:
            raise ModelModeError(
                f"BatchNorm uses batch statistics in: {_names(by_batch)}.\n"
                "Its Hessian depends on how the data are batched. Call model.eval(), or choose bn='eval' (running statistics)\n"
                "or bn='frozen-batch-stats' (each batch's statistics, held constant)."
            )
        random_ = [name for name, _ in self._dropouts()] if self.dropout is None else []
        if random_:
            raise ModelModeError(
                f"Dropout is active in: {_names(random_)}.\n"
                "Each product would see another network. Call model.eval(), or choose dropout='eval' or dropout='fixed-masks'."
            )

    def notes(self) -> list[str]:
        """What a result must say about the choice."""
        notes = []
        if self.bn is not None and any(True for _ in self._norms()):
            notes.append(f"BatchNorm: {self.bn}")
        if self.dropout is not None and any(True for _ in self._dropouts()):
            notes.append(f"Dropout: {self.dropout}")
        return notes

    def clear(self) -> None:
        """Forget recorded batch statistics; the weights have changed."""
        self._stats.clear()

    @contextmanager
    def applied(self, key: Any, seed: int) -> Iterator[None]:
        """Modules in the chosen modes for the batch called `key`; statistics of that key are recorded once, then replayed."""
        with ExitStack() as stack:
            if self.bn == "eval":
                self._in_eval(stack, [m for _, m in self._norms()])
            elif self.bn == "frozen-batch-stats":
                for name, m in list(self._norms()):
                    self._freeze(stack, m, (key, name))
            if self.dropout == "eval":
                self._in_eval(stack, [m for _, m in self._dropouts()])
            elif self.dropout == "fixed-masks":
                _seed(self.model, seed)  # the states of the generators are put back by `untouched`
            yield

    def _norms(self) -> Iterator[tuple[str, _BatchNorm]]:
        """BatchNorm modules that would normalise by batch statistics."""
        for name, m in self.model.named_modules():
            if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
                yield name, m

    def _dropouts(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that would draw a mask; attention and recurrent modules carry their dropout as a number."""
        for name, m in self.model.named_modules():
            p = m.p if isinstance(m, _DropoutNd) else getattr(m, "dropout", 0.0)
            alone = isinstance(m, nn.RNNBase) and m.num_layers == 1
            if m.training and isinstance(p, float) and p > 0.0 and isinstance(m, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)) and not alone:
                yield name, m

    @staticmethod
    def _in_eval(stack: ExitStack, modules: list[Any]) -> None:
        for m in modules:
            if m.training:
                stack.callback(setattr, m, "training", True)
                m.training = False

    def _freeze(self, stack: ExitStack, m: _BatchNorm, key: tuple[Any, str]) -> None:
        """Replace m.forward by normalisation with the key's recorded statistics, in the order of its calls."""
        recorded = self._stats.setdefault(key, [])
        recording = not recorded
        calls = iter(list(recorded))

        def forward(x: torch.Tensor) -> torch.Tensor:
            if recording:
                dims = [0, *range(2, x.ndim)]
                mean, var = x.detach().mean(dims), x.detach().var(dims, unbiased=False)
                recorded.append((mean, var))
            else:
                mean, var = next(calls)
            return F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), m.weight, m.bias, training=False, eps=m.eps)

        own = m.__dict__.get("forward")  # an instance attribute only where the user has put one
        m.__dict__["forward"] = forward
        stack.callback(m.__dict__.__setitem__, "forward", own) if own is not None else stack.callback(m.__dict__.pop, "forward", None)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch to twice differentiable evaluation, and put every flag, buffer and RNG state back on the way out."""
    with ExitStack() as stack:
        stack.enter_context(rng_restored(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        _set(stack, torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
        _full_precision(stack, model, device)
        stack.callback(_restore_buffers, [(b, b._version, b.detach().clone()) for b in model.buffers() if b.numel()])
        yield


@contextmanager
def rng_restored(device: torch.device | None = None) -> Iterator[None]:
    """Python, numpy and torch random states are on exit what they were on entry."""
    cuda = device is not None and device.type == "cuda"
    numpy = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda_state = torch.cuda.get_rng_state(device) if cuda else None
    try:
        yield
    finally:
        if random.getstate() != python_state:
            random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None and numpy_state is not None and _differ(numpy.random.get_state(), numpy_state):
            numpy.random.set_state(numpy_state)  # 50 times the cost of a look at it
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


def _differ(present: Any, saved: Any) -> bool:
    return bool(present[2:] != saved[2:] or (present[1] != saved[1]).any())


def _seed(model: nn.Module, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _set(stack: ExitStack, get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> None:
    old = get()
    if old != value:
        stack.callback(put, old)
        put(value)


def _full_precision(stack: ExitStack, model: nn.Module, device: torch.device) -> None:
    """Strict float32 products. Only the per-operator flags are written, and only where they ask for less than float32:
    writing a flag that is already right would make torch's older flag API refuse to be read."""
    backends: list[Any]
    if device.type == "cuda":
        backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # cuDNN's recurrent kernels have no second derivative
            _set(stack, lambda: torch.backends.cudnn.enabled, lambda v: setattr(torch.backends.cudnn, "enabled", v), False)
    else:
        backends = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn]
    for backend in backends:
        if backend.fp32_precision in ("tf32", "bf16"):
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"


def _restore_buffers(saved: list[tuple[torch.Tensor, int, torch.Tensor]]) -> None:
    with torch.no_grad():
        for buffer, version, value in saved:
            if buffer._version != version:
                buffer.copy_(value)


def changed_buffers(model: nn.Module, versions: dict[str, int]) -> list[str]:
    """Names of buffers written since `versions` was taken."""
    return [name for name, b in model.named_buffers() if b._version != versions.get(name)]


def _names(names: list[str], most: int = 6) -> str:
    shown = ", ".join(repr(name) if name else "the model itself" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
