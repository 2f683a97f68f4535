"""Backends and the choice among them: one frozen record per backend, picked by device and by what is built.

"cuda" and "cpu" are the native modules, "reference" is torch in float64 and always there. A native module that is missing, or was
built for another version of the source, is not an error: the reference takes over, and `fastsharp.info()` says why.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsharp.errors import InputError, KernelError
from fastsharp.ops import _border
from fastsharp.ops._mlp_native import native_mlp
from fastsharp.ops.reference import dual as dual_reference
from fastsharp.ops.reference import krylov as reference
from fastsharp.ops.reference import mlp as reference_mlp

if TYPE_CHECKING:
    from fastsharp.ops.mlp import Primal, Product

# of `dual_linear`: out, (A, B), (C, D), b, alpha
Paired = Callable[[Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor], int, float], Tensor]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
_KINDS = {"rademacher": 0, "normal": 1}


@dataclass(frozen=True)
class Dual:
    """The dual ops of one implementation, called as those of `fastsharp.ops.reference.dual`."""

    activation_prepare: Callable[[str, dual_reference.Parameters, Tensor, Tensor | None, Tensor, Tensor | None], None]
    activation_tangent: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
    activation_adjoint: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None], None]
    norm_prepare: Callable[[Tensor, float, bool, Tensor], None]
    norm_tangent: Callable[[dual_reference.Norm, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor], None]
    norm_adjoint: Callable[
        [dual_reference.Norm, Tensor | None, dual_reference.Second | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None], None
    ]
    softmax_gradient: Callable[[Tensor, Tensor | None, Tensor | None, float, Tensor | None, Tensor | None], None]
    softmax_product: Callable[[Tensor, Tensor | None, Tensor, Tensor], None]


@dataclass(frozen=True)
class Backend:
    """One implementation of every op, called as those of `fastsharp.ops.reference`, on checked tensors."""

    name: str
    device_types: tuple[str, ...]  # empty: all
    alpha: Callable[[Tensor, Tensor, Tensor], None]
    dots: Callable[[Tensor, Tensor, reference.Removed | None, Tensor], None]
    update: Callable[[Tensor, Tensor, Tensor, reference.Row | None, Tensor], None]
    combine: Callable[[Tensor, Tensor, Tensor], None]
    probes: Callable[[str, int, int, Tensor], None]
    dual: Dual
    mlp: Callable[[Primal], tuple[Product, int]] = reference_mlp.mlp
    paired: Paired | None = None  # None: torch's own products

    def takes(self, device: torch.device) -> bool:
        """True when tensors on this device can be handed to it."""
        return not self.device_types or device.type in self.device_types


_forced: ContextVar[Backend | None] = ContextVar("fastsharp_backend", default=None)
_REFERENCE = Backend(
    "reference", (), reference.alpha, reference.dots, reference.update, reference.combine, reference.probes,
    Dual(**{op: getattr(dual_reference, op) for op in Dual.__dataclass_fields__}),
)  # fmt: skip


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
    if getattr(module, "stub", int)() != _stub(name):
        return (
            f"fastsharp._{name} ({module.__file__}) was built for another version of this source, its interface is not that of _{name}.pyi. "
            "Build it anew: pip install -v . (or python setup.py build_ext --inplace)"
        )
    if name == "cuda" and not torch.cuda.is_available():
        return "fastsharp._cuda is built, but torch sees no GPU"
    return module


def _stub(name: str) -> int:
    """What setup.py writes into a module: the checksum of the stub for which it was built."""
    return zlib.crc32((Path(__file__).parents[1] / f"_{name}.pyi").read_text(encoding="utf-8").encode())


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
    """The ops of a native module: addresses, sizes and strides go in, and a workspace for the partial sums."""
    from fastsharp.ops import _native_dual  # which takes Dual from here

    place = _cpu_place if name == "cpu" else _cuda_place
    at, call = _border.address, _border.call
    kernels = {op: {d: getattr(module, f"{op}_{suffix}") for d, suffix in _SUFFIX.items()} for op in ("dots", "update", "combine")}
    kernels |= {op: {d: getattr(module, f"{op}_{_SUFFIX[d]}") for d in _border.VECTOR_DTYPES} for op in ("alpha", "probes")}

    def work(E: int, b: int, n: int, j: int, device: torch.device) -> Tensor:
        return torch.empty(module.workspace_size(E, b, n, j), dtype=torch.float64, device=device)

    def alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
        (E, n), partial = w.shape, work(w.shape[0], 1, w.shape[1], 0, w.device)
        strides = (v.stride(0), w.stride(0), out.stride(0))
        call(kernels["alpha"][w.dtype], E, n, at(v), strides[0], at(w), strides[1], at(out), strides[2], at(partial), *place(w.device))

    def dots(V: Tensor, w: Tensor, removed: reference.Removed | None, out: Tensor) -> None:
        ab, last, before = (None, None, None) if removed is None else removed
        (E, b, n), j = w.shape, V.shape[1]
        partial = work(E, b, n, j, w.device)
        terms = (*_rows(ab, 1), *_rows(last, 1), *_rows(before, 1))
        vectors = (*_rows(V, 2), *_rows(w, 2))
        call(kernels["dots"][V.dtype], E, b, j, n, *vectors, *terms, *_rows(out, 2), at(partial), *place(w.device))

    def update(V: Tensor, w: Tensor, c: Tensor, row: reference.Row | None, out: Tensor) -> None:
        target, factor = (None, None) if row is None else row
        (E, b, n), j = w.shape, V.shape[1]
        partial = work(E, b, n, 0, w.device)
        vectors = (*_rows(V, 2), *_rows(w, 2))
        terms = (*_rows(c, 2), *_rows(target, 1), *_rows(factor, 1))
        call(kernels["update"][V.dtype], E, b, j, n, *vectors, *terms, *_rows(out, 2), at(partial), *place(w.device))

    def combine(S: Tensor, V: Tensor, out: Tensor) -> None:
        (k, j), n = S.shape, V.shape[1]
        call(kernels["combine"][V.dtype], *_rows(S, 1), k, *_rows(V, 1), j, n, *_rows(out, 1), *place(V.device))

    def probes(kind: str, seed: int, first: int, out: Tensor) -> None:
        b, n = out.shape
        call(kernels["probes"][out.dtype], _KINDS[kind], seed & 2**64 - 1, first, *_rows(out, 1), b, n, *place(out.device))

    def mlp(primal: Primal) -> tuple[Product, int]:
        return native_mlp(module, place, primal)

    return Backend(name, (name,), alpha, dots, update, combine, probes, _native_dual.ops(module, place), mlp)


def _rows(t: Tensor | None, strides: int) -> tuple[int, ...]:
    """The address of t and its first strides; zeros for what is not there."""
    return (0,) * (1 + strides) if t is None else (_border.address(t), *t.stride()[:strides])


def _cpu_place(device: torch.device) -> tuple[int, ...]:
    return (torch.get_num_threads(),)


def _cuda_place(device: torch.device) -> tuple[int, ...]:
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream
