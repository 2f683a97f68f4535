"""Products by an explicit double backward in plain torch, and small problems to compare them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsharp
from tests.unchanged import unchanged

KINDS = {"hessian": fastsharp.Hessian, "ggn": fastsharp.GGN}
Batches = list[tuple[Tensor, Tensor]]
GATE = 1e-11  # two exact algorithms in float64: rounding, and what a product loses where terms cancel

backends = pytest.mark.parametrize("backend", ["auto", "rop", "autograd"])
kinds = pytest.mark.parametrize("kind", KINDS)


def explicit(kind: str, model: Callable[[Tensor], Tensor], params: Iterable[Tensor], batches: Batches, V: Tensor) -> Tensor:
    """Rows V times the matrix of the mean cross-entropy over all samples, in plain torch: H v = d (g'v), or J' H_L J in full."""
    params, total = list(params), torch.zeros_like(V)
    samples = sum(len(y) for _, y in batches)
    for x, y in (batch for batch in batches if len(batch[1])):
        z = model(x)
        loss = F.cross_entropy(z, y, reduction="sum") / samples
        if kind == "hessian":
            flat = _flat(torch.autograd.grad(loss, params, create_graph=True))
            total += torch.stack([_flat(torch.autograd.grad(flat @ v, params, retain_graph=True)) for v in V])
        else:
            (slope,) = torch.autograd.grad(loss, z, create_graph=True)
            J = torch.stack([_flat(torch.autograd.grad(e, params, retain_graph=True)) for e in z.flatten()])
            L = torch.stack([torch.autograd.grad(g, z, retain_graph=True)[0].flatten() for g in slope.flatten()])
            total += V @ J.T @ L @ J
    return total.detach()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def error(operator: fastsharp.Hessian | fastsharp.GGN, want: Callable[[Tensor], Tensor]) -> float:
    """||AV - want|| / ||want|| for three rows, over two products: of fresh parts, and of kept ones."""
    V = torch.randn(3, operator.n, dtype=operator.dtype, generator=torch.Generator().manual_seed(1))
    exact = want(V)
    return max(float((operator.apply(V) - exact).norm() / exact.norm()) for _ in range(2))


def check(kind: str, backend: str, model: nn.Module, batches: Batches, loss: Any = None, gate: float = GATE) -> Any:
    operator = KINDS[kind](model, batches, loss or nn.CrossEntropyLoss(), backend=backend)
    with unchanged(model, *(t for batch in batches for t in batch)):
        assert error(operator, lambda V: explicit(kind, model, model.parameters(), batches, V)) <= gate
    return operator


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(), *pooled, nn.Linear(12, 3)).double().eval()
    net[1].running_mean += 0.1
    return net


def images(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, height, width, dtype=torch.float64), torch.arange(n) % 3


def small() -> tuple[nn.Sequential, Batches]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3
    return model, list(zip(x.split(4), y.split(4), strict=True))
