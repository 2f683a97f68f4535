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
    """One implementation of every op, called as those of `fastsharp.ops.reference.krylov`, on checked tensors."""

    name: str
    device_types: tuple[str, ...]  # empty: all
    alpha: Callable[[Tensor, Tensor, Tensor], None]
    dots: Callable[[Tensor, Tensor, reference.Removed | None, Tensor], None]
    update: Callable[[Tensor, Tensor, Tensor, reference.Row | None, Tensor], None]
    combine: Callable[[Tensor, Tensor, Tensor], None]
    probes: Callable[[str, int, int, Tensor], None]

    def takes(self, device: torch.device) -> bool:
        """True when tensors on this device can be handed to it."""
        return not self.device_types or device.type in self.device_types


_forced: ContextVar[Backend | None] = ContextVar("fastsharp_backend", default=None)
_REFERENCE = Backend("reference", (), reference.alpha, reference.dots, reference.update, reference.combine, reference.probes)


@cache
def available() -> dict[str, Backend | str]:
    """Every backend by name; in place of one that is missing, the reason."""
    from fastsharp.ops import triton  # which takes Backend from here

    found: dict[str, Backend | str] = {}
    for name in ("cuda", "cpu"):
        module = native(name)
        found[name] = module if isinstance(module, str) else _native_backend(name, module)
    found["reference"] = _REFERENCE
    found["triton"] = triton.backend()
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
        for e in range(v.shape[0]):
            work, place = _work(module, w, 0), where(w)
            _border.call(getattr(module, "alpha_" + _SUFFIX[w.dtype]), at(v[e]), at(w[e]), w.shape[1], at(out[e]), at(work), *place)

    def dots(V: Tensor, w: Tensor, removed: reference.Removed | None, out: Tensor) -> None:
        if w.shape[1] > 1 or V.dtype != w.dtype or (removed is not None and at(removed[1]) != at(V[:, -1])):
            return reference.dots(V, w, removed, out)
        (E, j, n), kernel, none = V.shape, getattr(module, "dots_" + _SUFFIX[w.dtype]), torch.zeros(2, dtype=torch.float64, device=w.device)
        for e in range(E):
            work, place, ab = _work(module, w, j), where(w), none if removed is None else removed[0][e]
            _border.call(kernel, at(V[e]), V.stride(1), at(w[e]), at(ab), j, n, at(out[e]), at(work), *place)
        return None

    def update(V: Tensor, w: Tensor, c: Tensor, row: reference.Row | None, out: Tensor) -> None:
        if w.shape[1] > 1 or V.dtype != w.dtype or row is not None:
            return reference.update(V, w, c, row, out)
        (E, j, n), kernel = V.shape, getattr(module, "update_" + _SUFFIX[w.dtype])
        for e in range(E):
            work, place = _work(module, w, 0), where(w)
            _border.call(kernel, at(V[e]), V.stride(1), at(w[e]), at(c[e]), j, n, at(out[e]), at(work), *place)
        return None

    return Backend(name, (name,), alpha, dots, update, reference.combine, reference.probes)


def _work(module: ModuleType, w: Tensor, j: int) -> Tensor:
    return torch.empty(module.workspace_size(w.shape[-1], j), dtype=torch.float64, device=w.device)


def _cpu_place(w: Tensor) -> tuple[int, ...]:
    return (torch.get_num_threads(),)


def _cuda_place(module: ModuleType, w: Tensor) -> tuple[int, ...]:
    index = w.device.index if w.device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream
