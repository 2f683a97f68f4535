"""Soft rank and TIC against dense Gauss-Newton matrices and loops over single gradients in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import ArgumentTypeError, InputError
from tests.cases import net
from tests.oracles.dense import doubled
from tests.unchanged import unchanged

NETS = ("mlp_tanh", "cnn_residual", "regression")


def dense(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, C) by loops over samples: J_i' H_i J_i and g_i g_i', averaged."""
    model, (x, y) = copy.deepcopy(case.model).double(), doubled(case.whole)
    params = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in params)
    G, C = torch.zeros(n, n).double(), torch.zeros(n, n).double()

    def flat(t: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(t, params, retain_graph=True, allow_unused=True, materialize_grads=True)]
        )

    for xi, yi in zip(x, y, strict=True):
        out = model(xi[None])[0]
        J = torch.stack([flat(o) for o in out])

        def loss(z: torch.Tensor, yi: torch.Tensor = yi) -> torch.Tensor:
            return F.cross_entropy(z[None], yi[None]) if not yi.is_floating_point() else F.mse_loss(z, yi)

        G += J.T @ torch.func.hessian(loss)(out.detach()) @ J / len(x)
        g = flat(loss(out))
        C += torch.outer(g, g) / len(x)
    return G, C


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_against_dense_matrices(name: str, damping: float) -> None:
    case = net(name)
    G, C = dense(case)
    rank = fastsharp.soft_rank(case.model, case.batches, case.loss_fn, damping=damping)
    c = rank.settings["c"]
    assert c == pytest.approx(damping * float(torch.linalg.eigvalsh(G)[-1]), rel=0.02)
    exact = float(torch.trace(torch.linalg.solve(G + c * torch.eye(len(G)).double(), G)))
    assert float(rank) == pytest.approx(exact, rel=0.15)
    found = fastsharp.tic(case.model, case.batches, case.loss_fn, damping=damping, probes=400)
    exact = float(torch.trace(torch.linalg.solve(G + found.settings["c"] * torch.eye(len(G)).double(), C)))
    assert abs(float(found) - exact) <= 4 * found.stderr
    assert found.stderr <= 0.15 * exact and found.converged


def test_the_interval_of_tic_covers() -> None:
    case = net("mlp_tanh", torch.float32)
    G, C = dense(case)
    hits = 0
    for seed in range(100):
        found = fastsharp.tic(case.model, [case.whole], case.loss_fn, damping=0.1, probes=12, seed=seed, preflight="off")
        exact = float(torch.trace(torch.linalg.solve(G + found.settings["c"] * torch.eye(len(G)).double(), C)))
        low, high = found.interval
        hits += low <= exact <= high
    assert 86 <= hits <= 100  # chi-square samples are skewed: a little short of 95 %


def test_nothing_changes_and_bad_input_is_named() -> None:
    case = net("mlp_tanh", torch.float32)
    args = (case.model, case.batches, case.loss_fn)
    with unchanged(case.model):
        fastsharp.tic(*args, probes=6)
        fastsharp.soft_rank(*args, rtol=0.3)
    for call in (fastsharp.tic, fastsharp.soft_rank):
        with pytest.raises(InputError, match="damping=0"):
            call(*args, damping=0)
        with pytest.raises(ArgumentTypeError, match="Tensor"):
            call(torch.eye(3), case.batches)
    with pytest.raises(InputError, match="probes=2"):
        fastsharp.tic(*args, probes=2)
    with pytest.raises(InputError, match="rtol"):
        fastsharp.tic(*args, rtol=2.0)
    zero = nn.Linear(6, 3)
    with pytest.raises(InputError, match="no scale"):
        fastsharp.soft_rank(
            zero, [(torch.zeros(4, 6), torch.zeros(4, 3))], lambda f, t: (f - t).sum() * 0.0 + f.sum() * 1e-3, reduction="mean"
        )
