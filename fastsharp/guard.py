"""Evaluate a model for second derivatives and leave no trace: every flag, mode, buffer and RNG state is put back.

What is switched inside: gradients on, inference mode and autocast off, attention on the MATH kernel (the fused ones have
no second derivative), TF32 and bf16 matmuls off, cuDNN RNNs off, BatchNorm and Dropout as the caller chose, activation checkpoints
off: what they recompute in a backward pass would run in the modes of that moment, not in the chosen ones; weight norm written out.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from fastsharp.errors import InputError, ModelModeError, listing

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
BN_CHOICES = (None, "eval", "frozen-batch-stats")
DROPOUT_CHOICES = (None, "eval", "fixed-masks")


class Modes:
    """What BatchNorm and Dropout do during an evaluation; refuses by module name what has not been chosen.

    bn       None: BatchNorm that would use batch statistics is refused; "eval": it uses its running statistics;
             "frozen-batch-stats": each batch is normalised by its own statistics, held constant (no derivative through them).
    dropout  None: active Dropout is refused; "eval": switched off, as a function too; "fixed-masks": one mask a batch, the same in every product.
    """

    def __init__(self, model: nn.Module, bn: str | None, dropout: str | None) -> None:
        for name, value, choices in (("bn", bn, BN_CHOICES), ("dropout", dropout, DROPOUT_CHOICES)):
            if value not in choices:
                raise InputError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")
        self.model = model
        self.bn = bn
        self.dropout = dropout
        self._stats: dict[Any, dict[str, list[tuple[torch.Tensor, torch.Tensor]]]] = {}  # by batch, then module, call by call
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
        if self.bn == "frozen-batch-stats":
            own = [name for name, m in self._norms() if type(m).forward not in _FORWARDS or "forward" in m.__dict__]
            if own:
                raise ModelModeError(
                    f"bn='frozen-batch-stats' cannot replace a forward method of the module's own: {_names(own)}.\n"
                    "Choose bn='eval', or use torch's BatchNorm."
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

    def flags(self) -> dict[str, tuple[int, int]]:
        """{what is said of a module: its mode}, for the modules that do something else in the other mode."""
        kinds = (_BatchNorm, _DropoutNd, nn.MultiheadAttention, nn.RNNBase)
        return {f"the mode of {name or 'the model'}": (m.training, 0) for name, m in self.model.named_modules() if isinstance(m, kinds)}

    def by_batch(self) -> bool:
        """Whether the function evaluated depends on how samples are grouped into batches."""
        frozen = self.bn == "frozen-batch-stats" and any(True for _ in self._norms())
        return frozen or (self.dropout == "fixed-masks" and self.masked())

    def masked(self) -> bool:
        """Whether some module draws a dropout mask."""
        return any(True for _ in self._dropouts())

    def clear(self) -> None:
        """Forget recorded batch statistics; the weights have changed."""
        self._stats.clear()

    @contextmanager
    def applied(self, key: Any, seed: int, *, masks: bool = True) -> Iterator[None]:
        """Modules in the chosen modes for the batch called `key`; statistics of that key are recorded once, then replayed.

        masks   False switches dropout off even where masks were chosen
        """
        with ExitStack() as stack:
            recorded: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            if self.bn == "eval":
                self._in_eval(stack, [m for _, m in self._norms()])
            elif self.bn == "frozen-batch-stats":
                for name, m in list(self._norms()):
                    self._freeze(stack, m, self._stats[key].get(name) if key in self._stats else None, recorded.setdefault(name, []))
            if self.dropout == "eval" or not masks:
                self._in_eval(stack, [m for _, m in self._dropouts()])
                stack.enter_context(_NoDropout())
            elif self.dropout == "fixed-masks":
                _seed(self.model, seed)  # the states of the generators are put back by `untouched`
            yield
            self._stats.setdefault(key, recorded)  # only after a whole pass: an interrupted one leaves no half record

    def _norms(self) -> Iterator[tuple[str, _BatchNorm]]:
        """BatchNorm modules that would normalise by batch statistics."""
        for name, m in self.model.named_modules():
            if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
                yield name, m

    def _dropouts(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that would draw a mask; attention and recurrent modules carry their dropout as a number."""
        for name, m in self.model.named_modules():
            if not m.training or not isinstance(m, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)):
                continue
            alone = isinstance(m, nn.RNNBase) and m.num_layers == 1  # torch applies it between layers only
            if not alone and (m.p if isinstance(m, _DropoutNd) else m.dropout) > 0:
                yield name, m

    @staticmethod
    def _in_eval(stack: ExitStack, modules: list[Any]) -> None:
        for m in modules:
            if m.training:
                stack.callback(setattr, m, "training", True)
                m.training = False

    @staticmethod
    def _freeze(
        stack: ExitStack,
        m: _BatchNorm,
        known: list[tuple[torch.Tensor, torch.Tensor]] | None,
        recorded: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Replace m.forward by normalisation with the known statistics, in the order of its calls; record them where none are known."""
        calls = None if known is None else iter(known)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if calls is None:
                dims = [0, *range(2, x.ndim)]
                mean, var = x.detach().mean(dims), x.detach().var(dims, unbiased=False)
                recorded.append((mean, var))
            else:
                mean, var = next(calls)
            dtype = torch.promote_types(x.dtype, mean.dtype)  # under autocast x is bfloat16 beside float32 weights
            return F.batch_norm(x, mean.to(dtype), var.to(dtype), m.weight, m.bias, training=False, eps=m.eps)

        stack.callback(m.__dict__.pop, "forward", None)
        m.__dict__["forward"] = forward


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


class _NoDropout(TorchFunctionMode):
    """Dropout called as a function, where the caller's own `training` decides: transformers' attention does so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], kwargs | dict(zip(("dropout_p", "is_causal"), args[4:], strict=False)) | {"dropout_p": 0.0}
        return func(*args, **kwargs)


class _WeightNorm(TorchFunctionMode):
    """g v / ||v|| written out. torch's fused kernel keeps ||v|| as a constant of its backward pass: its second derivative is not symmetric."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def untouched(
    model: nn.Module, device: torch.device, *, by_value: bool = False, forward: bool = True, tf32: bool = False
) -> Iterator[None]:
    """Switch to twice differentiable evaluation, and put every flag, buffer and RNG state back on the way out.

    by_value   look for buffers that were written without a mark as well, at the cost of a comparison on the device
    forward    False where the model itself will not run, as with kept graphs: then no copies of its buffers are made
    tf32       multiply and convolve float32 in TF32, on CUDA devices; everywhere else float32 stays float32
    """
    with ExitStack() as stack:
        stack.enter_context(rng_restored(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        _set(stack, torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
        _set_precision(stack, model, device, tf32)
        _without_checkpoints(stack)
        stack.enter_context(_WeightNorm())
        if "torch._dynamo" in sys.modules:  # compiled graphs have no second derivative
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        held = [
            (m._buffers, name, b, version_of(b), b.detach().clone())
            for m in (model.modules() if forward else ())
            for name, b in m._buffers.items()
            if b is not None
        ]
        stack.callback(_restore_buffers, held, by_value)
        yield


@contextmanager
def rng_restored(device: torch.device | None = None) -> Iterator[None]:
    """Python, numpy and torch random states are on exit what they were on entry."""
    cuda = device if device is not None and device.type == "cuda" else None
    numpy = sys.modules.get("numpy")
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda_state = torch.cuda.get_rng_state(cuda) if cuda is not None else None
    try:
        yield
    finally:
        if random.getstate() != python_state:
            random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy is not None and numpy_state is not None and _differ(numpy.random.get_state(), numpy_state):
            numpy.random.set_state(numpy_state)  # 50 times the cost of a look at it
        if cuda is not None and cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, cuda)


def random_states(device: torch.device) -> tuple[bytes, ...]:
    """torch's random states, on the CPU and on this device, as bytes to compare."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return tuple(state.numpy().tobytes() for state in states)


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


