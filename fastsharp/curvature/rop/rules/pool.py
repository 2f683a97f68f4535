"""Pooling. Means are linear; a maximum reads its input at the places that the call itself returns."""

from __future__ import annotations

import math

import torch

from fastsharp.curvature.rop.folded import sample_wise
from fastsharp.curvature.rop.parts import Layout, Linear
from fastsharp.curvature.rop.rule import Call, Part, rule

aten = torch.ops.aten

rule(aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default)(sample_wise(2))
rule(aten.avg_pool3d.default, aten._adaptive_avg_pool3d.default)(sample_wise(3))


@rule(aten.max_pool2d_with_indices.default, aten.adaptive_max_pool2d.default)
def max_pool2d(call: Call) -> Part:
    return _selected(call, 2)


@rule(aten.max_pool3d_with_indices.default, aten.adaptive_max_pool3d.default)
def max_pool3d(call: Call) -> Part:
    return _selected(call, 3)


def _selected(call: Call, space: int) -> Part:
    """y = x[places]; the adjoint adds up where windows overlap."""
    x, y = Layout(call.inputs[0]), Layout(call.outputs[0])
    places = _places(x, y, call.outputs[1], space)
    return Linear(
        call,
        lambda t, i: _shaped(_flat(x.like(t)).gather(1, i.expand(len(t), -1)), y),
        lambda g, i: _shaped(_flat(x.zeros(g)).scatter_add_(1, i.expand(len(g), -1), _flat(y.like(g))), x),
        places,
    )


def _places(x: Layout, y: Layout, indices: torch.Tensor, space: int) -> torch.Tensor:
    """Offsets in the memory of x, in the order in which y lies in its own: one gather then serves every layout."""
    offsets = torch.arange(math.prod(x.shape), device=indices.device).as_strided(x.shape, x.strides)
    chosen = offsets.flatten(-space).gather(-1, indices.flatten(-space)).view(y.shape)
    ordered = torch.empty_strided(y.shape, y.strides, dtype=chosen.dtype, device=chosen.device).copy_(chosen)
    return ordered.as_strided((1, ordered.numel()), (ordered.numel(), 1))


def _flat(t: torch.Tensor) -> torch.Tensor:
    """A tangent without gaps as (b, elements), in the order of memory."""
    return t.as_strided((len(t), t[0].numel()), (t.stride(0), 1))


def _shaped(flat: torch.Tensor, layout: Layout) -> torch.Tensor:
    return flat.as_strided((len(flat), *layout.shape), (flat.stride(0), *layout.strides))
