"""Which backends compute the products of a batch, and in which order "auto" tries them."""

from __future__ import annotations

from collections.abc import Callable

from fastsharp.curvature.autograd import graph_products
from fastsharp.curvature.batch_products import Maker
from fastsharp.curvature.engine import tape_products
from fastsharp.curvature.mlp import mlp_products
from fastsharp.curvature.plain import declined
from fastsharp.errors import InputError
from fastsharp.objective import Objective

MAKERS: dict[str, Maker] = {"rop": tape_products, "mlp": mlp_products, "autograd": graph_products}
AUTO = ("mlp", "rop", "autograd")  # in the order of "auto"; the last one takes every model
SPECIAL: dict[str, Callable[[Objective], str | None]] = {"mlp": declined}  # a reason of "auto" against a backend, before it is tried
BACKENDS = ("auto", *MAKERS)


def check_backend(backend: str) -> str:
    """The choice itself; InputError where there is no such backend."""
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is none of {', '.join(map(repr, BACKENDS))}.")
    return backend


def candidates(backend: str, objective: Objective) -> list[str]:
    """The backends that this choice may use for this objective, in order."""
    return [name for name in AUTO if against(name, objective) is None] if backend == "auto" else [backend]


def against(backend: str, objective: Objective) -> str | None:
    """Why "auto" leaves a backend out that might compute the products, None where it does not."""
    return SPECIAL[backend](objective) if backend in SPECIAL else None
