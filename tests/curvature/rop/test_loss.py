"""Losses: every reduction, weights, targets that depend on parameters or are ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsharp.curvature.rop.rule import RULES
from fastsharp.curvature.rop.rules import loss
from tests.curvature.rop.check import check_rule, part_of

aten = torch.ops.aten

REDUCTIONS = [loss.NONE, loss.MEAN, loss.SUM]


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _targets(*shape: int, classes: int = 5) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(2))


def _check(func: Any, x: torch.Tensor, z: torch.Tensor, *rest: Any, actives: Any = ((0,), (1,), (0, 1)), **kwargs: Any) -> None:
    for active in actives:
        for b in (1, 3):
            check_rule(func, x, z, *rest, active=active, b=b, **kwargs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("func", "rest"),
    [
        (aten.mse_loss.default, ()),
        (aten.smooth_l1_loss.default, ()),
        (aten.smooth_l1_loss.default, (0.4,)),
        (aten.huber_loss.default, ()),
        (aten.huber_loss.default, (0.7,)),
    ],
)
def test_of_difference(func: Any, rest: tuple[float, ...], reduction: int) -> None:
    _check(func, _random(5, 7), _random(5, 7, seed=2), reduction, *rest)
    _check(func, _random(7, 6).t()[::2], _random(3, 7, seed=2), reduction, *rest)
    _check(func, _random(1)[0], _random(1, seed=2)[0], reduction, *rest)


def test_unequal_shapes_have_no_rule() -> None:
    with pytest.raises(AssertionError, match="refuses"):
        part_of(aten.mse_loss.default, _random(5, 7), _random(7, seed=2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_soft_margin(reduction: int) -> None:
    _check(aten.soft_margin_loss.default, _random(5, 7), _random(5, 7, seed=2).sign(), reduction, actives=((0,),))


def _bce(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor | None, reduction: int) -> torch.Tensor:
    """In elementary calls: the derivatives of torch's own call are off by 1e-12 / (x (1 - x))."""
    y = -(z * x.log() + (1 - z) * torch.log1p(-x))
    y = y if weight is None else y * weight
    return y if reduction == loss.NONE else y.mean() if reduction == loss.MEAN else y.sum()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bce(weighted: bool, reduction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, _bce, loss.bce)
    weight = _random(7, seed=3).abs() if weighted else None
    x, z = (0.02 + 0.96 * torch.sigmoid(_random(5, 7, seed=s)) for s in (1, 2))
    _check(_bce, x, z, weight, reduction)
    torch.testing.assert_close(aten.binary_cross_entropy.default(x, z, weight, reduction), _bce(x, z, weight, reduction))


def test_bce_at_the_ends_is_left_to_torch() -> None:
    x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="refuses"):
        part_of(aten.binary_cross_entropy.default, x, x, active=[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_bce_with_logits(weighted: bool, positive: bool, reduction: int) -> None:
    weight = _random(5, 1, seed=3).abs() if weighted else None
    pos_weight = _random(7, seed=4).abs() if positive else None
    x, z = _random(5, 7), torch.sigmoid(_random(5, 7, seed=2))
    _check(aten.binary_cross_entropy_with_logits.default, x, z, weight, pos_weight, reduction)


def test_bce_with_far_logits_is_finite() -> None:
    x = torch.tensor([-800.0, -90.0, 90.0, 800.0], dtype=torch.float64)
    _, part = part_of(aten.binary_cross_entropy_with_logits.default, x, (x < 0).double(), active=[0])
    y_t, kept = part.tangent([torch.ones(1, 4, dtype=torch.float64), None])
    part.adjoint([torch.ones((), dtype=torch.float64)])
    x_gt = part.backward([torch.ones(1, dtype=torch.float64)], kept, [None, None])
    assert y_t[0] is not None and y_t[0].isfinite().all()
    assert x_gt[0] is not None and x_gt[0].isfinite().all()


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_nll(weighted: bool, reduction: int, b: int) -> None:
    weight = _random(5, seed=3).abs() if weighted else None
    target = _targets(6)
    for ignore in (-100, int(target[2])):
        check_rule(aten.nll_loss_forward.default, _random(6, 5), target, weight, reduction, ignore, active=[0], b=b)
        check_rule(aten.nll_loss_forward.default, _random(5, 12).t()[::2], target, weight, reduction, ignore, active=[0], b=b)
    check_rule(aten.nll_loss_forward.default, _random(5), _targets(), weight, reduction, -100, active=[0], b=b)
    plane = _targets(2, 3, 4)
    plane[0, 1] = -100
    check_rule(aten.nll_loss2d_forward.default, _random(2, 5, 3, 4), plane, weight, reduction, -100, active=[0], b=b)


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_cross_entropy(fused: bool, weighted: bool, reduction: int, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "FUSED_CLASSES", 1 if fused else 1000)
    weight = _random(5, seed=3).abs() if weighted else None
    target = _targets(6)
    for ignore in (-100, int(target[2])):
        check_rule(loss.softmax_ce, _random(6, 5), target, weight, reduction, ignore, active=[0], b=b)
        check_rule(loss.softmax_ce, _random(5, 12).t()[::2], target, weight, reduction, ignore, active=[0], b=b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("func", [aten.nll_loss_forward.default, loss.softmax_ce])
def test_nothing_comes_of_ignored_targets(func: Any, reduction: int) -> None:
    """Where all are ignored the mean is 0/0; its gradient and every product are zero."""
    target = torch.full((4,), -100)
    _, part = part_of(func, _random(4, 5), target, None, reduction, -100, active=[0])
    ones = torch.ones((4,) if reduction == loss.NONE else (), dtype=torch.float64)
    y_t, kept = part.tangent([_random(2, 4, 5), None])
    x_g = part.adjoint([ones, None])
    x_gt = part.backward([ones.expand(2, *ones.shape), None], kept, [None, None])
    for t in (y_t[0], x_g[0], x_gt[0]):
        assert t is not None and not t.any()
