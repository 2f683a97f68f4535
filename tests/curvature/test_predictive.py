"""The distribution behind a loss: its curvature, its draws, and the interval that is stated from them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import hessian

import fastsharp
from fastsharp.curvature.network_output import network_output
from fastsharp.curvature.predictive import recognised
from fastsharp.curvature.scores import Vectors
from fastsharp.errors import ArgumentTypeError, InputError, NondeterministicOperatorError, ShapeError
from fastsharp.objective import Objective

pytestmark = pytest.mark.usefixtures("one_thread")
C, K, T, N = 4, 3, 2, 6


class Table(nn.Module):
    """The outputs are the parameters themselves, one row for each example: J = 1."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(*shape, dtype=torch.float64))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.z[index]


def classes(*shape: int) -> torch.Tensor:
    y = torch.randint(C, shape)
    y[1], y[-1] = -100, 0
    return y


CE = nn.CrossEntropyLoss
WEIGHT = torch.tensor([1.0, 0.2, 3.0, 0.7], dtype=torch.float64)
LOSSES: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "cross_entropy": ((N, C), lambda: classes(N), CE()),
    "function": ((N, C), lambda: classes(N), F.cross_entropy),
    "nothing": ((N, C), lambda: classes(N), None),
    "sum": ((N, C), lambda: classes(N), CE(reduction="sum")),
    "weights": ((N, C), lambda: classes(N), CE(weight=WEIGHT)),
    "partial": (
        (N, C),
        lambda: classes(N).abs() % C,
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=0, label_smoothing=0.2),
    ),
    "smoothed_and_weighted": ((N, C), lambda: classes(N), CE(weight=WEIGHT, label_smoothing=0.3)),
    "probabilities": ((N, C), lambda: torch.rand(N, C, dtype=torch.float64), CE(weight=WEIGHT, label_smoothing=0.1)),
    "positions": ((N, C, T), lambda: classes(N, T), CE()),
    "own_code": ((N, T, C), lambda: classes(N, T), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())),
    "own_sum": ((N, C), lambda: classes(N), lambda z, y: (F.cross_entropy(z, y, reduction="sum"), (y >= 0).sum())),
    "square": ((N, K), lambda: torch.randn(N, K, dtype=torch.float64), nn.MSELoss()),
    "square_sum": ((N, K), lambda: torch.randn(N, K, dtype=torch.float64), nn.MSELoss(reduction="sum")),
    "own_square": ((N, K), lambda: torch.randn(N, K, dtype=torch.float64), lambda z, y: (z - y).square().mean()),
    "logits": ((N, K), lambda: torch.rand(N, K, dtype=torch.float64), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 5.0, 0.3]))),
    "weighted_logits": ((N, K), lambda: torch.rand(N, K, dtype=torch.float64), nn.BCEWithLogitsLoss(weight=torch.rand(N, K))),
}


def made(name: str) -> tuple[Table, Any, Any]:
    torch.manual_seed(1)
    shape, target, loss = LOSSES[name]
    return Table(*shape), (torch.arange(N), target()), loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_curvature_of_the_distribution_is_the_losss(name):
    model, batch, loss = made(name)
    objective = Objective(model, [batch], loss, reduction="auto" if loss is None or hasattr(loss, "reduction") else "mean")
    value = objective.evaluate(0, batch)
    output = network_output(value)
    found = recognised(objective, "fisher")(objective.loss, value, output.detach(), batch)
    assert found is not None

    def plain(z: torch.Tensor) -> torch.Tensor:
        result = (loss or F.cross_entropy)(z, batch[1])
        return result[0] if isinstance(result, tuple) else result

    H = hessian(plain)(output.detach()).reshape(output.numel(), -1)
    own = torch.stack([found.curvature(u.reshape(output.shape)).reshape(-1) for u in torch.eye(len(H), dtype=torch.float64)])
    assert float((own - H).norm()) <= 1e-14 * float(H.norm())

    # draws: E r r' = H_L, each entry within five standard errors of a mean over 4,000
    scores = found.draw(4000, torch.Generator().manual_seed(0))
    for u in torch.randn(4, *output.shape, dtype=torch.float64):
        q = scores.quadratics(u)
        assert abs(float(q.mean()) - float((u * found.curvature(u)).sum())) <= 5 * float(q.std()) / len(q) ** 0.5
    # written out one by one they are the same
    R = found.draw(2, torch.Generator().manual_seed(0)).explicit(output.detach()).flatten(1)
    q = found.draw(2, torch.Generator().manual_seed(0)).quadratics(u)
    assert float(q.sum()) == pytest.approx(float((R @ u.reshape(-1)).square().sum()), rel=1e-12)


