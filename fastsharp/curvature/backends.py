"""Which backends compute the products of a batch, and in which order "auto" tries them."""

from __future__ import annotations

from fastsharp.curvature.autograd import graph_products
from fastsharp.curvature.batch_products import Maker
from fastsharp.curvature.engine import tape_products
from fastsharp.curvature.mlp import mlp_products

MAKERS: dict[str, Maker] = {"rop": tape_products, "mlp": mlp_products, "autograd": graph_products}
AUTO = ("rop", "autograd")  # in the order of "auto"; the last one takes every model
BACKENDS = ("auto", *MAKERS)


def candidates(backend: str) -> list[str]:
    """The backends that this choice may use, in order."""
    return list(AUTO) if backend == "auto" else [backend]
