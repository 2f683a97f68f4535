"""Backends and the choice among them: one frozen record per backend, picked by device and by what is built.

"cuda" and "cpu" are the native modules, "reference" is torch in float64 and always there. A missing native module is not an
error: the reference takes over, and `fastsharp.info()` says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from fastsharp.errors import InputError, KernelError
from fastsharp.ops import _border
from fastsharp.ops.reference import krylov as reference

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class Backend:
    """One implementation of every op, each called as in `fastsharp.ops.krylov` with `out` last, on checked tensors."""

    name: str
    device_types: tuple[str, ...]  # empty: all
    alpha: Callable[[Tensor, Tensor, Tensor], None]
    dots: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    update: Callable[[Tensor, Tensor, Tensor, Tensor], None]

    def takes(self, device: torch.device) -> bool:
        """True when tensors on this device can be handed to it."""
        return not self.device_types or device.type in self.device_types


_forced: ContextVar[Backend | None] = ContextVar("fastsharp_backend", default=None)
_REFERENCE = Backend("reference", (), reference.alpha, reference.dots, reference.update)


@cache
def available() -> dict[str, Backend | str]:
    """Every backend by name; in place of one that is missing, the reason."""
    found: dict[str, Backend | str] = {}
    for name in ("cuda", "cpu"):
        module = native(name)
        found[name] = module if isinstance(module, str) else _native_backend(name, module)
    found["reference"] = _REFERENCE
    return found


@cache
def native(name: str) -> ModuleType | str:
    """The extension module `fastsharp._<name>`, or why it cannot be used."""
    try:
        module = importlib.import_module(f"fastsharp._{name}")
    except ImportError as e:
        return f"fastsharp._{name} is not built, or does not load: {e}"
    if name == "cuda" and not torch.cuda.is_available():
        return "fastsharp._cuda is built, but torch sees no GPU"
    return module


def choose(device: torch.device) -> Backend:
    """The backend for tensors on `device`: the forced one, else the native one, else the reference."""
    forced = _forced.get()
    if forced is not None:
        if not forced.takes(device):
            raise KernelError(f"backend {forced.name!r} is forced, but the tensors are on {device}. Use force('reference') or move them.")
        return forced
    found = available().get(device.type)
    return found if isinstance(found, Backend) else _REFERENCE


@contextmanager
def force(backend: str | Backend) -> Iterator[Backend]:
    """Use one backend for every op inside the block; a name, or a Backend of one's own."""
    if isinstance(backend, str):
        found = available().get(backend)
        if not isinstance(found, Backend):
            listing = "; ".join(f"{k} ({'ready' if isinstance(v, Backend) else v})" for k, v in available().items())
            error = InputError if found is None else KernelError
            raise error(f"backend {backend!r} cannot be used.\nRegistered: {listing}.")
        backend = found
    token = _forced.set(backend)
    try:
        yield backend
    finally:
        _forced.reset(token)


def _native_backend(name: str, module: ModuleType) -> Backend:
    """The ops of a native module: addresses, sizes and a workspace for the partial sums go in, nothing else."""
    where = _cpu_place if name == "cpu" else partial(_cuda_place, module)
    at = _border.address

    def alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
        work, place = _work(module, w, 0), where(w)
        _border.call(getattr(module, "alpha_" + _SUFFIX[w.dtype]), at(v), at(w), w.shape[0], at(out), at(work), *place)

    def dots(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
        (j, n), work, place = V.shape, _work(module, w, V.shape[0]), where(w)
        kernel = getattr(module, "dots_" + _SUFFIX[w.dtype])
        _border.call(kernel, at(V), V.stride(0), at(w), at(ab), j, n, at(out), at(work), *place)

    def update(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
        (j, n), work, place = V.shape, _work(module, w, 0), where(w)
        kernel = getattr(module, "update_" + _SUFFIX[w.dtype])
        _border.call(kernel, at(V), V.stride(0), at(w), at(c), j, n, at(out), at(work), *place)

    return Backend(name, (name,), alpha, dots, update)


def _work(module: ModuleType, w: Tensor, j: int) -> Tensor:
    return torch.empty(module.workspace_size(w.shape[0], j), dtype=torch.float64, device=w.device)


def _cpu_place(w: Tensor) -> tuple[int, ...]:
    return (torch.get_num_threads(),)


def _cuda_place(module: ModuleType, w: Tensor) -> tuple[int, ...]:
    index = w.device.index if w.device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream
