"""Parts of a curvature matrix: one layer's block, all diagonal blocks, the block between two groups of parameters."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch

from fastsharp.composite import Composite, LinearCombination, name_of
from fastsharp.curvature.coordinates import Span, layout_of, matching, spans, sub_layout
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.errors import ArgumentTypeError, InputError, ShapeError, listing
from fastsharp.operator import SymmetricOperator
from fastsharp.params import ParamLayout

Group = str | Iterable[str]
_ROWS = 8  # multiplied at once by BlockDiagonal: more share a pass, at n numbers of memory each


def restrict(A: SymmetricOperator, params: Group) -> SymmetricOperator:
    """S' A S: the principal submatrix of the chosen parameters, (m, m); its vectors and layout are theirs.

    A        an operator of a model, or any sum, multiple or other operator made of such
    params   a name, a glob ("layer4.*") or a list of them

    A Hessian or Gauss-Newton matrix is linearised anew over these parameters alone, on the same frozen data, which costs less than a
    product of the whole; of a sum each part is restricted; of anything else the cost is a product of A.
    Raises ParamError where a name matches nothing.
    """
    layout = layout_of(A, "restrict")
    return _restricted(A, layout, matching(layout, params, "restrict"))


def _restricted(A: SymmetricOperator, layout: ParamLayout, names: tuple[str, ...]) -> SymmetricOperator:
    if names == layout.names:
        return A
    if isinstance(A, FiniteSum):
        return _narrowed(A, names)
    if isinstance(A, LinearCombination):
        return LinearCombination((c, _restricted(part, layout, names)) for c, part in zip(A.coefficients, A.parts, strict=True))
    return Submatrix(A, layout, names)


def _narrowed(A: FiniteSum, names: tuple[str, ...]) -> FiniteSum:
    """The same matrix over fewer parameters; data, modes and loss are shared, weights are watched by both."""
    whole = A.objective.selection
    chosen = {name: p for name, p in zip(whole.names, whole.params, strict=True) if name in names}
    twin, objective = copy.copy(A), copy.copy(A.objective)
    objective.selection = dataclasses.replace(
        whole,
        names=names,
        params=tuple(chosen.values()),
        layout=ParamLayout.of(names, list(chosen.values())),
        frozen=(),
        tied=tuple(pair for pair in whole.tied if pair[1] in chosen),
    )
    twin.objective, twin.n, twin.preflight = objective, objective.selection.layout.n, {"level": "off"}
    twin._candidates, twin._refusals = list(A._candidates), list(A._refusals)
    twin._reset()
    return twin


@final
class Submatrix(Composite):
    """S' A S by products of the whole A: for operators that cannot be built over fewer parameters. `restrict` makes it."""

    def __init__(self, A: SymmetricOperator, layout: ParamLayout, names: tuple[str, ...]) -> None:
        self._layout, self._spans = sub_layout(layout, names), spans(layout, names)
        super().__init__([A], self._layout.n)

    @property
    def kind(self) -> str:
        return f"{name_of(self.parts[0])}, restricted"

    @property
    def facts(self) -> dict[str, Any]:
        return {"params": list(self._layout.names)}

    @property
    def layout(self) -> Any:
        return self._layout

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        whole = V.new_zeros(len(V), self.parts[0].n)
        done = 0
        for a, b in self._spans:
            whole[:, a:b] = V[:, done : done + b - a]
            done += b - a
        product, done = self.parts[0].apply(whole), 0
        for a, b in self._spans:
            out[:, done : done + b - a] = product[:, a:b]
            done += b - a


def block_diagonal(A: SymmetricOperator, blocks: str | Mapping[str, Group] = "module") -> BlockDiagonal:
    """diag(A_11, ..., A_LL): A without what couples its blocks, (n, n).

    A        an operator of a model
    blocks   "module": the parameters that a module holds itself, as a weight with its bias; "parameter": each tensor by itself;
             or {name: globs}, which have to cover each parameter exactly once

    Cost: L products of A a vector, as rows of common passes over the data.
    Raises InputError where the blocks overlap or leave a parameter out, ParamError where a glob matches nothing.
    """
    layout = layout_of(A, "block_diagonal")
    if isinstance(blocks, Mapping):
        groups = {name: matching(layout, globs, "block_diagonal") for name, globs in blocks.items()}
        of: dict[str, str] = {}
        for block, names in groups.items():
            for name in names:
                if of.setdefault(name, block) != block:
                    raise InputError(f"block_diagonal: {name!r} is in the blocks {of[name]!r} and {block!r}. Let them not overlap.")
        left = [name for name in layout.names if name not in of]
        if left:
            raise InputError(f"block_diagonal: no block holds {listing(left)}. Name one for them, or leave them out by restrict().")
    elif blocks in ("module", "parameter"):
        collected: dict[str, list[str]] = {}
        for name in layout.names:
            collected.setdefault(name.rpartition(".")[0] if blocks == "module" else name, []).append(name)
        groups = {block: tuple(names) for block, names in collected.items()}
    else:
        raise InputError(f"block_diagonal: blocks={blocks!r} is neither 'module' nor 'parameter' nor {{name: globs}}.")
    return BlockDiagonal(A, groups)


