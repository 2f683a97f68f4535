"""Which loss is meant and what a batch weighs: every form against the dense Hessian of torch's own mean over one big batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import (
    ArgumentTypeError,
    BatchFormatError,
    InputError,
    LabelError,
    LossShapeError,
    OutputFormatError,
    ReductionUnknownError,
)
from fastsharp.losses import Loss
from tests.cases import SAMPLES, Net, TiedLM, cut, net
from tests.oracles.dense import dense_hessian
from tests.unchanged import check_message, refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
Objective = Callable[[Callable[..., Any], Any], torch.Tensor]


@pytest.fixture
def n() -> Net:
    return net("mlp_tanh")


def assert_hessian(model: nn.Module, batches: Any, loss_fn: Any, objective: Objective, whole: Any, **options: Any) -> fastsharp.Hessian:
    """fastsharp's matrix over the batches is the oracle's of `objective` on the whole."""
    H = dense_hessian(model, objective, whole)
    with unchanged(model):
        operator = fastsharp.Hessian(model, batches, loss_fn, **options)
        A = operator.apply(torch.eye(operator.n, dtype=operator.dtype))
    assert float((A - H).norm()) <= 1e-11 * float(H.norm())
    return operator


def plain(call: Callable[..., Any], batch: Any) -> torch.Tensor:
    return F.cross_entropy(call(batch[0]), batch[1])


# --- what the reduction is ---------------------------------------------------------------------------------------------


def custom_mean(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -F.log_softmax(o, 1).gather(1, t[:, None]).mean()


def custom_sum(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -F.log_softmax(o, 1).gather(1, t[:, None]).sum()


class Custom(nn.Module):
    """A criterion of the user's own, with a state but without a word on its reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(0.0))

    def forward(self, o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(o + self.shift, t)


def defaulted(o: torch.Tensor, t: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    return F.cross_entropy(o, t, reduction=reduction)


FORMS: dict[str, tuple[Any, str]] = {
    "module, mean": (nn.CrossEntropyLoss(), "mean"),
    "module, sum": (nn.CrossEntropyLoss(reduction="sum"), "sum"),
    "function": (F.cross_entropy, "mean"),
    "partial, sum": (functools.partial(F.cross_entropy, reduction="sum"), "sum"),
    "partial, smoothing of zero": (functools.partial(F.cross_entropy, label_smoothing=0.0), "mean"),
    "partial of a module": (functools.partial(nn.CrossEntropyLoss(reduction="sum")), "sum"),
    "default of the signature": (defaulted, "sum"),
    "own mean": (custom_mean, "mean"),
    "own sum": (custom_sum, "sum"),
    "lambda": (lambda o, t: F.cross_entropy(o, t), "mean"),
    "own module": (Custom(), "mean"),
    "None": (None, "mean"),
}


@pytest.mark.parametrize(("loss_fn", "reduction"), FORMS.values(), ids=FORMS.keys())
def test_the_reduction_is_read_or_found(n, loss_fn, reduction):
    factor = SAMPLES if reduction == "sum" else 1
    operator = assert_hessian(n.model, n.batches, loss_fn, lambda call, b: factor * plain(call, b), n.whole)
    assert operator.objective.reduction == reduction
    found = loss_fn in (custom_mean, custom_sum) or isinstance(loss_fn, Custom) or getattr(loss_fn, "__name__", "") == "<lambda>"
    assert any("found by halving" in note for note in operator.notes) == found


def test_a_stated_reduction_wins(n):
    assert_hessian(n.model, n.batches, custom_mean, plain, n.whole, reduction="mean")
    summed = assert_hessian(n.model, n.batches, custom_sum, lambda call, b: SAMPLES * plain(call, b), n.whole, reduction="sum")
    assert any("plain sum" in note for note in summed.notes)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda o, t: F.cross_entropy(o, t).sqrt(),
        lambda o, t: F.cross_entropy(o, t) + o.std(),
        lambda o, t: F.cross_entropy(o, t, reduction="sum") / 7 ** (1 / len(o)),
        lambda o, t: (o * 0.0).sum(),
    ],
    ids=["root", "looks across the batch", "odd scale", "zero"],
)
def test_an_undecided_reduction_is_refused(n, loss_fn):
    with refuses(ReductionUnknownError, "<lambda>", "reduction='mean'", "(sum, count)", model=n.model):
        fastsharp.lanczos(n.model, n.batches, loss_fn)


def test_a_batch_of_one_cannot_be_halved(n):
    x, y = n.whole
    with refuses(ReductionUnknownError, "custom_mean", "halved", "reduction='mean'", model=n.model):
        fastsharp.lanczos(n.model, [(x[:1], y[:1]), (x[1:], y[1:])], custom_mean)


