"""Rules of pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.curvature.rop.check import part_of
from tests.curvature.rop.engine import linearised
from tests.curvature.rop.subsets import Case, channels_last, check_case

aten = torch.ops.aten

TIES = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, -1.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 2, 5)

CASES = [
    *(
        Case(aten.max_pool2d_with_indices.default, lambda r, layout=layout, options=options: (layout(r(2, 3, 7, 6)), *options))
        for layout in (torch.Tensor.contiguous, channels_last, lambda x: x[:, :, ::2, 1:])
        for options in (([2, 2],), ([3, 2], [2, 1], [1, 1]), ([2, 2], [2, 1], [0, 0], [2, 2]), ([2, 2], [2, 2], [0, 0], [1, 1], True))
    ),
    Case(aten.max_pool2d_with_indices.default, lambda r: (r(3, 5, 6), [3, 3], [1, 1], [1, 1])),
    Case(aten.max_pool2d_with_indices.default, lambda r: (TIES, [2, 2], [1, 1])),
    Case(aten.max_pool3d_with_indices.default, lambda r: (r(2, 3, 4, 5, 6), [2, 3, 2], [1, 2, 2])),
    Case(aten.max_pool3d_with_indices.default, lambda r: (r(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d), [2, 2, 2])),
    Case(aten.adaptive_max_pool2d.default, lambda r: (r(2, 3, 7, 5), [3, 2])),
    Case(aten.adaptive_max_pool2d.default, lambda r: (channels_last(r(2, 3, 7, 5)), [3, 2])),
    Case(aten.adaptive_max_pool2d.default, lambda r: (r(3, 7, 5), [1, 5])),
    Case(aten.adaptive_max_pool3d.default, lambda r: (r(2, 3, 4, 5, 6), [3, 2, 6])),
    *(
        Case(aten.avg_pool2d.default, lambda r, layout=layout, options=options: (layout(r(2, 3, 7, 6)), *options))
        for layout in (torch.Tensor.contiguous, channels_last, lambda x: x.transpose(2, 3))
        for options in (
            ([2, 2],),
            ([3, 2], [2, 1], [1, 1], False, False),
            ([2, 2], [2, 2], [1, 1], True),
            ([3, 3], [], [0, 0], False, True, 5),
        )
    ),
    Case(aten.avg_pool2d.default, lambda r: (r(3, 5, 6), [2, 3])),
    Case(aten.avg_pool3d.default, lambda r: (r(2, 3, 4, 5, 6), [2, 3, 2], [1, 2, 2], [1, 0, 1], True, False)),
    Case(aten.avg_pool3d.default, lambda r: (r(3, 4, 5, 6), [2, 2, 2])),
    Case(aten._adaptive_avg_pool2d.default, lambda r: (r(2, 3, 7, 5), [3, 2])),
    Case(aten._adaptive_avg_pool2d.default, lambda r: (channels_last(r(2, 3, 7, 5)), [3, 2])),
    Case(aten._adaptive_avg_pool2d.default, lambda r: (r(3, 7, 5), [2, 8])),
    Case(aten._adaptive_avg_pool3d.default, lambda r: (r(2, 3, 4, 5, 6), [3, 2, 6])),
    Case(aten._adaptive_avg_pool3d.default, lambda r: (r(3, 4, 5, 6), [1, 1, 1])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("func", [aten.max_pool2d_with_indices.default, aten.avg_pool2d.default])
def test_channels_last_stays(func: object) -> None:
    call, part = part_of(func, channels_last(torch.randn(2, 3, 6, 6)), [3, 3], [2, 2], [1, 1])
    strides = call.inputs[0].stride(), call.outputs[0].stride()
    (y_t, *_), _ = part.tangent([channels_last(torch.randn(2, 3, 6, 6)).unsqueeze(0)])
    (x_gt,) = part.backward([torch.randn_like(y_t)], None, ())
    assert (x_gt.stride()[1:], y_t.stride()[1:]) == strides


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_module_is_covered(dim: int) -> None:
    """What the modules call below autograd has a rule, in one dimension too."""
    x = torch.randn(2, 3, *(6,) * dim, requires_grad=True)
    for name, args in (("MaxPool", 2), ("AvgPool", 2), ("AdaptiveAvgPool", 4), ("AdaptiveAvgPool", 1), ("AdaptiveMaxPool", 4)):
        pool = getattr(nn, f"{name}{dim}d")(args)
        lin = linearised(lambda pool=pool: (None, pool(x).square().sum()), [x])
        assert lin.islands == ()