@final
class BlockDiagonal(Composite):
    """The diagonal blocks of A and zeros elsewhere; `block_diagonal` makes it.

    blocks   {name: its parameters}
    """

    def __init__(self, A: SymmetricOperator, blocks: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__([A], A.n)
        self.blocks = dict(blocks)
        self._spans: list[list[Span]] = [spans(A.layout, names) for names in blocks.values()]

    @property
    def kind(self) -> str:
        return f"block-diagonal part of ({name_of(self.parts[0])})"

    @property
    def facts(self) -> dict[str, Any]:
        return {"blocks": {name: list(names) for name, names in self.blocks.items()}}

    def block(self, name: str) -> SymmetricOperator:
        """One of the blocks as an operator of its own, (m, m), by `restrict`."""
        if name not in self.blocks:
            raise InputError(f"block_diagonal: {name!r} is none of the blocks {listing(list(self.blocks))}.")
        return restrict(self.parts[0], self.blocks[name])

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        b, at_once = len(V), max(1, _ROWS // len(V))
        for first in range(0, len(self._spans), at_once):
            chosen = self._spans[first : first + at_once]
            alone = V.new_zeros(len(chosen) * b, self.n)
            for i, block in enumerate(chosen):
                for start, stop in block:
                    alone[i * b : (i + 1) * b, start:stop] = V[:, start:stop]
            product = self.parts[0].apply(alone)
            for i, block in enumerate(chosen):
                for start, stop in block:
                    out[:, start:stop] = product[i * b : (i + 1) * b, start:stop]


@final
class Coupling(Composite):
    """[[0, B], [B', 0]] for the block B = A[rows, cols] between two groups of parameters: its eigenvalues are plus and minus the singular values of B.

    A            an operator of a model
    rows, cols   a name, a glob or a list of them each; no parameter in both

    The rectangular B itself has no eigenvalues; in this form every solver takes it: the largest eigenvalues ("LA") are the largest
    singular values, `split` gives the singular vectors, frobenius / sqrt(2) is ||B||_F. Coordinates are those of the parameters of both
    groups in the model's order, see `layout`.
    matvec(v) = B v and rmatvec(u) = B' u take and give vectors of one group. Cost: 2 products of A, restricted to both groups, a vector;
    matvec and rmatvec one.
    """

    def __init__(self, A: SymmetricOperator, rows: Group, cols: Group) -> None:
        layout = layout_of(A, "Coupling")
        groups = tuple(matching(layout, group, "Coupling") for group in (rows, cols))
        both = [name for name in groups[0] if name in set(groups[1])]
        if both:
            raise InputError(f"Coupling: {listing(both)} in rows and cols. Let them not overlap; restrict() gives the block of one group.")
        chosen = set(groups[0]) | set(groups[1])
        inner = _restricted(A, layout, tuple(name for name in layout.names if name in chosen))
        super().__init__([inner], inner.n)
        self.row_layout, self.col_layout = (sub_layout(layout, group) for group in groups)
        self._rows, self._cols = (spans(inner.layout, group) for group in groups)

    @property
    def kind(self) -> str:
        return f"coupling within ({name_of(self.parts[0])})"

    @property
    def facts(self) -> dict[str, Any]:
        return {"rows": list(self.row_layout.names), "cols": list(self.col_layout.names)}

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """B v for v (columns,) or rows (b, columns): in the coordinates of `col_layout`, to those of `row_layout`."""
        return self._across(v, self._cols, self._rows, self.col_layout.n)

    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        """B' u for u (rows,) or rows (b, rows): the other way."""
        return self._across(u, self._rows, self._cols, self.row_layout.n)

    def split(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(U, V) of eigenvectors X (n,) or (k, n) with positive eigenvalues: left and right singular vectors of unit norm."""
        self._check(X, "the vector")
        if X.ndim not in (1, 2) or X.shape[-1] != self.n:
            raise ShapeError(f"Coupling: the vectors have shape {tuple(X.shape)}, expected ({self.n},) or (k, {self.n}).")
        return _taken(X, self._rows) * math.sqrt(2), _taken(X, self._cols) * math.sqrt(2)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        b = len(V)
        alone = V.new_zeros(2 * b, self.n)
        for rows, group in ((alone[:b], self._rows), (alone[b:], self._cols)):
            for start, stop in group:
                rows[:, start:stop] = V[:, start:stop]
        product = self.parts[0].apply(alone)
        for rows, group in ((product[:b], self._cols), (product[b:], self._rows)):
            for start, stop in group:
                out[:, start:stop] = rows[:, start:stop]

    def _across(self, v: torch.Tensor, there: list[Span], here: list[Span], size: int) -> torch.Tensor:
        if not isinstance(v, torch.Tensor):
            raise ArgumentTypeError(f"Coupling: the vector is a {type(v).__name__}, expected a torch.Tensor.")
        if v.ndim not in (1, 2) or v.shape[-1] != size:
            raise ShapeError(f"Coupling: the vector has shape {tuple(v.shape)}, expected ({size},) or rows (b, {size}).")
        rows = v if v.ndim == 2 else v[None]
        whole, done = rows.new_zeros(len(rows), self.n), 0
        for a, b in there:
            whole[:, a:b] = rows[:, done : done + b - a]
            done += b - a
        product = _taken(self.parts[0].apply(whole), here)
        return product if v.ndim == 2 else product[0]


def _taken(X: torch.Tensor, group: list[Span]) -> torch.Tensor:
    return torch.cat([X[..., a:b] for a, b in group], dim=-1)
