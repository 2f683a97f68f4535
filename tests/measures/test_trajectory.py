"""Directional, critical and batch sharpness, gradient overlap and the edge, against dense Hessians and literal loops in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import ArgumentTypeError, InputError, ShapeError
from tests.cases import net
from tests.measures.test_sharpness import least_squares
from tests.oracles.dense import dense_hessian, doubled
from tests.unchanged import unchanged


def gradient_of(case: Any, batch: Any) -> torch.Tensor:
    model, batch = copy.deepcopy(case.model).double(), doubled(batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(case.objective(model, batch), trained, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_residual", "vit_block", "tied_language_model", "regression", "frozen"])
def test_directional_is_its_definition(name: str, dtype: torch.dtype, room: float) -> None:
    case = net(name, dtype)
    H, g = dense_hessian(case.model, case.objective, case.whole), gradient_of(case, case.whole)
    u = torch.randn(len(g), generator=torch.Generator().manual_seed(1)).double()
    along = fastsharp.directional_sharpness(case.model, case.batches, case.loss_fn, direction=u.to(dtype))
    assert float(along) == pytest.approx(float(u @ H @ u / (u @ u)), rel=room, abs=room * float(H.norm()))
    assert along.settings["slope"] == pytest.approx(float(g @ u / u.norm()), rel=room, abs=room * float(g.norm()))
    own = fastsharp.directional_sharpness(case.model, case.batches, case.loss_fn)
    assert float(own) == pytest.approx(float(g @ H @ g / (g @ g)), rel=10 * room, abs=room * float(H.norm()))


def test_a_direction_may_be_named_or_listed() -> None:
    case = net("mlp_tanh")
    parts = [torch.randn_like(p) for p in case.model.parameters()]
    named = {name: part for (name, _), part in zip(case.model.named_parameters(), parts, strict=True)}
    flat = torch.cat([p.reshape(-1) for p in parts])
    values = {float(fastsharp.directional_sharpness(case.model, case.batches, case.loss_fn, direction=d)) for d in (flat, parts, named)}
    assert len(values) == 1


@pytest.mark.parametrize("given", [None, "other"])
def test_critical_of_a_quadratic_is_known(given: str | None) -> None:
    model, batch, A, b = least_squares()
    u = b + 0.3 * b.norm() * torch.randn(len(b), generator=torch.Generator().manual_seed(0)).double() / len(b) ** 0.5 if given else b
    exact = float(u @ A @ u / (b @ u))
    for start in (None, 1e-4, 1e3):
        found = fastsharp.critical_sharpness(model, [batch], F.mse_loss, direction=u if given else None, rtol=1e-6, start=start)
        assert float(found) == pytest.approx(exact, rel=1e-6)
    form = fastsharp.directional_sharpness(model, [batch], F.mse_loss, direction=u if given else None, form="critical")
    assert float(form) == pytest.approx(exact, rel=1e-10)
    near = fastsharp.critical_sharpness(model, [batch], F.mse_loss, direction=u if given else None, start=1.5 / exact)
    assert near.settings["losses"] <= 9


def test_critical_brackets_the_step_where_the_loss_rises() -> None:
    case = net("mlp_tanh")
    found = fastsharp.critical_sharpness(case.model, case.batches, case.loss_fn, rtol=1e-3)
    eta, g = 2 / float(found), gradient_of(case, case.whole)
    theta = torch.cat([p.detach().reshape(-1) for p in case.model.parameters()])

    def change(step: float) -> float:
        moved = copy.deepcopy(case.model)
        torch.nn.utils.vector_to_parameters(theta - step * g, moved.parameters())
        with torch.no_grad():
            return float(case.objective(moved, case.whole) - case.objective(case.model, case.whole))

    assert change(eta * 0.998) < 0 < change(eta * 1.002)


def test_a_loss_that_never_rises_has_critical_sharpness_zero() -> None:
    model, batch = nn.Linear(3, 1, bias=False).double(), (torch.ones(4, 3).double(), torch.zeros(4, 1).double())
    found = fastsharp.critical_sharpness(model, [batch], lambda f, t: (f - t).mean(), reduction="mean")
    assert float(found) == 0.0 and any("never rises" in note for note in found.notes)


# "noise" where mini-batches have equal token counts alone: elsewhere their mean gradient is not that of the whole
@pytest.mark.parametrize(
    ("name", "kind"), [("mlp_tanh", "batch"), ("mlp_tanh", "noise"), ("tied_language_model", "batch"), ("hf_style", "batch")]
)
def test_batch_sharpness_is_its_definition(name: str, kind: str) -> None:
    case = net(name)
    top, size, mean = [], [], 0
    H = dense_hessian(case.model, case.objective, case.whole)
    for batch in case.batches:
        g = gradient_of(case, batch)
        top.append(float(g @ (dense_hessian(case.model, case.objective, batch) if kind == "batch" else H) @ g))
        size.append(float(g @ g))
        mean = mean + g / len(case.batches)
    exact = sum(top) / sum(size) if kind == "batch" else sum(top) / len(top) / float(mean @ mean)
    found = fastsharp.batch_sharpness(case.model, case.batches, case.loss_fn, kind=kind)
    assert float(found) == pytest.approx(exact, rel=1e-10)
    assert found.samples == len(case.batches) and found.stderr > 0


def test_batch_sharpness_interval_covers_the_value_over_all_samples() -> None:
    """A linear model: mini-batches drawn anew, the truth from very many of them."""
    model, _, _, _ = least_squares()
    g = torch.Generator().manual_seed(0)

    def batches(count: int) -> list[Any]:
        x = torch.randn(count, 8, 6, generator=g).double()
        return [(rows, rows.sum(1, keepdim=True) + torch.randn(8, 1, generator=g).double()) for rows in x]

    truth = float(fastsharp.batch_sharpness(model, batches(4000), F.mse_loss, preflight="off"))
    hits = 0
    for _ in range(100):
        low, high = fastsharp.batch_sharpness(model, batches(40), F.mse_loss, preflight="off").interval
        hits += low <= truth <= high
    assert hits >= 85  # binomial(100, 0.93) is below 85 once in 800; a ratio of means is a little short of 95 %


def test_overlap_is_the_share_in_the_top_space() -> None:
    case = net("mlp_tanh")
    pairs = fastsharp.lanczos(case.model, case.batches, case.loss_fn, k=4, method="dense")
    g = gradient_of(case, case.whole)
    exact = float((pairs.eigenvectors.double() @ g).square().sum() / (g @ g))
    found = fastsharp.gradient_overlap(case.model, case.batches, case.loss_fn, pairs=pairs)
    assert float(found) == pytest.approx(exact, rel=1e-10) and 0 < exact < 1
    every = fastsharp.lanczos(case.model, case.batches, case.loss_fn, k=pairs.eigenvectors.shape[1], method="dense")
    assert float(fastsharp.gradient_overlap(case.model, case.batches, case.loss_fn, pairs=every)) == pytest.approx(1.0)
    with torch.no_grad():
        case.model[0].weight.mul_(1.1)
    assert any("other weights" in note for note in fastsharp.gradient_overlap(case.model, case.batches, case.loss_fn, pairs=pairs).notes)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_edge_is_where_descent_on_a_quadratic_turns_unstable(momentum: float, nesterov: bool) -> None:
    def final(ratio: float) -> float:
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=momentum, nesterov=nesterov)
        value = ratio / fastsharp.edge_of_stability(1.0, optimizer)  # the eigenvalue at this ratio of the edge
        for _ in range(3000):
            optimizer.zero_grad()
            (value * p.square() / 2).sum().backward()
            optimizer.step()
        return abs(float(p.detach()))

    assert final(0.99) < 1e-3 < 1e3 < final(1.01)
    assert fastsharp.edge_of_stability(20.0, 0.1) == pytest.approx(1.0)


def test_nothing_of_the_model_changes() -> None:
    case = net("cnn_batchnorm_eval", torch.float32)
    with unchanged(case.model):
        fastsharp.directional_sharpness(case.model, case.batches, case.loss_fn)
        fastsharp.critical_sharpness(case.model, case.batches, case.loss_fn)
        fastsharp.batch_sharpness(case.model, case.batches, case.loss_fn)


def test_bad_input() -> None:
    case = net("mlp_tanh")
    args = (case.model, case.batches, case.loss_fn)
    n = sum(p.numel() for p in case.model.parameters())
    for call in (fastsharp.directional_sharpness, fastsharp.critical_sharpness):
        with pytest.raises(InputError, match="zero"):
            call(*args, direction=torch.zeros(n))
        with pytest.raises(ShapeError, match=f"expected {n}"):
            call(*args, direction=torch.ones(3))
        with pytest.raises(InputError, match="NaN"):
            call(*args, direction=torch.full((n,), math.nan))
        with pytest.raises(InputError, match="no entry for"):
            call(*args, direction={})
        with pytest.raises(ShapeError, match="the part of"):
            call(*args, direction={name: torch.ones(2) for name, _ in case.model.named_parameters()})
        with pytest.raises(ArgumentTypeError, match="float"):
            call(*args, direction=1.0)
        with pytest.raises(ArgumentTypeError, match="Tensor"):
            call(torch.eye(3), case.batches)
    with pytest.raises(InputError, match="descent"):
        fastsharp.critical_sharpness(*args, direction=-gradient_of(case, case.whole))
    with pytest.raises(InputError, match="rtol"):
        fastsharp.critical_sharpness(*args, rtol=0.0)
    with pytest.raises(InputError, match="start"):
        fastsharp.critical_sharpness(*args, start=-1.0)
    with pytest.raises(InputError, match="form"):
        fastsharp.directional_sharpness(*args, form="both")
    with pytest.raises(InputError, match="kind"):
        fastsharp.batch_sharpness(*args, kind="both")
    with pytest.raises(InputError, match="mini-batch"):
        fastsharp.batch_sharpness(case.model, [case.whole], case.loss_fn)
    with pytest.raises(ArgumentTypeError, match="Eigenpairs"):
        fastsharp.gradient_overlap(*args, pairs=torch.eye(3))
    other = fastsharp.lanczos(torch.eye(5), k=2)
    with pytest.raises(InputError, match="vectors of 5"):
        fastsharp.gradient_overlap(*args, pairs=other)
    with pytest.raises(InputError, match="AdamW"):
        fastsharp.edge_of_stability(1.0, torch.optim.AdamW(case.model.parameters()))
    with pytest.raises(InputError, match="2 different"):
        groups = [{"params": [case.model[0].weight], "lr": 0.1}, {"params": [case.model[0].bias], "lr": 0.2}]
        fastsharp.edge_of_stability(1.0, torch.optim.SGD(groups))
    with pytest.raises(InputError, match="lr="):
        fastsharp.edge_of_stability(1.0, 0.0)
