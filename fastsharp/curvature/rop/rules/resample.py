"""Resampling: interpolation to another size, the shuffle between channels and pixels, sampling on a fixed grid."""

from __future__ import annotations

import torch

from fastsharp.curvature.rop.folded import join, sample_wise
from fastsharp.curvature.rop.parts import Layout, Linear
from fastsharp.curvature.rop.rule import Call, Part, rule

aten = torch.ops.aten

rule(aten.upsample_nearest1d.default, aten._upsample_nearest_exact1d.default, aten.upsample_linear1d.default)(sample_wise(1))
rule(
    aten.upsample_nearest2d.default,
    aten._upsample_nearest_exact2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
)(sample_wise(2))
rule(aten.upsample_nearest3d.default, aten._upsample_nearest_exact3d.default, aten.upsample_trilinear3d.default)(sample_wise(3))


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call) -> Part:
    factor = call.args[1]
    return Linear(call, lambda t: aten.pixel_shuffle.default(t, factor), lambda g: aten.pixel_unshuffle.default(g, factor))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call) -> Part:
    factor = call.args[1]
    return Linear(call, lambda t: aten.pixel_unshuffle.default(t, factor), lambda g: aten.pixel_shuffle.default(g, factor))


@rule(aten.grid_sampler_2d.default)
def grid_sampler(call: Call) -> Part | None:
    """Linear in the picture. A grid that depends on the parameters is left to torch."""
    if call.active[1]:
        return None
    x, y, options = Layout(call.inputs[0]), Layout(call.outputs[0]), call.args[2:]

    def on(grid: torch.Tensor, b: int) -> torch.Tensor:
        return join(grid.expand(b, *grid.shape), 4)

    def apply(t: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        sampled: torch.Tensor = aten.grid_sampler_2d.default(join(t, 4), on(grid, len(t)), *options)
        return sampled.view(len(t), *y.shape)

    def adjoint(g: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        picture = join(x.zeros(g), 4)  # read for the adjoint of the grid, which is not wanted
        spread: torch.Tensor = aten.grid_sampler_2d_backward.default(join(g, 4), picture, on(grid, len(g)), *options, [True, False])[0]
        return spread.view(len(g), *x.shape)

    return Linear(call, apply, adjoint, call.inputs[1])