def test_scores_written_out_carry_their_weight():
    held, u = Vectors(torch.randn(N, K, 2, dtype=torch.float64), 3.0), torch.randn(N, K, dtype=torch.float64)
    R = held.explicit(u).flatten(1)
    assert len(R) == held.count
    assert float((R @ u.reshape(-1)).square().sum()) == pytest.approx(float(held.quadratics(u).sum()), rel=1e-12)


class CausalLMHeadModel(nn.Module):
    """As transformers': labels are those of the next token."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        self.embed, self.head, self.extra = nn.Embedding(7, 5), nn.Linear(5, 7), extra

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        z = self.head(torch.tanh(self.embed(input_ids).cumsum(1)))
        loss = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": z, "loss": loss + self.extra * z.square().mean()}


def test_labels_of_the_next_token():
    torch.manual_seed(0)
    tokens = torch.randint(7, (9, 5))
    labels = tokens.masked_fill(torch.rand(9, 5) < 0.3, -100)
    model, batch = CausalLMHeadModel().double(), {"input_ids": tokens, "labels": labels}
    G, V = fastsharp.GGN(model, [batch]), torch.randn(2, 77, dtype=torch.float64)
    many = fastsharp.Fisher(model, [batch], mc_samples=20_000)
    assert float((many.apply(V) - G.apply(V)).norm()) <= 0.02 * float(G.apply(V).norm())
    with pytest.raises(InputError, match="none is known"):
        fastsharp.Fisher(CausalLMHeadModel(0.5).double(), [batch])


def test_models_of_transformers_shift_their_labels():
    transformers = pytest.importorskip("transformers", reason="a causal model of the extra `models`")
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, loss_type="ForCausalLMLoss")).double().eval()
    tokens = torch.randint(31, (6, 8))
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(torch.rand(6, 8) < 0.3, -100)}
    F2000, G = fastsharp.Fisher(model, [batch], mc_samples=2000), fastsharp.GGN(model, [batch])
    v = torch.randn(G.n, dtype=torch.float64)
    estimate = F2000.interval(v, confidence=0.9999)
    assert estimate.interval[0] <= float(v @ (G @ v)) <= estimate.interval[1]
    for kind in ("fisher", "empirical-fisher"):
        assert fastsharp.lanczos(model, [batch], operator=kind, k=1).settings["preflight"]["reference"] <= 1e-12


def classifier(seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3)


@pytest.mark.parametrize("loss", ["cross_entropy", "square", "logits"])
def test_the_interval_holds_the_limit_as_often_as_it_says(loss):
    model, (x, y) = classifier()
    target = y if loss == "cross_entropy" else F.one_hot(y).double()
    fn = {"cross_entropy": nn.CrossEntropyLoss(), "square": nn.MSELoss(), "logits": nn.BCEWithLogitsLoss()}[loss]
    batches = [(x[:23], target[:23]), (x[23:], target[23:])]
    G = fastsharp.GGN(model, batches, fn)
    v = torch.randn(G.n, dtype=torch.float64)
    limit = float(v @ (G @ v))
    found = [fastsharp.Fisher(model, batches, fn, mc_samples=8, seed=seed).interval(v) for seed in range(200)]
    within = [abs(e.value - limit) / (e.interval[1] - e.value) for e in found]
    coverage, halved = (sum(w <= most for w in within) / 200 for most in (1.0, 0.5))
    assert 0.90 <= coverage <= 0.99
    assert halved < 0.85  # so that a standard error half as large would be seen


def test_the_interval_belongs_to_the_matrix():
    model, batch = classifier()
    F8 = fastsharp.Fisher(model, [batch], mc_samples=8)
    v = torch.randn(F8.n, dtype=torch.float64)
    estimate = F8.interval(v, confidence=0.9)
    assert float(estimate) == pytest.approx(float(v @ (F8 @ v)), rel=1e-12)
    assert estimate.samples == 8 and estimate.confidence == 0.9 and estimate.interval[0] < float(estimate) < estimate.interval[1]
    many = fastsharp.Fisher(model, [batch], mc_samples=800).interval(v)
    assert 5 < (estimate.stderr / many.stderr) < 20  # sqrt(100)
    with pytest.raises(InputError, match="mc_samples >= 4"):
        fastsharp.Fisher(model, [batch], mc_samples=2).interval(v)
    with pytest.raises(InputError, match="kind='mc'"):
        fastsharp.Fisher(model, [batch], kind="empirical").interval(v)
    with pytest.raises(InputError, match=r"confidence is 1\.5"):
        F8.interval(v, confidence=1.5)
    with pytest.raises(ShapeError, match="interval: v has shape"):
        F8.interval(v[None])


def test_one_matrix_from_one_seed():
    model, (x, y) = classifier()
    batches = [(x[:23], y[:23]), (x[23:], y[23:])]
    first = fastsharp.Fisher(model, batches, mc_samples=2, seed=3)
    V = torch.randn(2, first.n, dtype=torch.float64)
    FV = first.apply(V)
    assert torch.equal(first.apply(V), FV)
    first.release()
    assert torch.equal(first.apply(V), FV)
    state = torch.get_rng_state()
    assert torch.equal(fastsharp.Fisher(model, batches, mc_samples=2, seed=3, memory=0).apply(V), FV)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(fastsharp.Fisher(model, batches, mc_samples=2, seed=4).apply(V), FV)
    with torch.no_grad():
        model[0].weight += 0.1
    assert torch.equal(first.refresh().apply(V), fastsharp.Fisher(model, batches, mc_samples=2, seed=3).apply(V))


class Turned:
    """The same batches in every pass, the samples within them in another order."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([(x.roll(self.passes, 0), y.roll(self.passes, 0)) for x, y in self.batches])


