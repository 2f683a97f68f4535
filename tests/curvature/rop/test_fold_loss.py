"""Whole nets that end in a loss: Hessian and Gauss-Newton matrix against float64 autograd, and what is folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature.rop.engine import check, dense, gauss_newton, linearised, same

Loss = Callable[[torch.Tensor], torch.Tensor]

TARGET = torch.tensor([0, 3, -100, 2, 1])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
REAL = torch.randn(5, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _model(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), *tail).double()


def _evaluation(model: nn.Module, loss: Loss) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def fn() -> tuple[torch.Tensor, torch.Tensor]:
        z = model(x)
        return z, loss(z)

    return fn


def _check(model: nn.Module, loss: Loss) -> list[str]:
    """Both matrices are right and no call is an island; the calls of the tape."""
    fn, params = _evaluation(model, loss), list(model.parameters())
    lin = check(fn, params, model)
    assert lin.islands == ()
    same(dense(lin, params, gauss=True), gauss_newton(fn, params, loss))
    return [row.op for row in lin.table()]


FOLDED: dict[str, Loss] = {
    "mean": lambda z: F.cross_entropy(z, TARGET),
    "sum": lambda z: F.cross_entropy(z, TARGET, reduction="sum"),
    "weights": lambda z: F.cross_entropy(z, TARGET, WEIGHT),
    "ignored class": lambda z: F.cross_entropy(z[:2], TARGET[:2], ignore_index=3),
    "loss by row": lambda z: F.cross_entropy(z, TARGET, reduction="none").square().sum(),
    "function of the loss": lambda z: F.cross_entropy(z, TARGET, WEIGHT).exp(),
    "with a term in the logits": lambda z: F.cross_entropy(z, TARGET) + 0.1 * z.square().sum(),
    "two losses": lambda z: F.cross_entropy(z, TARGET) + F.cross_entropy(-z, TARGET, reduction="sum"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_cross_entropy_is_one_call(name: str) -> None:
    calls = _check(_model(), FOLDED[name])
    assert "softmax_ce" in calls
    assert not {"_log_softmax.default", "nll_loss_forward.default"} & set(calls)


APART: dict[str, tuple[tuple[nn.Module, ...], Loss]] = {
    "log-probabilities are the output": ((nn.LogSoftmax(-1),), lambda y: F.nll_loss(y, TARGET)),
    "log-probabilities are used twice": ((), lambda z: (lambda y: F.nll_loss(y, TARGET) + y.square().mean())(F.log_softmax(z, 1))),
    "label smoothing": ((), lambda z: F.cross_entropy(z, TARGET, WEIGHT, label_smoothing=0.1)),
    "along the rows": ((), lambda z: F.nll_loss(F.log_softmax(z, 0), TARGET)),
    "pixels": ((), lambda z: F.cross_entropy(z[:4].reshape(1, 4, 2, 2), TARGET[:4].reshape(1, 2, 2))),
    "one row": ((), lambda z: F.nll_loss(F.log_softmax(z[1], -1), TARGET[1])),
}


@pytest.mark.parametrize("name", APART)
def test_log_probabilities_that_stay(name: str) -> None:
    tail, loss = APART[name]
    calls = _check(_model(*tail), loss)
    assert "softmax_ce" not in calls
    assert "_log_softmax.default" in calls


LEAVES: dict[str, Loss] = {
    "mse": lambda z: F.mse_loss(z, REAL),
    "mse of two functions": lambda z: F.mse_loss(z, z.sin(), reduction="sum"),
    "smooth l1": lambda z: F.smooth_l1_loss(z, REAL, beta=0.7),
    "huber": lambda z: F.huber_loss(z, REAL, reduction="sum", delta=0.6),
    "bce with logits": lambda z: F.binary_cross_entropy_with_logits(z, REAL.sigmoid(), pos_weight=WEIGHT),
    "soft margin": lambda z: F.soft_margin_loss(z, REAL.sign()),
}


@pytest.mark.parametrize("name", LEAVES)
def test_losses_of_one_call(name: str) -> None:
    _check(_model(), LEAVES[name])


def test_bce_of_probabilities() -> None:
    """Against the same loss of logits: torch's double backward of this one is off by 1e-12 over the variance."""
    model, target = _model(), REAL.sigmoid()
    params = list(model.parameters())
    lin = linearised(_evaluation(model, lambda z: F.binary_cross_entropy(z.sigmoid(), target)), params, model)
    assert lin.islands == ()
    exact = check(_evaluation(model, lambda z: F.binary_cross_entropy_with_logits(z, target)), params, model)
    same(dense(lin, params), dense(exact, params))
    same(dense(lin, params, gauss=True), dense(exact, params, gauss=True))


class _Attention(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inward, self.out, self.mask = nn.Linear(3, 12), nn.Linear(4, 4), mask
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inward(x).unflatten(1, (3, 2, 2)).permute(1, 2, 0, 3)
        scores = (q @ k.mT).masked_fill(~self.mask, -torch.inf)
        y: torch.Tensor = self.out((torch.ops.aten._safe_softmax.default(scores, -1) @ v).transpose(0, 1).flatten(1))
        return y


@pytest.mark.parametrize("masked_row", [False, True])
def test_attention_through_masked_softmax(masked_row: bool) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[2] &= not masked_row
    model = _Attention(mask)
    fn = _evaluation(model, FOLDED["mean"])
    lin: Any = check(fn, list(model.parameters()), model)
    assert "_safe_softmax.default" in [row.op for row in lin.table() if row.by == "rule"]
