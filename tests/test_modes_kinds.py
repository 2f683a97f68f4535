"""Every kind of BatchNorm and Dropout under every mode, over uneven batches, against the dense Hessian of the function meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsharp
from fastsharp.errors import ModelModeError, NondeterministicOperatorError
from tests.oracles.dense import dense_hessian
from tests.unchanged import refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = nn.CrossEntropyLoss()
GATE = 1e-10
X = torch.randn(11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(11) % 3
BATCHES = list(zip(X.split(4), Y.split(4), strict=True))


def around(*layers: nn.Module, width: int = 6) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), *layers, nn.Flatten(), nn.Linear(width, 3)).double().train()


def gap(operator: fastsharp.Hessian, H: torch.Tensor) -> float:
    return float((operator.apply(torch.eye(operator.n, dtype=torch.float64)) - H).norm() / H.norm())


def in_eval(model: nn.Module) -> torch.Tensor:
    H = dense_hessian(model.eval(), lambda call, b: F.cross_entropy(call(b[0]), b[1]), (X, Y))
    model.train()
    return H


class Spatial(nn.Module):
    """(N, 6) as (N, 3, 2, 1), through a module for images."""

    def __init__(self, inner: nn.Module, *shape: int) -> None:
        super().__init__()
        self.inner, self.shape = inner, shape or (3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.unflatten(1, self.shape))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(2, 1, dropout=0.4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(1, (3, 2))
        return self.inner(x, x, x, need_weights=False)[0].flatten(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(2, 2, 2, dropout=0.4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.unflatten(1, (3, 2)))[0].flatten(1)


DROPOUTS = {
    "Dropout": lambda: nn.Dropout(0.4),
    "Dropout1d": lambda: Spatial(nn.Dropout1d(0.4), 3, 2),
    "Dropout2d": lambda: Spatial(nn.Dropout2d(0.4)),
    "Dropout3d": lambda: Spatial(nn.Dropout3d(0.4), 3, 2, 1, 1),
    "AlphaDropout": lambda: nn.AlphaDropout(0.4),
    "FeatureAlphaDropout": lambda: Spatial(nn.FeatureAlphaDropout(0.4)),
    "MultiheadAttention": Attention,
    "GRU": Recurrent,
}
dropouts = pytest.mark.parametrize("name", DROPOUTS)


@dropouts
def test_active_dropout_is_refused_by_name(name: str) -> None:
    model = around(DROPOUTS[name]())
    with refuses(ModelModeError, "Dropout is active", "'2", model=model):
        fastsharp.Hessian(model, BATCHES, LOSS)


@dropouts
def test_dropout_eval_is_the_model_without_masks(name: str) -> None:
    model = around(DROPOUTS[name]())
    with unchanged(model):
        operator = fastsharp.Hessian(model, BATCHES, LOSS, dropout="eval")
        assert gap(operator, in_eval(model)) <= GATE
    assert "Dropout: eval" in operator.notes


@dropouts
def test_fixed_masks_are_one_draw_a_batch(name: str) -> None:
    model = around(DROPOUTS[name]())
    with unchanged(model):
        operator = fastsharp.Hessian(model, BATCHES, LOSS, dropout="fixed-masks", seed=4)
        H = torch.zeros(operator.n, operator.n, dtype=torch.float64)
        for i, (x, y) in enumerate(BATCHES):
            H += len(y) / len(Y) * _masked_hessian(model, x, y, operator.objective.mask_seed(i))
        assert gap(operator, H) <= GATE
        assert gap(operator, in_eval(model)) > 1e-3
    assert "Dropout: fixed-masks" in operator.notes


def _masked_hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> torch.Tensor:
    """Double backward of one batch, its masks drawn after seeding torch with `seed`."""
    params = list(model.parameters())
    with torch.random.fork_rng(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(seed)
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True) for e in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def test_dropout_called_as_a_function_is_found_by_the_preflight_and_switched_off_by_name() -> None:
    class Function(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.4, training=self.training)

    model = around(Function())
    with refuses(NondeterministicOperatorError, "dropout called as a function", model=model):
        fastsharp.lanczos(model, BATCHES, LOSS, k=1)
    with unchanged(model):
        assert gap(fastsharp.Hessian(model, BATCHES, LOSS, dropout="eval"), in_eval(model)) <= GATE


NORMS: dict[str, Any] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "BatchNorm2d": lambda: Spatial(nn.BatchNorm2d(3)),
    "momentum None": lambda: nn.BatchNorm1d(6, momentum=None),
    "affine False": lambda: nn.BatchNorm1d(6, affine=False),
    "no running statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
}


def normed(name: str) -> nn.Module:
    model = around(NORMS[name](), nn.Tanh())
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is not None:
                m.running_mean.normal_(0, 0.5)
                m.running_var.uniform_(0.4, 2)
            if m.affine:
                nn.init.normal_(m.weight, 1, 0.3)
    return model


@pytest.mark.parametrize("name", NORMS)
def test_batchnorm_in_train_mode_is_refused_by_name(name: str) -> None:
    model = normed(name)
    with refuses(ModelModeError, "BatchNorm uses batch statistics", "'2", "bn='eval'", model=model):
        fastsharp.Hessian(model, BATCHES, LOSS)


@pytest.mark.parametrize("name", [n for n in NORMS if n != "no running statistics"])
def test_bn_eval_takes_running_statistics(name: str) -> None:
    model = normed(name)
    with unchanged(model):
        assert gap(fastsharp.Hessian(model, BATCHES, LOSS, bn="eval"), in_eval(model)) <= GATE


@pytest.mark.parametrize("name", NORMS)
def test_frozen_batch_stats_are_constants_of_each_batch(name: str) -> None:
    model = normed(name)
    with unchanged(model):
        operator = fastsharp.Hessian(model, BATCHES, LOSS, bn="frozen-batch-stats")
        H = sum(len(y) / len(Y) * _frozen_hessian(model, x, y) for x, y in BATCHES)
        assert gap(operator, H) <= GATE


def _frozen_hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Dense Hessian of one batch with the statistics it has at the present weights written out as constants."""
    before, norm, after = model[:2], model[2], model[3:]
    m = norm.inner if isinstance(norm, Spatial) else norm
    h = before(x).detach()
    h = h.unflatten(1, norm.shape) if isinstance(norm, Spatial) else h
    dims = [d for d in range(h.ndim) if d != 1]
    mean, var = h.mean(dims, keepdim=True), h.var(dims, unbiased=False, keepdim=True)
    params = list(model.parameters())

    z = before(x)
    z = z.unflatten(1, norm.shape) if isinstance(norm, Spatial) else z
    z = (z - mean) / (var + m.eps).sqrt()
    if m.affine:
        shape = [1, -1] + [1] * (z.ndim - 2)
        z = z * m.weight.view(shape) + m.bias.view(shape)
    grads = torch.autograd.grad(F.cross_entropy(after(z), y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True) for e in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def test_instance_norm_that_updates_running_statistics_is_refused_and_eval_is_measured() -> None:
    model = around(Spatial(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), 3, 2))
    for choice in (None, "eval"):
        with refuses(ModelModeError, "running_mean", "model.eval()", model=model):
            fastsharp.Hessian(model, BATCHES, LOSS, bn=choice)
    want = in_eval(model)
    assert gap(fastsharp.Hessian(model.eval(), BATCHES, LOSS), want) <= GATE
    plain = around(Spatial(nn.InstanceNorm1d(3, affine=True), 3, 2))  # the same function in both modes
    H = sum(len(y) / len(Y) * _masked_hessian(plain, x, y, 0) for x, y in BATCHES)  # torch's forward mode is asymmetric here, by 1e-2
    assert gap(fastsharp.Hessian(plain, BATCHES, LOSS), H) <= GATE


class Checkpointed(nn.Module):
    """Runs its inner module again in the backward pass, where modes chosen for the evaluation alone would be gone."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("backend", ["rop", "autograd"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["dropout", "bn"])
def test_modes_hold_in_checkpointed_parts(layer: str, reentrant: bool, backend: str) -> None:
    torch.manual_seed(1)
    mode = {"dropout": "eval"} if layer == "dropout" else {"bn": "frozen-batch-stats"}
    inner = nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4) if layer == "dropout" else nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    )
    plain, model = inner.double().train(), Checkpointed(inner, reentrant).train()
    want = fastsharp.Hessian(plain, BATCHES, LOSS, **mode)
    with unchanged(model):
        got = fastsharp.Hessian(model, BATCHES, LOSS, backend=backend, **mode)
        assert gap(got, want.apply(torch.eye(want.n, dtype=torch.float64))) <= GATE