def test_draws_go_by_place_so_that_a_turned_batch_is_refused():
    model, batch = classifier()
    v = torch.randn(51, dtype=torch.float64)
    assert fastsharp.Fisher(model, Turned([batch]), kind="empirical", memory=0) @ v is not None
    with pytest.raises(NondeterministicOperatorError, match="in another order"):
        fastsharp.Fisher(model, Turned([batch]), memory=0) @ v


def test_labels_follow_the_probabilities_at_their_ends():
    """Rows of certain and impossible classes, in float32: no class of probability zero is ever drawn."""
    model = Table(3, 4).float()
    with torch.no_grad():
        model.z.copy_(torch.tensor([[200.0, 0, 0, 0], [0, 0, 0, 200.0], [0, -200.0, 0, -200.0]]))
    objective = Objective(model, [(torch.arange(3), torch.tensor([1, 2, 1]))])
    batch = objective.batches.first()
    value = objective.evaluate(0, batch)
    found = recognised(objective, "fisher")(objective.loss, value, value.output.detach(), batch)
    labels = found.draw(2000, torch.Generator().manual_seed(0)).label
    assert set(labels[0].tolist()) == {0} and set(labels[1].tolist()) == {3} and set(labels[2].tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.NLLLoss(), "classes"),
        (nn.HuberLoss(), "numbers"),
        (lambda z, y: F.multi_margin_loss(z, y), "classes"),
        (lambda z, y: F.cross_entropy(2 * z, y), "classes"),
        (lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), "classes"),
        (lambda z, y: F.cross_entropy(z, y) + 0.01 * z.square().mean(), "classes"),
    ],
    ids=["nll", "huber", "margin", "temperature", "hidden_weights", "penalised"],
)
def test_losses_without_a_known_distribution_are_refused(loss, target):
    model, (x, y) = classifier()
    y = y if target == "classes" else torch.randn(40, 3, dtype=torch.float64)
    with pytest.raises(InputError, match="none is known for this loss") as caught:
        fastsharp.Fisher(model, [(x, y)], loss, reduction="mean")
    assert "empirical-fisher" in str(caught.value) and len(str(caught.value).splitlines()) <= 4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "true"}, InputError, "kind='true' is none of 'mc', 'empirical'"),
        ({"mc_samples": 0}, InputError, "mc_samples is 0, expected at least 1"),
        ({"mc_samples": 2.0}, ArgumentTypeError, "mc_samples is a float"),
        ({"mc_samples": True}, ArgumentTypeError, "mc_samples is a bool"),
        ({"mc_samples": 3, "kind": "empirical"}, InputError, "draws nothing"),
        ({"loss_fn": fastsharp.batch_loss(lambda m, b: m(b[0]).sum())}, InputError, "operator='fisher' splits the loss"),
    ],
)
def test_wrong_arguments(options, error, words):
    model, batch = classifier()
    with pytest.raises(error, match=words):
        fastsharp.Fisher(model, [batch], **options)
