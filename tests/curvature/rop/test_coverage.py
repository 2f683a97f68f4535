"""Operations of the usual networks, each in a small function of a parameter: none of them is left to autograd.

The names are those that torch.export gives for torchvision's resnet, vgg, mobilenet, efficientnet, densenet, convnext, vit and swin
and for a causal language model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.curvature.rop.engine import linearised, same

Tensor = torch.Tensor

W = torch.randn(4, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([True, False, True, True])
IDS = torch.tensor([[0, 3, 1], [2, 2, 1]])


def _filled(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1].fill_(0.5)
    return y


# of a (2, 4, 6, 6) parameter
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, W.flatten()[:18].view(3, 6), W.flatten()[:3]),
    "conv2d": lambda x: F.conv2d(x, W, padding=1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "flatten": lambda x: x.flatten(1),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(4).double(), 2 * torch.ones(4).double(), W[0, :, 0, 0], W[1, :, 0, 0]),
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x * 1),
    "add": lambda x: x + 2 * x,
    "add_": lambda x: (x * 1).add_(x, alpha=2),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "mul": lambda x: x * x,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout_": lambda x: F.dropout(x * 1, 0.5, training=False, inplace=True),
    "cat": lambda x: torch.cat([x, 2 * x], 1),
    "layer_norm": lambda x: F.layer_norm(x, (6,), W.flatten()[:6], W.flatten()[6:12]),
    "gelu": F.gelu,
    "reshape": lambda x: x.transpose(1, 2).reshape(2, -1),
    "transpose": lambda x: x.transpose(1, 2),
    "view": lambda x: x.view(8, -1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "select": lambda x: x[:, 1],
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, 2 * x, is_causal=True),
    "embedding": lambda x: F.embedding(IDS, x.flatten(0, 2)),
    "getitem": lambda x: x.split(2, dim=1)[1],
    "hardswish_": lambda x: F.hardswish(x * 1, inplace=True),
    "hardsigmoid": F.hardsigmoid,
    "silu_": lambda x: F.silu(x * 1, inplace=True),
    "sigmoid": torch.sigmoid,
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, 2, 1),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1, -1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "squeeze": lambda x: x[:1].squeeze(0),
    "index": lambda x: x[:, IDS],
    "pad": lambda x: F.pad(x, (0, 1, 2, 0)),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "softmax": lambda x: x.softmax(-1),
    "alias": lambda x: torch.ops.aten.alias(x),
    "roll": lambda x: torch.roll(x, (-1, 2), (2, 3)),
    "new_zeros": lambda x: x + x.new_zeros(6),
    "lift_fresh_copy": lambda x: x * torch.tensor(2.0, dtype=torch.float64),
    "slice": lambda x: x[:, 1:3],
    "fill_": _filled,
    "sub": lambda x: x - x.flip(0),
    "ne": lambda x: x * (x.detach() != 0),
    "masked_fill": lambda x: x.masked_fill(MASK[:, None, None], -1.0),
    "eq": lambda x: x * (MASK == 1)[:, None, None],
    "rms_norm": lambda x: F.rms_norm(x, (6,), W.flatten()[:6]),
    "unbind": lambda x: x.unbind(1)[2],
    "zeros": lambda x: x + torch.zeros(6, dtype=torch.float64),
}

# the same function where torch has no second derivative of the call
BY_AUTOGRAD: dict[str, Callable[[Tensor], Tensor]] = {"hardsigmoid": lambda x: F.relu6(x + 3) / 6}


@pytest.mark.parametrize("name", OPS)
def test_has_a_rule(name: str) -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    v = torch.randn(1, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    with sdpa_kernel(SDPBackend.MATH):
        loss = BY_AUTOGRAD.get(name, OPS[name])(x).pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (want,) = torch.autograd.grad(gradient, x, v[0])
    lin = linearised(lambda: (None, OPS[name](x).pow(3).sum()), [x])
    got = torch.zeros_like(v)
    lin.product([v], [got])
    assert lin.islands == ()
    same(got[0], want, 1e-12)
