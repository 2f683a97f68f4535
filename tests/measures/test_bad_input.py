"""What measures of single samples refuse: clear errors that name what is missing, with nothing of the caller's changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp import errors
from tests.cases import net
from tests.unchanged import refuses

LABELLED = (fastsharp.margin, fastsharp.prediction_confidence, fastsharp.logit_scale, fastsharp.boundary_tightness)
X, Y = torch.randn(9, 6), torch.arange(9) % 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def closed(*args: Any, **kwargs: Any) -> Any:
    return fastsharp.fisher_rao(*args, form="closed", **kwargs)


@pytest.mark.parametrize("call", [*LABELLED, closed, fastsharp.relative_flatness])
def test_a_loss_that_is_not_cross_entropy(call: Any) -> None:
    model = mlp()
    data = (X, torch.randn(9, 3))
    with refuses(errors.InputError, "cross-entropy", "MSELoss", model=model):
        call(model, data, nn.MSELoss())
    with refuses(errors.InputError, "batch_loss", model=model):
        call(model, (X, Y), fastsharp.batch_loss(lambda m, b: F.cross_entropy(m(b[0]), b[1])), reduction="mean")


@pytest.mark.parametrize("call", [*LABELLED, closed, fastsharp.relative_flatness, fastsharp.fisher_rao])
def test_one_hot_labels(call: Any) -> None:
    model = mlp()
    for hot in (F.one_hot(Y, 3), F.one_hot(Y, 3).float()):
        with refuses(errors.LabelShapeError, "one-hot", "argmax", model=model):
            call(model, (X, hot), nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    "call", [*LABELLED, closed, fastsharp.relative_flatness, fastsharp.fisher_rao, fastsharp.coherence, fastsharp.loss_trace]
)
def test_no_samples_and_no_data(call: Any) -> None:
    model = mlp()
    with refuses(errors.EmptyLoaderError, "no samples", model=model):
        call(model, [])
    with refuses(errors.InputError, "needs data", model=model):
        call(model, None)
    with refuses(errors.ArgumentTypeError, "torch.nn.Module"):
        call(lambda x: x, (X, Y))
    why = "every gradient is zero" if call is fastsharp.coherence else "every label is ignored"
    with refuses(errors.InputError, why, model=model):
        call(model, (X, torch.full((9,), -100)))


def test_no_classifier_head() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) / 2.0

    model = Scaled()
    with refuses(errors.InputError, "no classifier head", "body.2", model=model):
        fastsharp.relative_flatness(model, (X, Y))
    convolutional = nn.Sequential(nn.Conv1d(6, 3, 1), nn.Flatten())
    with refuses(errors.InputError, "no classifier head", "there is none", model=convolutional):
        fastsharp.relative_flatness(convolutional, (X[:, :, None], Y))
    assert fastsharp.relative_flatness(model, (X, Y), layer="body.2").settings["method"] == "products"  # named, it has products
    with refuses(errors.InputError, "not the logits", "products", model=model):
        fastsharp.relative_flatness(model, (X, Y), layer="body.2", method="closed")


def test_several_heads() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    model = Two()

    def loss(out: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out[0], y) + F.cross_entropy(out[1], y)

    with refuses(errors.OutputFormatError, "several heads", model=model):
        fastsharp.fisher_rao(model, (X, Y), loss, reduction="mean")


def test_a_layer_that_cannot_be_meant() -> None:
    model = mlp()
    with refuses(errors.InputError, "no layer 'fc'", "0, 2", model=model):
        fastsharp.relative_flatness(model, (X, Y), layer="fc")
    with refuses(errors.InputError, "ReLU", model=model):
        fastsharp.relative_flatness(model, (X, Y), layer="1")
    with refuses(errors.InputError, "layer='...'", model=model):
        fastsharp.relative_flatness(model, (X, Y), method="products")
    model[0].weight.requires_grad_(False)
    with refuses(errors.InputError, "frozen", "'0'", model=model):
        fastsharp.relative_flatness(model, (X, Y), layer="0")

    shared = nn.Linear(6, 6)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3))
    with refuses(errors.InputError, "2 times", model=twice):
        fastsharp.relative_flatness(twice, (X, Y), layer="0")


def test_arguments() -> None:
    model = mlp()
    for arguments, word in (({"form": "exact"}, "identity"), ({"convention": "liang"}, "petzka"), ({"convention": "petzka"}, "form='closed'"), ({"confidence": 1.0}, "0.95")):  # fmt: skip
        with refuses(errors.InputError, word, model=model):
            fastsharp.fisher_rao(model, (X, Y), **arguments)
    for arguments in ({"kind": "largest"}, {"method": "fast"}, {"normalize": True, "confidence": 0.0}):
        with refuses(errors.InputError, next(iter(arguments if "confidence" not in arguments else ["confidence"])), model=model):
            fastsharp.relative_flatness(model, (X, Y), **arguments)
    with refuses(errors.InputError, "mean over samples", model=model):
        fastsharp.relative_flatness(model, (X, Y), nn.CrossEntropyLoss(reduction="sum"), layer="0")
    with refuses(errors.InputError, "probabilities", model=model):
        fastsharp.input_jacobian(model, (X, Y), of="loss")
    for probes, error in ((1, errors.InputError), (2.5, errors.ArgumentTypeError)):
        with refuses(error, "probes", model=model):
            fastsharp.loss_trace(model, (X, Y), probes=probes)
    n = sum(p.numel() for p in model.parameters())
    for direction, error in (
        (torch.ones(n - 1), errors.ShapeError),
        (torch.zeros(n), errors.InputError),
        ([1.0] * n, errors.ArgumentTypeError),
    ):
        with refuses(error, "direction", model=model):
            fastsharp.sample_curvature(model, (X, Y), direction=direction)


def test_inputs_without_derivative() -> None:
    n = net("tied_language_model", torch.float32)
    for call in (fastsharp.input_jacobian, fastsharp.boundary_tightness):
        with refuses(errors.InputError, "floating-point", "int64", model=n.model):
            call(n.model, n.batches, n.loss_fn)


def test_features_beyond_the_memory_budget() -> None:
    model = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 3))
    data = [(torch.randn(50, 6), torch.randint(3, (50,))) for _ in range(4)]
    with refuses(errors.InputError, "memory=", "normalize=False", model=model):
        fastsharp.relative_flatness(model, data, memory=100_000)
    assert fastsharp.relative_flatness(model, data, memory=100_000, normalize=False).samples == 200


def test_a_loss_that_is_not_finite() -> None:
    model = mlp()
    bad = X.clone()
    bad[3, 1] = float("nan")
    for call in (fastsharp.fisher_rao, fastsharp.relative_flatness, fastsharp.margin):
        with refuses(errors.NonFiniteError, "batch 0", "sample 3", model=model):
            call(model, (bad, Y))


def test_the_samples_of_one_batch_statistic() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    with refuses(errors.ModelModeError, "BatchNorm", model=model):
        fastsharp.fisher_rao(model, (X, Y))
    with refuses(errors.InputError, "one by one", model=model):
        fastsharp.coherence(model, (X, Y), bn="frozen-batch-stats")
    assert fastsharp.fisher_rao(model, (X, Y), bn="eval").value > 0
