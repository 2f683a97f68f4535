"""The fused convolution, batch norm and ReLU against torch's double backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastsharp.curvature.rop.rules.conv_norm import convolution_norm
from tests.curvature.rop.check import check_rule, part_of
from tests.curvature.rop.test_conv import CASES, rand

GROUPS = [name for name, case in CASES.items() if not case[3][3]]  # not transposed


def arguments(name: str, bias: bool, affine: bool, relu: bool, skip: bool = False) -> list[object]:
    x, weight, channels, rest = CASES[name]
    # dense vectors: torch 2.14 takes a strided running mean for a dense one in the channels-last backward of batch norm
    mean, gamma, beta, var = rand(4, channels)
    own = [0.1 * gamma + 1.0, beta] if affine else [None, None]
    shape = torch.ops.aten.convolution.default(x, weight, None, *rest).shape
    added = rand(*shape) if skip else None
    return [x, weight, rand(channels) if bias else None, *own, mean, var.square() + 0.3, added, 1e-5, relu, *rest]


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("relu", [False, True])
def test_all_inputs_active(name: str, relu: bool, b: int) -> None:
    check_rule(convolution_norm, *arguments(name, True, True, relu), active=[0, 1, 2, 3, 4], b=b)
    check_rule(convolution_norm, *arguments(name, False, True, relu), active=[0, 1, 2, 3], b=b)
    check_rule(convolution_norm, *arguments(name, False, True, relu, True), active=[0, 1, 2, 3, 6], b=b)


@pytest.mark.parametrize("active", [[6], [0, 6], [3, 6], [1, 2, 6], [0, 1]])
@pytest.mark.parametrize("relu", [False, True])
def test_skip(active: list[int], relu: bool) -> None:
    check_rule(convolution_norm, *arguments("2d stride", False, True, relu, True), active=active)


@pytest.mark.parametrize("b", [1, 3])
def test_every_active_subset(b: int) -> None:
    for r, k in ((5, (True, True)), (4, (False, True)), (3, (True, False)), (2, (False, False))):
        for size in range(1, r + 1):
            for active in itertools.combinations(range(r), size):
                check_rule(convolution_norm, *arguments("2d stride", *k, True), active=active, b=b)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", GROUPS)
def test_adds_to_its_place_in_the_flat_result(name: str, b: int) -> None:
    args = arguments(name, True, True, True, True)
    on = [0, 1, 2, 3, 4, 7]
    call, part = part_of(convolution_norm, *args, active=on)
    shapes = [call.inputs[i].shape for i in on]
    part.adjoint([rand(*call.outputs[0].shape)])
    y_gt = [rand(b, *call.outputs[0].shape)]
    x_t = [rand(b, *s) for s in shapes]
    _, kept = part.tangent([*x_t[:5], None, None, x_t[5]])
    plain = part.backward(y_gt, kept, [None] * 8)
    flat = torch.full((b, sum(s.numel() for s in shapes)), 0.25, dtype=torch.float64)
    into = [v.view(b, *s) for v, s in zip(flat.split([s.numel() for s in shapes], 1), shapes, strict=True)]
    assert part.backward(y_gt, kept, [*into[:5], None, None, into[5]]) == [None] * 8
    for got, want in zip(into, [plain[i] for i in on], strict=True):
        assert want is not None
        torch.testing.assert_close(got, want + 0.25, rtol=1e-12, atol=1e-12)
