"""Whole networks: one product of the engine against torch's double backward in float64, with no call left to autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsharp

Tensor = torch.Tensor


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cells = kind(5, 7, num_layers=2, batch_first=True)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cells(x)[0][:, -1])
        return y


class TwiceDifferentiable(nn.Module):
    """Hardsigmoid by calls of which torch has the second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3) / 6


def by_autograd(model: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        rows = v.split([p.numel() for p in params])
        products = torch.autograd.grad(grads, params, [row.view_as(p) for row, p in zip(rows, params, strict=True)], materialize_grads=True)
    return torch.cat([h.reshape(-1) for h in products])


def check(model: nn.Module, x: Tensor, y: Tensor, twin: nn.Module | None = None) -> None:
    """A product sums up to 1e4 terms a layer over some 50 layers: 1e-11 leaves four digits above their rounding."""
    n = sum(p.numel() for p in model.parameters())
    v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = by_autograd(twin or model, x, y, v)
    H = fastsharp.Hessian(model, [(x, y)], nn.CrossEntropyLoss(), backend="rop")
    got = H @ v
    assert float((got - want).norm()) <= 1e-11 * float(want.norm())
    assert not [note for note in H.notes if "double backward" in note]


class Language(nn.Module):
    """Causal attention, the embedding tied to the output."""

    def __init__(self, vocabulary: int = 37, d: int = 16, length: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Parameter(0.1 * torch.randn(length, d))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.qkv, self.project = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.project(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        y: Tensor = self.head(self.norms[2](x)).transpose(1, 2)
        return y


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind: Any) -> None:
    torch.manual_seed(0)
    check(Recurrent(kind).double().eval(), torch.randn(2, 6, 5).double(), torch.tensor([0, 3]))


def test_causal_language_model() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 37, (2, 12))
    check(Language().double().eval(), ids, ids.roll(-1, 1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision", reason="the networks are torchvision's").models
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None, num_classes=10).double().eval()
    twin = getattr(models, name)(weights=None, num_classes=10).double().eval()
    twin.load_state_dict(model.state_dict())
    for module in list(twin.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Hardsigmoid):
                setattr(module, child, TwiceDifferentiable())
    check(model, torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 7]), twin)
