"""Which backends compute the products of a batch, and in which order "auto" tries them."""

from __future__ import annotations

from fastsharp.curvature.autograd import graph_products
from fastsharp.curvature.batch_products import Maker
from fastsharp.curvature.engine import tape_products
from fastsharp.curvature.mlp import mlp_products
from fastsharp.errors import InputError

MAKERS: dict[str, Maker] = {"rop": tape_products, "mlp": mlp_products, "autograd": graph_products}
AUTO = ("rop", "autograd")  # in the order of "auto"; the last one takes every model
BACKENDS = ("auto", *MAKERS)


def check_backend(backend: str) -> str:
    """The choice itself; InputError where there is no such backend."""
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r} is none of {', '.join(map(repr, BACKENDS))}.")
    return backend


def candidates(backend: str) -> list[str]:
    """The backends that this choice may use, in order."""
    return list(AUTO) if check_backend(backend) == "auto" else [backend]
