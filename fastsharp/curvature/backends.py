"""Which backends compute the products of a batch, and in which order "auto" tries them."""

from __future__ import annotations

from fastsharp.curvature.autograd import graph_products
from fastsharp.curvature.batch_products import Maker

MAKERS: dict[str, Maker] = {"autograd": graph_products}  # in the order of "auto"; the last one takes every model
BACKENDS = ("auto", *MAKERS)


def candidates(backend: str) -> list[str]:
    """The backends that this choice may use, in order."""
    return list(MAKERS) if backend == "auto" else [backend]
