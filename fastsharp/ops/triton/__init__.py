"""The Triton twins of the native kernels, used under `force("triton")` alone. Triton is imported by the first op that runs here.

On a GPU the kernels are compiled; with TRITON_INTERPRET=1 in the environment before triton is first imported they run in its
interpreter, on CPU tensors too: slow, and meant for tests.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastsharp.ops._registry import Backend, Dual
from fastsharp.ops.reference.krylov import Removed, Row


def _dual(op: str) -> Callable[..., None]:
    def run(*args: object) -> None:
        from fastsharp.ops.triton import dual

        getattr(dual, op)(*args)

    return run


_DUAL = Dual(**{op: _dual(op) for op in Dual.__dataclass_fields__})


def _paired(out: Tensor | None, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], b: int, alpha: float) -> Tensor:
    from fastsharp.ops.triton import dual

    return dual.paired(out, first, second, b, alpha)


def backend() -> Backend | str:
    """The backend, or why it cannot be used; looks for triton without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = _interpreted()
    if interpreted:
        return Backend("triton", ("cuda", "cpu"), _alpha, _dots, _update, _combine, _probes, _DUAL, paired=_paired)
    if not torch.cuda.is_available():
        late = "triton was imported before TRITON_INTERPRET=1 was set, and " if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"{late}torch sees no GPU (TRITON_INTERPRET=1 in the environment runs the kernels in triton's interpreter)"
    return Backend("triton", ("cuda",), _alpha, _dots, _update, _combine, _probes, _DUAL, paired=_paired)


def _interpreted() -> bool:
    """True when kernels will be, or have been, made for the interpreter: triton decides as its own library is imported."""
    loaded = sys.modules.get("triton")
    if loaded is None:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return type(loaded.language.philox).__name__ == "InterpretedFunction"


def _alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
    from fastsharp.ops.triton import krylov

    krylov.alpha(v, w, out)


def _dots(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    from fastsharp.ops.triton import krylov

    krylov.dots(V, w, removed, out)


def _update(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    from fastsharp.ops.triton import krylov

    krylov.update(V, w, c, row, out)


def _combine(S: Tensor, V: Tensor, out: Tensor) -> None:
    from fastsharp.ops.triton import krylov

    krylov.combine(S, V, out)


def _probes(kind: str, seed: int, first: int, out: Tensor) -> None:
    from fastsharp.ops.triton import krylov

    krylov.probes(kind, seed, first, out)