def _without_checkpoints(stack: ExitStack) -> None:
    """`torch.utils.checkpoint.checkpoint` calls its function and keeps what it saves, in both of its forms; no public switch does that."""
    module: Any = torch.utils.checkpoint
    for name, plain in _CHECKPOINTS.items():
        if hasattr(module, name):  # the second one is of torch 2.14
            _set(stack, partial(getattr, module, name), partial(setattr, module, name), plain)


def _nothing_dropped(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Called:
    """In place of torch's CheckpointFunction."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


_CHECKPOINTS: dict[str, Any] = {
    "_checkpoint_without_reentrant_generator": _nothing_dropped,
    "_checkpoint_without_reentrant_generator_impl": _nothing_dropped,
    "CheckpointFunction": _Called,
}


def _set_precision(stack: ExitStack, model: nn.Module, device: torch.device, tf32: bool) -> None:
    """Strict float32 products, or TF32 ones. Only the per-operator flags are written, and only where they ask for something else:
    writing a flag that is already right would make torch's older flag API refuse to be read."""
    backends: list[Any]
    torch_backends: Any = torch.backends  # torch's stubs lack the flags of 2.9 and later
    if device.type == "cuda":
        backends = [torch_backends.cuda.matmul, torch_backends.cudnn.conv, torch_backends.cudnn.rnn]
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # cuDNN's recurrent kernels have no second derivative
            _set(stack, lambda: torch.backends.cudnn.enabled, lambda v: setattr(torch.backends.cudnn, "enabled", v), False)
    else:
        backends = [torch_backends.mkldnn.matmul, torch_backends.mkldnn.conv, torch_backends.mkldnn.rnn]
    for backend in backends:
        if (backend.fp32_precision != "tf32") if tf32 else (backend.fp32_precision in ("tf32", "bf16")):
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "tf32" if tf32 else "ieee"


def version_of(t: torch.Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count, and stay at -1."""
    return -1 if t.is_inference() else int(t._version)


def _restore_buffers(saved: list[tuple[dict[str, Any], str, torch.Tensor, int, torch.Tensor]], by_value: bool) -> None:
    with torch.no_grad():
        for holder, name, buffer, version, value in saved:
            if holder.get(name) is not buffer:
                holder[name] = buffer
            if version_of(buffer) != version or (by_value and not same_values(buffer, value)):
                buffer.copy_(value)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are equal, NaN to NaN; torch's batch_norm writes its running statistics without a mark."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def marks(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[int, int]]:
    """{name: (address, version)}: differs once a tensor is replaced or written in place."""
    return {name: (t.data_ptr(), version_of(t)) for name, t in tensors}


class Watch:
    """What `marks` and `Modes.flags` of a model depend on, as one flat list: equal lists mean equal marks, at a tenth of the cost.

    Tensors and modules seen are held, so that their numbers stay their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._held = [*model.parameters(), *model.buffers()]
        self._state = self._present()

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether parameters, buffers and modules are where nn.Module keeps them: scripted modules and own listings are not."""
        own = ("named_parameters", "named_buffers", "named_modules", "_named_members")
        plain = all(getattr(type(m), name) is getattr(nn.Module, name) for m in model.modules() for name in own)
        return plain and not any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())

    def unchanged(self) -> bool:
        """Whether everything is as it was seen."""
        return self._present() == self._state

    def _present(self) -> list[Any]:
        found: list[Any] = []
        for m in self._modules:
            own = m.__dict__
            found.append(m.training)
            found.extend(map(id, own["_modules"].values()))
            for t in (*own["_parameters"].values(), *own["_buffers"].values()):
                found += (None,) if t is None else (id(t), t.data_ptr(), version_of(t))
        return found


def _names(names: list[str]) -> str:
    return listing([repr(name) if name else "the model itself" for name in names])
