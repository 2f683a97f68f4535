"""Corners of what a loss may be: reductions behind wrappers, masks while a reduction is looked for, warnings of its own."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import InputError, LabelError
from fastsharp.losses import Loss
from tests.cases import cut
from tests.oracles.dense import dense_hessian


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - F.one_hot(target, 3)).square().sum(1)


@pytest.mark.parametrize(
    ("loss_fn", "reduction"),
    [
        (functools.partial(nn.CrossEntropyLoss(reduction="sum")), "sum"),
        (functools.partial(F.cross_entropy, label_smoothing=0.1), "mean"),
        (functools.partial(functools.partial(F.mse_loss), reduction="sum"), "sum"),
        (lambda output, target, reduction="sum": F.mse_loss(output, target, reduction=reduction), "sum"),
        (nn.KLDivLoss(reduction="batchmean"), "mean"),
    ],
)
def test_a_reduction_is_read_behind_wrappers_and_defaults(model, loss_fn, reduction):
    assert Loss(model, loss_fn, "auto").reduction == reduction


def test_options_are_found_in_a_module_behind_a_partial(model, batch):
    loss_fn = functools.partial(nn.CrossEntropyLoss(ignore_index=1))
    operator = fastsharp.Hessian(model, cut(batch, (5, 1, 5)), loss_fn)
    H = dense_hessian(model, lambda call, b: loss_fn(call(b[0]), b[1]), batch)
    assert float((operator.apply(torch.eye(operator.n, dtype=torch.float64)) - H).norm()) <= 1e-10 * float(H.norm())


@pytest.mark.parametrize("own", [torch.mean, torch.sum])
def test_halving_is_not_misled_by_dropout_masks(batch, own):
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    operator = fastsharp.Hessian(model, [batch], lambda o, t: own(squared(o, t)), dropout="fixed-masks")
    assert operator.objective.reduction == own.__name__


@pytest.mark.parametrize("own", [torch.mean, torch.sum])
def test_halving_is_not_misled_by_frozen_batch_statistics(batch, own):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    operator = fastsharp.Hessian(model, [batch], lambda o, t: own(squared(o, t)), bn="frozen-batch-stats")
    assert operator.objective.reduction == own.__name__


def test_a_warning_of_the_loss_that_is_not_about_shapes_stays_what_it_is(model, batch):
    def talks(output, target):
        warnings.warn("deprecated", UserWarning, stacklevel=1)
        return F.cross_entropy(output, target)

    with pytest.raises(UserWarning, match="deprecated"):  # the tests turn warnings into errors
        fastsharp.Hessian(model, [batch], talks, reduction="mean")
    with pytest.warns(UserWarning, match="deprecated"):
        fastsharp.Hessian(model, [batch], talks, reduction="mean")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_labels_of_every_integer_type_are_checked(model, batch, dtype):
    x, y = batch
    v = torch.ones(53, dtype=torch.float64)
    assert torch.equal(fastsharp.Hessian(model, [(x, y.to(dtype))]) @ v, fastsharp.Hessian(model, [(x, y)]) @ v)
    with pytest.raises(LabelError, match="label 7 at position"):
        fastsharp.Hessian(model, [(x, (y + 5 * (y == 2)).to(dtype))])


def test_a_batch_loss_is_trusted_with_another_grouping_only_where_halving_showed_it_is_a_sum_over_examples(model, batch):
    def mean_ce(m, b):
        return F.cross_entropy(m(b[0]), b[1])

    found = fastsharp.Hessian(model, [batch], fastsharp.batch_loss(mean_ce))
    given = fastsharp.Hessian(model, [batch], fastsharp.batch_loss(mean_ce), reduction="mean")
    plain = fastsharp.Hessian(model, [batch])
    assert [h.objective.batches.ordered for h in (found, given, plain)] == [False, True, False]


def test_counts_that_are_not_finite_or_not_positive_are_refused(model, batch):
    for count in (0.0, float("nan"), float("inf"), -3.0):
        operator = fastsharp.Hessian(model, [batch], lambda o, t, count=count: (F.cross_entropy(o, t), count), reduction="mean")
        with pytest.raises(InputError, match="counts of the loss add up to"):
            operator @ torch.ones(operator.n, dtype=torch.float64)
