"""What the first batch tells of each layer: whether its block can be computed locally, in which form, and at what cost.

The rule, layer by layer:
    1. The loss follows from one output of r numbers a sample, r <= 10 times the number of layers (r backward passes replace the passes
       of all products), and samples do not meet in the loss.
    2. The layer's influence passes through one value y, up to which no other layer's weights enter.
    3. For the Hessian: no part from the layer to the output bends in what depends on the layer, so that its block is the Gauss-Newton
       block. Checked besides by products of both matrices on a few samples.
    4. The form: "dense" for at most 3072 parameters, where there are as many rows; "jacobian" for at most twice as many parameters as y
       has numbers a sample; else "sensitivity". The first that fits into memory.
Everything else is multiplied by the engine, by the operator of the layer's parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastsharp.batches import count_of, head
from fastsharp.curvature.batch_products import Made, Request, Unavailable
from fastsharp.curvature.engine import TapeProducts, tape_products
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import GAUSS_NEWTON
from fastsharp.curvature.layers.choice import Layer
from fastsharp.curvature.layers.loss_root import LossRoot, loss_root
from fastsharp.curvature.rop.split import Split
from fastsharp.errors import FastsharpError, InputError

Tensor = torch.Tensor

GATE = 2.0**12  # eps: two orders of summation of the same products stay below 60, a wrong factor misses by its own size
MOST_ROWS = 10  # rows of the loss's root a layer; a product by the engine costs about two passes a layer, a run some 40 products
DENSE = 3072  # parameters up to which the dense block is cheaper to form than its rows are to read in 40 products
DENSE_AT_MOST = 8192  # where nothing else fits into memory
_FEW = 4  # samples on which Hessian and Gauss-Newton blocks are compared


@dataclass(frozen=True)
class Finding:
    """One layer's route.

    reason   why its block is multiplied by the engine, "" where it need not be
    forms    forms of the local block, best first, with their bytes for all samples; none with reason "": the block is zero
    """

    reason: str = ""
    forms: tuple[tuple[str, int], ...] = ()


def split_batch(matrix: FiniteSum, index: Any, batch: Any) -> tuple[Split, Made]:
    """The batch's tape, cut at the network's output; Unavailable, InputError or ValueError where that cannot be."""
    made = tape_products(Request(matrix.objective, index, batch, GAUSS_NEWTON))
    assert isinstance(made.products, TapeProducts)
    return Split(made.products.linearised, len(matrix.objective.selection.params)), made


def survey(
    matrix: FiniteSum, layers: Sequence[Layer], numbers: Sequence[Sequence[int]], generator: torch.Generator
) -> tuple[list[Finding], tuple[Split, Made] | None]:
    """A finding for each layer, and the first batch as it was split; numbers: of their parameters in the matrix.

    Call inside `objective.quiet()`.
    """
    objective = matrix.objective
    batch = objective.batches.first()
    try:
        split, made = split_batch(matrix, 0, batch)
    except (Unavailable, InputError, ValueError) as refusal:
        return [Finding(_first_line(refusal))] * len(layers), None
    most = MOST_ROWS * len(layers)
    if split.width > most:
        return [Finding(f"{split.width} outputs a sample are more than {most}, ten a layer")] * len(layers), None
    root = loss_root(split, generator, objective.selection.params[0])
    if root is None:
        return [Finding("samples meet in the loss")] * len(layers), None
    found = _findings(matrix, split, root, numbers)
    if matrix.kind == "hessian":
        claimed = [i for i, finding in enumerate(found) if finding.forms]
        for i in _disproved(matrix, _few(matrix, batch) or split, claimed, numbers, generator):
            found[i] = Finding("its Hessian block is not its Gauss-Newton block on the first samples")
    return found, (split, made)


def _findings(matrix: FiniteSum, split: Split, root: LossRoot, numbers: Sequence[Sequence[int]]) -> list[Finding]:
    """From the segments, and the shapes that one row shows on its way."""
    segments = [split.segment(params) for params in numbers]
    row = root.rows[:1].reshape(-1, *split.shape)
    values = dict(split.pull(row, {s.y for s in segments if s is not None})) if len(row) else {}
    scale = matrix.objective.batches.count / max(count_of(matrix.objective.batches.first()), 1)
    rows = round(len(root.rows) * split.samples * scale)
    found = []
    for segment, params in zip(segments, numbers, strict=True):
        if segment is None:
            found.append(Finding())
            continue
        if not len(row):
            found.append(Finding("the loss has no curvature by the output on the first batch"))
            continue
        y_g = values[segment.y]
        if not segment.alone:
            found.append(Finding("its parameters act in several places, or not all of them do"))
        elif matrix.kind == "hessian" and not segment.linear:
            found.append(Finding("the network bends in what follows from it, or it multiplies itself"))
        elif y_g is None or y_g[0].numel() % split.samples:
            found.append(Finding("no adjoint of its output by samples"))
        else:
            n = sum(matrix.layout.offsets[p + 1] - matrix.layout.offsets[p] for p in params)
            d = y_g[0].numel() // split.samples
            found.append(Finding(forms=_forms(n, rows, d, segment.by_sample(split.samples), y_g.element_size())))
    return found


def _forms(n: int, rows: int, d: int, by_sample: bool, size: int) -> tuple[tuple[str, int], ...]:
    """The forms of a block of n parameters with their bytes, best first; d numbers of y a sample."""
    dense, jacobian, sensitivity = ("dense", size * n * n), ("jacobian", size * rows * n), ("sensitivity", size * rows * d)
    if not by_sample:
        return (sensitivity,)
    first = (dense,) if n <= min(DENSE, rows) else ()
    last = (dense,) if DENSE < n <= DENSE_AT_MOST else ()
    return (*first, *((jacobian, sensitivity) if n <= 2 * d else (sensitivity, jacobian)), *last)


def _few(matrix: FiniteSum, batch: Any) -> Split | None:
    """A few samples of the batch, None where it has no more or the model does not take so few."""
    few = head(batch, 0, _FEW) if count_of(batch) > _FEW else None
    try:
        return None if few is None else split_batch(matrix, ("layers", 0), few)[0]
    except (FastsharpError, Unavailable, RuntimeError, ValueError, IndexError, TypeError):
        return None


def _disproved(
    matrix: FiniteSum, split: Split, claimed: Sequence[int], numbers: Sequence[Sequence[int]], generator: torch.Generator
) -> list[int]:
    """Those of the claimed layers for which (H_ll - G_ll) v is not zero, by the engine's own second-order terms.

    They vanish term by term, without rounding.
    """
    shapes, like = matrix.layout.shapes, matrix.objective.selection.params[0]
    wrong = []
    for i in claimed:
        v = [torch.randn(1, *shapes[p], generator=generator, dtype=torch.float64).to(like) for p in numbers[i]]
        if any(bool((t != 0.0).any()) for t in split.bent(numbers[i], v)):  # NaN is not zero either
            wrong.append(i)
    return wrong


def _first_line(e: BaseException) -> str:
    return str(e).split("\n")[0]
