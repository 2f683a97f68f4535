"""Products by torch's own double backward, for models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def spread(model: nn.Module) -> None:
    """Initial weights are so small that the curvature would be that of a linear model; a LoRA's second factor is zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.2)


def double_backward(model: nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, V H) for two vectors, by torch's own double backward."""
    params = [p for p in model.parameters() if p.requires_grad]
    V = torch.randn(2, sum(p.numel() for p in params), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        flat = _flat(torch.autograd.grad(loss(), params, create_graph=True, **options))
        rows = [_flat(torch.autograd.grad(flat @ v, params, retain_graph=True, **options)) for v in V]
    return V, torch.stack(rows).detach()


def _flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def gap(A: torch.Tensor, B: torch.Tensor) -> float:
    """||A - B|| / ||B||."""
    return float((A - B).norm() / B.norm())
