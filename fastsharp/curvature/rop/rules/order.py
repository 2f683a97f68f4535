"""Elements in another order, repeated or summed up along a dimension: the adjoint puts them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Linear, lift
from fastsharp.curvature.rop.rule import Call, Part, rule
from fastsharp.curvature.rop.rules.views import dim_of

aten = torch.ops.aten


def _twice(
    func: Callable[..., torch.Tensor], *args: Any
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    return (lambda t: func(t, *args)), (lambda g: func(g, *args))


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Part | None:
    return Linear(call, *_twice(torch.tril if call.func is aten.tril.default else torch.triu, call.argument(1, "diagonal", 0)))


@rule(aten.flip.default)
def flip(call: Call) -> Part | None:
    return Linear(call, *_twice(torch.flip, [dim_of(d, call.inputs[0].dim()) for d in call.args[1]]))


@rule(aten.roll.default)
def roll(call: Call) -> Part | None:
    shifts, dims, n = call.args[1], call.argument(2, "dims", ()), call.inputs[0].dim()
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    if not dims:
        shape, (shift,) = tuple(call.inputs[0].shape), shifts
        return Linear(
            call,
            lambda t: t.reshape(t.shape[0], -1).roll(shift, 1).view(-1, *shape),
            lambda g: g.reshape(g.shape[0], -1).roll(-shift, 1).view(-1, *shape),
        )
    places = [dim_of(d, n) for d in ([dims] if isinstance(dims, int) else dims)]
    return Linear(call, lambda t: t.roll(shifts, places), lambda g: g.roll([-s for s in shifts], places))


@rule(aten.cumsum.default)
def cumsum(call: Call) -> Part | None:
    dim = dim_of(call.args[1], max(call.inputs[0].dim(), 1))
    if call.inputs[0].dim() == 0 or call.outputs[0].dtype != call.inputs[0].dtype:
        return None
    return Linear(call, lambda t: t.cumsum(dim), lambda g: g.flip(dim).cumsum(dim).flip(dim))


@rule(aten.repeat.default)
def repeat(call: Call) -> Part | None:
    """Copies side by side; the adjoint sums over them."""
    repeats, before = list(call.args[1]), tuple(call.inputs[0].shape)
    padded = (1,) * (len(repeats) - len(before)) + before
    parted = [s for pair in zip(repeats, padded, strict=True) for s in pair]
    copies = list(range(1, 2 * len(repeats), 2))

    def back(g: torch.Tensor) -> torch.Tensor:
        return g.reshape(g.shape[0], *parted).sum(copies).reshape(g.shape[0], *before) if copies else g

    return Linear(call, lambda t: lift(t, len(repeats)).repeat(1, *repeats), back)


@rule(aten.unfold.default)
def unfold(call: Call) -> Part | None:
    """Sliding windows; the adjoint is torch's unfold_backward."""
    dim, size, step = call.args[1:4]
    if call.inputs[0].dim() == 0:
        return None
    dim, shape = dim_of(dim, call.inputs[0].dim()), tuple(call.inputs[0].shape)
    return Linear(
        call,
        lambda t: t.unfold(dim, size, step),
        lambda g: aten.unfold_backward(g, [g.shape[0], *shape], dim, size, step),
    )