def test_sum_and_count(n):
    def loss(o: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return custom_sum(o, t), torch.tensor(len(t))

    assert_hessian(n.model, n.batches, loss, plain, n.whole)
    assert_hessian(n.model, n.batches, lambda o, t: (custom_sum(o, t), len(t)), plain, n.whole, reduction="mean")


# --- what a batch weighs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [lambda **k: nn.CrossEntropyLoss(**k), lambda **k: functools.partial(F.cross_entropy, **k)], ids=["module", "partial"]
)
@pytest.mark.parametrize(
    "options", [{"weight": WEIGHTS}, {"ignore_index": 2}, {"weight": WEIGHTS, "ignore_index": 0}, {"label_smoothing": 0.1}], ids=str
)
def test_class_weights_and_ignored_labels_over_uneven_batches(n, form, options):
    def objective(call: Callable[..., Any], b: Any) -> torch.Tensor:
        return F.cross_entropy(call(b[0]), b[1], **options)

    assert_hessian(n.model, n.batches, form(**options), objective, n.whole)


def test_negative_log_likelihood_of_log_probabilities(n):
    model = nn.Sequential(n.model, nn.LogSoftmax(1))
    assert_hessian(model, n.batches, nn.NLLLoss(weight=WEIGHTS), lambda call, b: F.nll_loss(call(b[0]), b[1], WEIGHTS), n.whole)


def test_probabilities_as_targets(n):
    x, _ = n.whole
    soft = torch.softmax(torch.randn(SAMPLES, 3, dtype=torch.float64), 1)
    assert_hessian(n.model, cut((x, soft)), nn.CrossEntropyLoss(), plain, (x, soft))


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), None], ids=["given", "none"])
def test_tokens_are_what_is_averaged(loss_fn):
    n = net("tied_language_model")
    assert_hessian(n.model, n.batches, loss_fn, plain, n.whole)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), F.cross_entropy, None], ids=["module", "function", "none"])
def test_a_batch_whose_labels_are_all_ignored_weighs_nothing(loss_fn):
    n = net("tied_language_model")
    tokens, labels = n.whole[0], n.whole[1].clone()
    labels[:4] = -100
    assert_hessian(n.model, cut((tokens, labels)), loss_fn, plain, (tokens, labels))


def test_all_batches_ignored_is_refused():
    n = net("tied_language_model")
    with refuses(InputError, "add up to 0", "ignored", model=n.model):
        fastsharp.lanczos(n.model, [(n.whole[0], torch.full_like(n.whole[1], -100))], None)


@pytest.mark.parametrize(
    "loss_fn", [nn.MSELoss(), F.mse_loss, nn.SmoothL1Loss(beta=0.3), nn.HuberLoss()], ids=["module", "function", "smooth", "huber"]
)
def test_regression_losses(loss_fn):
    n = net("regression")
    assert_hessian(n.model, n.batches, loss_fn, lambda call, b: loss_fn(call(b[0]), b[1]), n.whole)


def test_kl_divergence_by_batchmean(n):
    x, _ = n.whole
    soft = torch.softmax(torch.randn(SAMPLES, 3, dtype=torch.float64), 1)
    model = nn.Sequential(n.model, nn.LogSoftmax(1))
    assert_hessian(
        model,
        cut((x, soft)),
        nn.KLDivLoss(reduction="batchmean"),
        lambda call, b: F.kl_div(call(b[0]), b[1], reduction="batchmean"),
        (x, soft),
    )


# --- how the model is called and where the loss is ---------------------------------------------------------------------


def test_a_model_s_own_loss_weighs_its_tokens():
    n = net("hf_style")
    operator = assert_hessian(n.model, n.batches, None, n.objective, n.whole)
    assert any("own .loss" in note for note in operator.notes)
    labels = n.whole["labels"].clone()
    labels[:4] = -100  # torch's mean of nothing is NaN; the batch must weigh nothing
    whole = {**n.whole, "labels": labels}
    assert_hessian(n.model, cut(whole), None, n.objective, whole)


