"""`explain`: which backend computes a model's products and why, op by op."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from fastsharp.api.subject import Operator, kind_of
from fastsharp.batches import as_loader
from fastsharp.composite import name_of
from fastsharp.curvature.backends import MAKERS, against, candidates
from fastsharp.curvature.batch_products import BatchProducts, Request, Unavailable
from fastsharp.curvature.engine import TapeProducts
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.rop.linearise import Row
from fastsharp.errors import InputError
from fastsharp.params import Selector
from fastsharp.results import Calls, Explanation


def explain(
    model: nn.Module,
    batch: Any,
    loss_fn: Any = None,
    *,
    params: Selector = None,
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
) -> Explanation:
    """Which backend computes the products of this model's Hessian (or Gauss-Newton matrix), why, and what serves each of its calls.

        print(fastsharp.explain(model, batch, loss_fn))

    batch      one batch; of a loader the first one
    loss_fn, params, bn, dropout, operator   as in `fastsharp.lanczos`

    Returns Explanation: `.backend`, `.refusals` and `.declined` {backend: reason}, `.calls` (ATen name, count, "rule" or "island", modules),
    `.cuda_graph` (why products on a GPU are not replayed as CUDA graphs, "" where they are).
    Cost: one linearisation of the batch by each backend; no product is computed.
    Raises subclasses of FastsharpError where products cannot be had at all.
    """
    first = next(iter(as_loader(batch)), None)
    matrix = kind_of(operator)(model, [] if first is None else [first], loss_fn, params=params, bn=bn, dropout=dropout)
    if not isinstance(matrix, FiniteSum):
        raise InputError(f"explain: {name_of(matrix)} is made of other operators. Ask for one of them at a time.")
    request = Request(matrix.objective, 0, matrix.objective.batches.first(), matrix.form)
    *auto, last = candidates("auto", matrix.objective)
    declined: dict[str, str] = {}
    refusals: dict[str, str] = {}
    calls: tuple[Calls, ...] = ()
    found: dict[str, BatchProducts] = {}
    with matrix.objective.quiet():
        for name in (name for name in MAKERS if name != last):
            try:
                products = found[name] = MAKERS[name](request).products
            except Unavailable as e:
                refusals[name] = str(e)
                continue
            reason = against(name, matrix.objective)
            if reason:
                declined[name] = reason
            if isinstance(products, TapeProducts):
                calls = _by_op(products.table())
        backend = next((name for name in auto if name not in refusals), last)
        if backend == last:  # it takes every model that has products at all
            found[last] = MAKERS[last](request).products
            found[last].check_twice_differentiable()
    return Explanation(backend, refusals, calls, found[backend].uncapturable, declined)


def _by_op(rows: list[Row]) -> tuple[Calls, ...]:
    """One line for each operation and what serves it."""
    count: Counter[tuple[str, str]] = Counter()
    modules: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        count[row.op, row.by] += row.calls
        modules.setdefault((row.op, row.by), {})[row.module] = None
    return tuple(Calls(op, n, by, tuple(modules[op, by])) for (op, by), n in count.most_common())
