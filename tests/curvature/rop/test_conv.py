"""Rules of convolutions against torch's double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.curvature.rop.check import check_rule, part_of

aten = torch.ops.aten


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def options(
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, transposed: bool = False, output: Any = 0, groups: int = 1, d: int = 2
) -> Any:
    return [*([v] * d if isinstance(v, int) else list(v) for v in (stride, padding, dilation)), transposed, [output] * d, groups]


# input, weight, channels out, options
CASES: dict[str, tuple[torch.Tensor, torch.Tensor, int, Any]] = {
    "2d": (rand(3, 4, 7, 6), rand(5, 4, 3, 3), 5, options(padding=1)),
    "2d one pixel": (rand(2, 4, 1, 1), rand(5, 4, 1, 1), 5, options()),
    "2d stride": (rand(2, 4, 7, 6), rand(5, 4, 3, 2), 5, options(stride=(2, 3), padding=(1, 0))),
    "2d dilation": (rand(2, 3, 9, 8), rand(5, 3, 3, 2), 5, options(dilation=2, padding=2)),
    "2d groups": (rand(2, 6, 5, 5), rand(4, 3, 3, 3), 4, options(groups=2, padding=1)),
    "depthwise": (rand(2, 6, 5, 5), rand(12, 1, 3, 3), 12, options(groups=6, padding=1)),
    "weight outweighs": (rand(2, 8, 2, 2), rand(16, 8, 3, 3), 16, options(padding=1)),
    "weight outweighs, stride": (rand(2, 8, 4, 4), rand(32, 8, 3, 3), 32, options(padding=1, stride=2)),
    "transposed": (rand(2, 4, 4, 3), rand(4, 5, 3, 3), 5, options(stride=2, padding=1, output=1, transposed=True)),
    "transposed groups": (rand(2, 4, 4, 3), rand(4, 3, 3, 3), 6, options(stride=2, groups=2, transposed=True)),
    "1d": (rand(2, 4, 9), rand(5, 4, 3), 5, options(padding=1, d=1)),
    "1d groups": (rand(2, 4, 9), rand(6, 2, 4), 6, options(stride=2, groups=2, dilation=2, padding=3, d=1)),
    "1d transposed": (rand(2, 4, 5), rand(4, 5, 3), 5, options(stride=2, transposed=True, d=1)),
    "3d": (rand(2, 3, 5, 4, 6), rand(4, 3, 2, 3, 3), 4, options(padding=1, stride=2, d=3)),
    "channels last": (rand(3, 4, 7, 6).to(memory_format=torch.channels_last), rand(5, 4, 3, 3), 5, options(padding=1)),
    "strided input": (rand(3, 4, 7, 12)[..., ::2], rand(5, 4, 3, 6)[..., ::2], 5, options(padding=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_active_subset(name: str) -> None:
    x, weight, channels, rest = CASES[name]
    for b in (1, 3):
        for active in ([0], [1], [0, 1]):
            check_rule(aten.convolution.default, x, weight, None, *rest, active=active, b=b)
        for active in ([2], [0, 2], [1, 2], [0, 1, 2]):
            check_rule(aten.convolution.default, x, weight, rand(channels), *rest, active=active, b=b)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_adds_to_its_place_in_the_flat_result(name: str, b: int) -> None:
    x, weight, channels, rest = CASES[name]
    args = [x, weight, rand(channels)]
    call, part = part_of(aten.convolution.default, *args, *rest)
    part.adjoint([rand(*call.outputs[0].shape)])
    y_gt = [rand(b, *call.outputs[0].shape)]
    _, kept = part.tangent([rand(b, *a.shape) for a in args])
    plain = part.backward(y_gt, kept, [None] * 3)
    flat = torch.full((b, weight.numel() + channels), 0.25, dtype=torch.float64)
    into = [None, flat[:, : weight.numel()].view(b, *weight.shape), flat[:, weight.numel() :]]
    x_gt, *rest_gt = part.backward(y_gt, kept, into)
    assert rest_gt == [None, None]
    torch.testing.assert_close(x_gt, plain[0])
    for got, want in zip(into[1:], plain[1:], strict=True):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want + 0.25, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["2d", "weight outweighs", "depthwise"])
def test_without_an_adjoint_only_the_second_term_is_left(name: str) -> None:
    x, weight, _, rest = CASES[name]
    call, part = part_of(aten.convolution.default, x, weight, None, *rest)
    y_g = rand(*call.outputs[0].shape)
    part.adjoint([y_g])
    x_t, w_t = rand(2, *x.shape), rand(2, *weight.shape)
    _, kept = part.tangent([x_t, w_t])
    x_gt, w_gt = part.backward([None], kept, [None, None])
    assert x_gt is not None and w_gt is not None
    for k in range(2):
        torch.testing.assert_close(x_gt[k], aten.convolution_backward.default(y_g, x, w_t[k], None, *rest, [True, False, False])[0])
        torch.testing.assert_close(w_gt[k], aten.convolution_backward.default(y_g, x_t[k], weight, None, *rest, [False, True, False])[1])