class TinyForCausalLM(nn.Module):
    """Predicts each token from those before it and shifts the labels itself, as transformers' causal models do."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = TiedLM()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.lm(input_ids).transpose(1, 2)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_a_causal_model_counts_all_labels_but_the_first():
    tokens = torch.randint(9, (SAMPLES, 5))
    labels = tokens.clone()
    labels[:4, 2:] = -100
    labels[-2:, 0] = -100  # the first label is not predicted and must not count
    whole = {"input_ids": tokens, "labels": labels}
    model = TinyForCausalLM().double()
    assert_hessian(model, cut(whole), None, lambda call, b: call(**b).loss, whole)


def test_logits_of_an_output_are_found_for_torch_s_losses():
    n = net("mlp_tanh")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = n.model

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(x), loss=None)

    for loss_fn in (nn.CrossEntropyLoss(), F.cross_entropy, None):
        assert_hessian(Wrapped(), n.batches, loss_fn, lambda call, b: F.cross_entropy(call(b[0]).logits, b[1]), n.whole)


def test_a_loss_of_the_whole_batch(n):
    def contrast(model: nn.Module, batch: Any) -> torch.Tensor:
        z = model(batch[0])
        return (z @ z.T).square().mean()

    def objective(call: Callable[..., Any], whole: Any) -> torch.Tensor:
        return sum(len(b[0]) * (call(b[0]) @ call(b[0]).T).square().mean() for b in cut(whole)) / SAMPLES

    assert_hessian(n.model, n.batches, fastsharp.batch_loss(contrast), objective, n.whole, reduction="mean")
    with refuses(ReductionUnknownError, "batch_loss(contrast)", "reduction='mean'", model=n.model):
        fastsharp.lanczos(n.model, n.batches, fastsharp.batch_loss(contrast))


def test_a_loss_of_the_whole_batch_that_is_a_mean_over_examples(n):
    loss = fastsharp.batch_loss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert_hessian(n.model, n.batches, loss, plain, n.whole)
    counted = fastsharp.batch_loss(lambda model, batch: (custom_sum(model(batch[0]), batch[1]), len(batch[1])))
    assert_hessian(n.model, n.batches, counted, plain, n.whole)


def test_dict_batches_go_by_name_where_the_model_takes_the_names():
    n = net("two_inputs")
    (a, b), y = n.whole
    for extra in ("labels", "label", "targets", "target", "y"):
        whole = {"b": b, extra: y, "a": a}
        assert_hessian(n.model, cut(whole), nn.CrossEntropyLoss(), lambda call, w: F.cross_entropy(call(w["a"], w["b"]), y), whole)
    pairs = [({"b": b[:4], "a": a[:4]}, y[:4]), ({"b": b[4:], "a": a[4:]}, y[4:])]
    assert_hessian(n.model, pairs, nn.CrossEntropyLoss(), n.objective, n.whole)


def test_a_dict_with_one_input_needs_no_name(n):
    x, y = n.whole
    whole = {"pixels": x, "labels": y}
    for loss_fn in (nn.CrossEntropyLoss(), None):
        assert_hessian(n.model, cut(whole), loss_fn, lambda call, w: F.cross_entropy(call(w["pixels"]), w["labels"]), whole)


def test_dict_batches_that_fit_nothing():
    n = net("two_inputs")
    (a, b), y = n.whole
    with refuses(BatchFormatError, "TwoInputs.forward takes a, b", "'left'", "batch_loss", model=n.model):
        fastsharp.lanczos(n.model, {"left": a, "right": b, "y": y}, nn.CrossEntropyLoss())
    with refuses(BatchFormatError, "'a', 'b'", "'labels'", model=n.model):
        fastsharp.lanczos(n.model, {"a": a, "b": b}, nn.CrossEntropyLoss())


def test_labels_are_checked_with_class_weights_and_ignored_ones(n):
    x, y = n.whole
    y = y.clone()
    y[5] = -100
    assert_hessian(n.model, cut((x, y)), nn.CrossEntropyLoss(), plain, (x, y))
    with refuses(LabelError, "label -100", "position (1,)", model=n.model):
        fastsharp.lanczos(n.model, cut((x, y)), nn.CrossEntropyLoss(ignore_index=7))


def test_cross_entropy_of_an_output_without_classes(n):
    with refuses(OutputFormatError, "(12,)", "(N, classes, ...)", model=n.model):
        fastsharp.lanczos(
            nn.Sequential(n.model, nn.Flatten(0)), [(n.whole[0][:4], torch.zeros(4, dtype=torch.long))], nn.CrossEntropyLoss()
        )


def test_what_batch_loss_takes():
    with pytest.raises(ArgumentTypeError) as caught:
        fastsharp.batch_loss(3)
    check_message(caught.value, "int", "fn(model, batch)")


def test_a_value_is_checked_to_be_a_scalar(n):
    for bad in (lambda o, t: [1.0], lambda o, t: None, lambda o, t: (o, t, t)):
        with pytest.raises(LossShapeError) as caught:
            Loss(n.model, bad, "mean")(n.batches[0])
        check_message(caught.value, "expected a scalar tensor")
    value = Loss(n.model, lambda o, t: o.mean().reshape(1, 1), "mean")(n.batches[0])
    assert value.loss.shape == () and value.count == value.scale == 4.0 and math.isfinite(float(value.loss.detach()))
