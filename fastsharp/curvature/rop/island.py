"""Any call without a rule, by torch's own derivatives of that one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.rule import Call, Part, Tangents
from fastsharp.curvature.rop.tree import mapped, tensors


class Island(Part):
    """x_g(x, y_g) = J(x)' y_g as one graph: its derivative by y_g gives J x_t, that by x the second term. One vector at a time.

    x_g is linear in y_g, so the graph made with the true adjoint serves the tangents as well.
    """

    def __init__(self, call: Call) -> None:
        self._inputs = len(call.inputs)
        xs: dict[int, torch.Tensor] = {}  # one leaf a value, also where it is given twice: the first place gets all of its adjoint
        self._on: list[int] = []
        for i, (t, active) in enumerate(zip(call.inputs, call.active, strict=True)):
            if active and id(t) not in xs:
                xs[id(t)] = t.detach().requires_grad_()
                self._on.append(i)
        self._xs = list(xs.values())
        with torch.enable_grad():
            args, kwargs = mapped(lambda leaf: xs.get(id(leaf), leaf), (call.args, call.kwargs))
            ys = tensors(call.func(*args, **kwargs))
        self._outputs = len(ys)
        self._used = [i for i, y in enumerate(ys) if y.requires_grad]
        self._ys = [ys[i] for i in self._used]
        self._set(None)

    def _set(self, y_g: Tangents | None) -> None:
        """Make the graph of x_g at this adjoint."""
        if y_g is None:
            y_g = [None] * self._outputs
        self._adjoints = [
            (torch.zeros_like(y) if y_g[i] is None else y_g[i].detach().clone()).requires_grad_()  # type: ignore[union-attr]
            for i, y in zip(self._used, self._ys, strict=True)
        ]
        x_g: Sequence[torch.Tensor | None] = [None] * len(self._xs)
        if self._ys:
            with torch.enable_grad():
                x_g = torch.autograd.grad(self._ys, self._xs, self._adjoints, create_graph=True, allow_unused=True)
        self._x_g = x_g

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        self._set(y_g)
        return self._placed([None if g is None else g.detach() for g in self._x_g])

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        given = [x_t[i] for i in self._on]
        b = next(t.shape[0] for t in given if t is not None)
        y_t: list[torch.Tensor | None] = [None] * self._outputs
        for i, t in zip(self._used, _rows(self._along(given), self._adjoints, b), strict=True):
            y_t[i] = t
        return y_t, given

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        pairs = [(y, t) for y, t in zip(self._ys, (y_gt[i] for i in self._used), strict=True) if t is not None]
        if kept is not None:
            pairs += self._along(kept)
        if not pairs:
            return [None] * self._inputs
        return self._placed(_rows(pairs, self._xs, len(pairs[0][1])))

    def _along(self, x_t: Tangents) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(x_g, x_t) of the inputs whose adjoint depends on anything."""
        return [(g, t) for g, t in zip(self._x_g, x_t, strict=True) if g is not None and g.requires_grad and t is not None]

    def _placed(self, values: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        placed: list[torch.Tensor | None] = [None] * self._inputs
        for i, value in zip(self._on, values, strict=True):
            placed[i] = value
        return placed


def _rows(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], by: Sequence[torch.Tensor], b: int) -> list[torch.Tensor | None]:
    """d/d by of sum_i <pairs[i][0], pairs[i][1][k]> for each k < b, stacked."""
    if not pairs:
        return [None] * len(by)
    rows = [
        torch.autograd.grad([f for f, _ in pairs], by, [t[k] for _, t in pairs], retain_graph=True, allow_unused=True) for k in range(b)
    ]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
