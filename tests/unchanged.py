"""`unchanged(model, ...)`: nothing of the caller's may differ by a bit after the block, however it ends."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import sympy  # noqa: F401  (torch imports it on first use, and it adds a warnings filter of its own)
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def unchanged(model: nn.Module | None, *data: torch.Tensor) -> Iterator[None]:
    """Model, gradients, modes, hooks, random states, backend flags and `data` are bitwise on exit what they were on entry."""
    before = snapshot(model, data)
    try:
        yield
    finally:
        after = snapshot(model, data)
        assert before.keys() == after.keys(), f"gone or new: {sorted(before.keys() ^ after.keys())}"
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"changed: {changed}, e.g. {before[changed[0]]!r:.300} -> {after[changed[0]]!r:.300}"


def snapshot(model: nn.Module | None, data: tuple[torch.Tensor, ...] = ()) -> dict[str, Any]:
    """Everything that must stay, as comparable values by name."""
    state = flags() | generators()
    for i, t in enumerate(data):
        state[f"data {i}"] = _tensor(t)
    for prefix, m in model.named_modules() if model is not None else ():
        state[f"{prefix} training"] = m.training
        state[f"{prefix} attributes"] = sorted(m.__dict__)
        state[f"{prefix} hooks"] = [len(getattr(m, hooks)) for hooks in _HOOKS]
        for name, p in m._parameters.items():
            grad = None if p is None or p.is_meta or p.grad is None else _tensor(p.grad)
            state[f"{prefix}.{name}"] = None if p is None else (_tensor(p), p.requires_grad, grad)
        for name, b in m._buffers.items():
            state[f"{prefix}.{name}"] = None if b is None else _tensor(b)
        if isinstance(m, nn.RNNBase):
            state[f"{prefix} flat"] = [id(w) for w in m._flat_weights]
    return state


def _tensor(t: torch.Tensor) -> tuple[int, Any, bytes]:
    values = (
        b"" if t.is_meta or isinstance(t, FakeTensor) else t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    )
    return id(t), t.dtype, values


def generators() -> dict[str, Any]:
    """The states of the three global random generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "rng torch": torch.get_rng_state().numpy().tobytes(),
        "rng numpy": (name, keys.tobytes(), *rest),
        "rng python": random.getstate(),
    }


def flags() -> dict[str, Any]:
    """The global switches of torch that a measurement might touch."""
    backends: Any = torch.backends
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "default dtype": torch.get_default_dtype(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "threads": torch.get_num_threads(),
        "mha": backends.mha.get_fastpath_enabled(),
        "sdp": [getattr(backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")],
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "mkldnn": [getattr(backends.mkldnn, part).fp32_precision for part in ("matmul", "conv", "rnn")],
        "cuda": [part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)],
        "matmul precision": _readable(torch.get_float32_matmul_precision),
        "warnings": list(warnings.filters),
    }


def _readable(read: Any) -> str:
    """torch refuses to read its older flags once the newer ones disagree; that refusal is a state like any other."""
    try:
        return str(read())
    except RuntimeError:
        return "refused"


@contextmanager
def refuses(error: type[BaseException], *words: str, model: nn.Module | None = None, data: tuple[torch.Tensor, ...] = ()) -> Iterator[None]:
    """The block raises `error` with a message as promised: it holds `words`, its code, at most five lines, and nothing changed (P14, P15)."""
    with unchanged(model, *data):
        try:
            yield
        except error as e:
            check_message(e, *words)
            return
    raise AssertionError(f"{error.__name__} was not raised")


def check_message(e: BaseException, *words: str) -> None:
    """At most five lines, the class's code at the end, every one of `words`, and a sentence that tells what to do."""
    text = str(e)
    assert len(text.splitlines()) <= 5, text
    assert text.endswith(f"[{type(e).code}]"), text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    advice = text.removesuffix(f"[{type(e).code}]").rstrip()
    assert advice.endswith((".", ")", '"')) and len(advice) > 40, text
