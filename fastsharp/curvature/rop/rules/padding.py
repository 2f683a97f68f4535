"""Padding by a constant, by reflection, by replication. The circular one is made of slices and copies."""

from __future__ import annotations

import torch

from fastsharp.curvature.rop.folded import sample_wise
from fastsharp.curvature.rop.parts import Layout, Linear
from fastsharp.curvature.rop.rule import Call, Part, rule

aten = torch.ops.aten

rule(aten.reflection_pad1d.default, aten.replication_pad1d.default)(sample_wise(1))
rule(aten.reflection_pad2d.default, aten.replication_pad2d.default)(sample_wise(2))
rule(aten.reflection_pad3d.default, aten.replication_pad3d.default)(sample_wise(3))


@rule(aten.constant_pad_nd.default)
def constant_pad(call: Call) -> Part:
    """y = 0 with a window of x in a window of y: the constant has no tangent, a negative pad takes from x."""
    x, y, pad = Layout(call.inputs[0]), Layout(call.outputs[0]), call.args[1]
    before = [0] * (len(x.shape) - len(pad) // 2) + list(reversed(pad[::2]))  # pad counts from the last dimension
    extents = [max(min(n, m - p) - max(-p, 0), 0) for n, m, p in zip(x.shape, y.shape, before, strict=True)]
    in_x = _window([max(-p, 0) for p in before], extents)
    in_y = _window([max(p, 0) for p in before], extents)
    return Linear(call, lambda t: _moved(t, in_x, y, in_y), lambda g: _moved(g, in_y, x, in_x))


Window = tuple[slice, ...]


def _window(starts: list[int], extents: list[int]) -> Window:
    return (slice(None), *(slice(s, s + e) for s, e in zip(starts, extents, strict=True)))


def _moved(t: torch.Tensor, source: Window, layout: Layout, target: Window) -> torch.Tensor:
    """t[source] in the window `target` of zeros; a view of t where it fills them."""
    taken = t[source]
    if tuple(taken.shape[1:]) == layout.shape:
        return taken
    whole = layout.zeros(t)
    whole[target].copy_(taken)
    return whole
