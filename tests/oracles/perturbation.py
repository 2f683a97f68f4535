"""Sharpness by its definitions, in float64: one perturbed copy of the model after another, one big batch, torch's own mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.oracles.dense import doubled

Objective = Callable[[Callable[..., Any], Any], torch.Tensor]


def changes(model: nn.Module, objective: Objective, batch: Any, deltas: torch.Tensor) -> torch.Tensor:
    """L(theta + delta_k) - L(theta) (K,) for rows delta_k in the order of the trainable parameters."""
    batch = doubled(batch)
    base = copy.deepcopy(model).double()
    found = []
    with torch.no_grad():
        start = objective(base, batch)
        for delta in deltas.double():
            moved, at = copy.deepcopy(base), 0
            for p in (p for p in moved.parameters() if p.requires_grad):
                p.add_(delta[at : at + p.numel()].view_as(p))
                at += p.numel()
            found.append(objective(moved, batch) - start)
    return torch.stack(found)


def standard_normals(n: int, count: int, seed: int) -> torch.Tensor:
    """The directions that a seed stands for: count vectors of n float32 normals, one after the other."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(n, generator=g) for _ in range(count)])


def published_sam(model: nn.Module, loader: Any, loss_fn: Any, z: torch.Tensor, rho: float) -> float:
    """The published estimator: each loss is the unweighted mean over a pass of the loader as it comes, shuffled anew every time."""

    def loss(net: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([loss_fn(net(x), y) for x, y in loader]).mean()

    start = loss(model)
    total = 0.0
    for direction in z:
        moved, at = copy.deepcopy(model), 0
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(rho * direction[at : at + p.numel()].view_as(p) / len(direction) ** 0.5)
                at += p.numel()
        total += float((loss(moved) - start).abs()) / rho
    return total / len(z)


def largest_on_ball(A: torch.Tensor, b: torch.Tensor, rho: float) -> float:
    """max of d'Ad / 2 + b'd over ||d|| <= rho for positive semidefinite A, by the secular equation."""
    values, vectors = torch.linalg.eigh(A)
    c = vectors.T @ b
    low, high = float(values[-1]), float(values[-1] + b.norm() / rho + 1.0)
    for _ in range(200):  # d = (mu - A)^-1 b has norm rho for one mu above the spectrum
        mu = (low + high) / 2
        low, high = (mu, high) if float((c / (mu - values)).norm()) > rho else (low, mu)
    d = c / (high - values)
    return float(d @ (values * d) / 2 + c @ d)
