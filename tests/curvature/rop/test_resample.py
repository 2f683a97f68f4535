"""Rules of resampling."""

from __future__ import annotations

import pytest
import torch

from fastsharp.curvature.rop.rule import RULES, Call
from tests.curvature.rop.check import check_rule, part_of
from tests.curvature.rop.subsets import Case, channels_last, check_case
from tests.releases import torch_before

aten = torch.ops.aten

SIZES = [7, 3, 4]

CASES = [
    *(
        Case(getattr(aten, f"{name}{n}d").default, lambda r, n=n: (r(2, 3, *(4, 5, 3)[:n]), SIZES[:n]))
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for n in (1, 2, 3)
    ),
    *(
        Case(func, lambda r, n=n, corners=corners: (r(2, 3, *(4, 5, 3)[:n]), SIZES[:n], corners))
        for func, n in (
            (aten.upsample_linear1d.default, 1),
            (aten.upsample_bilinear2d.default, 2),
            (aten.upsample_bicubic2d.default, 2),
            (aten._upsample_bilinear2d_aa.default, 2),
            (aten._upsample_bicubic2d_aa.default, 2),
            (aten.upsample_trilinear3d.default, 3),
        )
        for corners in (False, True)
    ),
    Case(aten.upsample_nearest2d.default, lambda r: (channels_last(r(2, 3, 4, 5)), [8, 10], 2.0, 2.0)),
    Case(aten.upsample_bilinear2d.default, lambda r: (channels_last(r(2, 3, 4, 5)), [9, 12], False, 2.3, 2.5)),
    Case(aten.upsample_bicubic2d.default, lambda r: (r(2, 3, 4, 5).transpose(2, 3), [9, 12], True)),
    Case(aten.pixel_shuffle.default, lambda r: (r(2, 12, 2, 3), 2)),
    Case(aten.pixel_shuffle.default, lambda r: (r(9, 2, 3), 3)),
    Case(aten.pixel_unshuffle.default, lambda r: (channels_last(r(2, 3, 4, 6)), 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


@pytest.mark.skipif(torch_before("2.14"), reason="this torch has no derivative of grid_sampler_2d_backward to compare with")
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_sampling_on_a_fixed_grid(mode: int, padding: int) -> None:
    grid = 0.7 * torch.randn(2, 3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    for b in (1, 3):
        check_rule(aten.grid_sampler_2d.default, x, grid, mode, padding, mode == 1, active=[0], b=b)


def test_a_grid_that_depends_on_parameters_is_refused() -> None:
    x, grid = torch.randn(1, 1, 3, 3), torch.zeros(1, 2, 2, 2)
    y = aten.grid_sampler_2d.default(x, grid, 0, 0, False)
    assert RULES[aten.grid_sampler_2d.default](Call(aten.grid_sampler_2d.default, (x, grid, 0, 0, False), {}, y, lambda t: True)) is None


def test_adjoint_lies_as_its_input_does() -> None:
    """Bicubic kernels return contiguous tensors whatever they are given."""
    x = channels_last(torch.randn(2, 3, 4, 5))
    _, part = part_of(aten.upsample_bicubic2d.default, x, [8, 9], False)
    (x_gt,) = part.backward([torch.randn(3, 2, 3, 8, 9)], None, ())
    assert x_gt is not None and x_gt.stride()[1:] == x.stride()
