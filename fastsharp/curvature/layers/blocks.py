"""Blocks of a curvature matrix, layer by layer: local factors from shared passes where `survey` allows it, the engine elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch

from fastsharp.curvature.batch_products import Made, Unavailable
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.layers.choice import Layer
from fastsharp.curvature.layers.factors import Dense, Factor, Jacobian, Sensitivity
from fastsharp.curvature.layers.loss_root import LossRoot, loss_root
from fastsharp.curvature.layers.narrowed import narrowed, unused
from fastsharp.curvature.layers.survey import GATE, Finding, split_batch, survey
from fastsharp.curvature.rop.split import Segment, Split
from fastsharp.errors import listing
from fastsharp.operator import SymmetricOperator
from fastsharp.params import ParamLayout

Tensor = torch.Tensor

_SWEPT = 32 << 20  # bytes of the largest value's adjoints in one pass on a CPU: wider passes come from pages that are fresh each time


@final
class LocalBlock(SymmetricOperator):
    """A layer's diagonal block by its local factor.

    trace   of the block, None where the rows of the factor were not formed
    """

    def __init__(self, matrix: FiniteSum, factor: Factor, layout: ParamLayout, denominator: float) -> None:
        super().__init__(layout.n, matrix.dtype, matrix.device)
        self._matrix, self._factor, self._layout, self._denominator = matrix, factor, layout, denominator
        self.trace = None if factor.square_norm is None else factor.square_norm / denominator

    @property
    def layout(self) -> ParamLayout:
        return self._layout

    def check_unchanged(self) -> None:
        self._matrix.check_unchanged()

    def _apply(self, V: Tensor, out: Tensor) -> None:
        objective = self._matrix.objective
        objective.check_marks()
        with objective.quiet(forward=False), torch.no_grad():
            out.zero_()
            for v, total in zip(V, out, strict=True):
                self._factor.product(v, total)
            if self._denominator != 1.0:
                out.div_(self._denominator)


class Block:
    """A layer with its block.

    operator   the block; None: zero, since the loss has no path to the layer
    route      "dense", "jacobian", "sensitivity": the form of the local factor; "engine"; "none"
    reason     why the engine
    """

    def __init__(self, layer: Layer, layout: ParamLayout, operator: SymmetricOperator | None, route: str, reason: str = "") -> None:
        self.layer, self.layout, self.operator, self.route, self.reason = layer, layout, operator, route, reason

    def release(self) -> None:
        """Drop what the operator holds; it is not used again."""
        self.operator = None

    @property
    def trace(self) -> float | None:
        """Of the block where it is known without a product."""
        return self.operator.trace if isinstance(self.operator, LocalBlock) else 0.0 if self.operator is None else None


class LayerBlocks:
    """The diagonal blocks of `matrix` for `layers`, in groups whose factors fit into its memory budget together.

    local    False: every block by the engine
    """

    def __init__(self, matrix: FiniteSum, layers: Sequence[Layer], *, local: bool = True, seed: int = 0) -> None:
        self._matrix, self._layers = matrix, list(layers)
        number = {name: i for i, name in enumerate(matrix.layout.names)}
        self._numbers = [tuple(number[name] for name in layer.params) for layer in layers]
        self._layouts = [
            ParamLayout.of(layer.params, [matrix.objective.selection.params[p] for p in params])
            for layer, params in zip(layers, self._numbers, strict=True)
        ]
        self._generator = torch.Generator().manual_seed(seed)
        self._local = local
        self._unused: tuple[str, ...] = ()
        self._first: tuple[Split, Made] | None = None  # of the survey, for the first pass

    def __iter__(self) -> Iterator[Block]:
        """Each layer's block once, in the order of their groups; a factor is freed when its group is over."""
        matrix = self._matrix
        if self._local:
            with matrix.objective.quiet():
                findings, self._first = survey(matrix, self._layers, self._numbers, self._generator)
        else:
            findings = [Finding(f"backend={matrix.backend!r} was asked for")] * len(self._layers)
        self._unused = unused(matrix) if any(not finding.forms for finding in findings) else ()
        matrix.release()  # its kept graphs make room for the factors
        budget = matrix.objective.graph_budget
        chosen: dict[int, tuple[str, int]] = {}
        by_engine: dict[int, str] = {}
        for i, finding in enumerate(findings):
            fits = [form for form in finding.forms if form[1] <= budget]
            if fits:
                chosen[i] = fits[0]
            elif finding.forms:
                by_engine[i] = "its factor exceeds the memory budget"
            elif finding.reason:
                by_engine[i] = finding.reason
        for group in _grouped(chosen, budget):
            yield from self._group(group, {i: chosen[i][0] for i in group}, by_engine)
        for i in sorted(set(range(len(self._layers))) - set(chosen) | set(by_engine)):
            yield self._by_engine(i, by_engine.get(i, "it is not used in the first batch"))

    def _by_engine(self, i: int, reason: str) -> Block:
        layer, layout = self._layers[i], self._layouts[i]
        if set(layer.params) <= set(self._unused):
            return Block(layer, layout, None, "none")
        return Block(layer, layout, narrowed(self._matrix, layer.params), "engine", reason)

    def _group(self, group: Sequence[int], forms: dict[int, str], by_engine: dict[int, str]) -> Iterator[Block]:
        """One pass over the data for the factors of these layers; what a batch refuses goes to the engine."""
        matrix = self._matrix
        factors = {i: self._factor(i, forms[i]) for i in group}
        with torch.no_grad():
            denominator = self._pass(factors, by_engine)
        for i in list(factors):
            factor = factors.pop(i)
            yield Block(self._layers[i], self._layouts[i], LocalBlock(matrix, factor, self._layouts[i], denominator), factor.form)

    def _factor(self, i: int, form: str) -> Factor:
        like = self._matrix.objective.selection.params[0]
        if form == "dense":
            return Dense(self._layouts[i].n, like)
        return Jacobian() if form == "jacobian" else Sensitivity(self._layouts[i].shapes)

    def _pass(self, factors: dict[int, Factor], by_engine: dict[int, str]) -> float:
        """Fill the factors from all batches, drop those that miss the engine's gradient; returns the denominator of the mean."""
        objective = self._matrix.objective
        counts = 0.0
        for index, batch in objective.batches:
            with objective.quiet():
                try:
                    split, made = split_batch(self._matrix, index, batch) if self._first is None or index else self._first
                except (Unavailable, ValueError) as refusal:
                    by_engine.update(dict.fromkeys(factors, str(refusal)))
                    factors.clear()
                    return 1.0
                self._first = None
                counts += made.count or 0.0
                if made.scale == 0.0 or not factors:
                    continue
                root = loss_root(split, self._generator, objective.selection.params[0])
                if root is None:
                    missed = dict.fromkeys(factors, "samples meet in the loss")
                else:
                    missed = self._batch(split, root, factors)
            for i, reason in missed.items():
                del factors[i]
                by_engine[i] = reason
        return 1.0 if objective.reduction == "sum" else counts

    def _batch(self, split: Split, root: LossRoot, factors: dict[int, Factor]) -> dict[int, str]:
        """Add one batch; a reason for each layer whose factor is not what the engine's own adjoints say."""
        missed: dict[int, str] = {}
        segments: dict[int, Segment] = {}
        for i in factors:
            segment = split.segment(self._numbers[i])
            if segment is None:
                continue  # not used in this batch
            apart = isinstance(factors[i], Sensitivity) or segment.by_sample(split.samples)
            if apart and segment.alone and (self._matrix.kind == "ggn" or segment.linear):
                segments[i] = segment
            else:
                missed[i] = "other batches take another way through the network"
        if not len(root.rows):
            return missed
        params = self._matrix.objective.selection.params
        w = torch.randn(root.rows.shape[:2], generator=self._generator, dtype=torch.float64).to(root.rows)
        found = {i: w.new_zeros(self._layouts[i].n) for i in segments}
        step = self._rows_at_once(split, root)
        for first in range(0, len(root.rows), step):
            rows = slice(first, first + step)
            self._add(split, root, rows, w[rows], segments, factors, found)
        gradient = [p.new_zeros(1, *p.shape) for p in params]
        split.gradient((w[:, :, None] * root.rows).sum(0).reshape(1, *split.shape), gradient)
        for i, got in found.items():
            want = torch.cat([gradient[p].reshape(-1) for p in self._numbers[i]])
            if not float((got - want).norm()) <= GATE * torch.finfo(got.dtype).eps * float(want.norm()):
                missed[i] = "its local factor misses the engine's adjoint: samples may meet in the network"
        return missed

    def _add(
        self,
        split: Split,
        root: LossRoot,
        rows: slice,
        w: Tensor,
        segments: dict[int, Segment],
        factors: dict[int, Factor],
        found: dict[int, Tensor],
    ) -> None:
        """Pull some rows of the root back to the layers' outputs, and give them to the factors."""
        by_slot: dict[int, list[int]] = {}
        for i, segment in segments.items():
            by_slot.setdefault(segment.y, []).append(i)
        signs = None if root.signs is None else root.signs[rows]
        z_g = root.rows[rows].reshape(-1, *split.shape)
        for slot, y_g in split.pull(z_g, by_slot):
            if y_g is None or y_g[0].numel() % split.samples:
                continue  # where that is not zero, the check of the adjoints shows it
            for i in by_slot[slot]:
                found[i] += factors[i].add(segments[i], y_g, signs, w)

    def _rows_at_once(self, split: Split, root: LossRoot) -> int:
        if root.rows.device.type != "cpu":
            return len(root.rows)
        return max(1, _SWEPT // max(split.largest, 1))


def _grouped(chosen: dict[int, tuple[str, int]], budget: int) -> list[list[int]]:
    """Layers from the output down, as many at once as fit: a pass for the upper ones ends early."""
    groups: list[list[int]] = []
    room = -1
    for i in sorted(chosen, reverse=True):
        size = chosen[i][1]
        if size > room:
            groups.append([])
            room = budget
        groups[-1].append(i)
        room -= size
    return groups


def route_notes(blocks: Sequence[Block]) -> list[str]:
    """How the blocks were multiplied, a line for each route and reason."""
    lines: dict[str, list[str]] = {}
    for block in blocks:
        if block.route == "engine":
            lines.setdefault(f"block by the engine, {block.reason}", []).append(block.layer.name)
        elif block.route == "none":
            lines.setdefault("no gradient path, the block is zero", []).append(block.layer.name)
        else:
            lines.setdefault(f"block by its local factor ({block.route})", []).append(block.layer.name)
    return [f"{line}: {listing(names)}" for line, names in lines.items()]
