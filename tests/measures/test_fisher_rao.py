"""The Fisher-Rao norm: the identity against gradients of single samples, the closed form against the published loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import InputError
from tests.cases import net
from tests.oracles import measures as oracle
from tests.unchanged import unchanged

ROOM = {torch.float64: 1e-11, torch.float32: 1e-5}
CLASSIFIERS = (
    "mlp_tanh",
    "mlp_relu",
    "cnn_batchnorm_eval",
    "cnn_residual",
    "vit_block",
    "transformer_encoder",
    "gru",
    "lstm",
    "unused",
    "deep",
)


def homogeneous(depth: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Any], Any]:
    """A bias-free ReLU network of `depth` weight layers, in uneven batches and as one."""
    g = torch.Generator().manual_seed(depth)
    layers: list[nn.Module] = [nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(45, 7, bias=False)]
    for _ in range(depth - 2):
        layers += [nn.LeakyReLU(0.1), nn.Linear(7, 7, bias=False)]
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (2 / p[0].numel()) ** 0.5)
    x, y = torch.randn(11, 2, 5, 5, generator=g).to(dtype), torch.randint(7, (11,), generator=g)
    return model, [(x[:4], y[:4]), (x[4:9], y[4:9]), (x[9:], y[9:])], (x, y)


@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_identity_is_the_mean_over_gradients_of_single_samples(name: str, dtype: torch.dtype) -> None:
    n = net(name, dtype)
    got = fastsharp.fisher_rao(n.model, n.batches, n.loss_fn)
    along = oracle.gradients(n.model, n.whole, oracle.cross_entropy) @ oracle.parameters(n.model)
    want = float(along.square().mean().sqrt())
    assert abs(got.value - want) <= ROOM[dtype] * want
    assert torch.allclose(got.per_sample, along, rtol=10 * ROOM[dtype], atol=10 * ROOM[dtype] * want)
    assert got.samples == 11 and got.interval[0] <= got.value <= got.interval[1]


def test_identity_of_two_inputs_and_of_a_regression() -> None:
    two = net("two_inputs")
    want = oracle.fisher_rao_norm(two.model, two.whole, oracle.cross_entropy)
    assert math.isclose(fastsharp.fisher_rao(two.model, two.batches, two.loss_fn).value, want, rel_tol=1e-11)
    fit = net("regression")
    want = oracle.fisher_rao_norm(fit.model, fit.whole, F.mse_loss)
    for loss in (nn.MSELoss(), lambda out, t: (out - t).square().mean()):
        assert math.isclose(fastsharp.fisher_rao(fit.model, fit.batches, loss).value, want, rel_tol=1e-11)
    summed = fastsharp.fisher_rao(fit.model, fit.batches, nn.MSELoss(reduction="sum"))  # each sample's own loss is then twice as large
    assert math.isclose(summed.value, 2 * want, rel_tol=1e-11)


def test_tokens_are_samples_and_ignored_ones_are_none() -> None:
    """A language model with tied weights: each label that counts, by a gradient of its own."""
    n = net("tied_language_model")
    x, y = n.whole
    model = oracle.in_double(n.model)
    theta, squares = oracle.parameters(model), []
    for i, t in (y != -100).nonzero().tolist():
        loss = F.cross_entropy(model(x[i : i + 1])[:, :, t], y[i : i + 1, t])
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, list(model.parameters()))])
        squares.append(float(g @ theta) ** 2)
    got = fastsharp.fisher_rao(n.model, n.batches, n.loss_fn)
    assert math.isclose(got.value, math.sqrt(sum(squares) / len(squares)), rel_tol=1e-11)
    assert got.per_sample.numel() == len(squares) and got.samples == 11


def test_a_model_that_computes_its_own_loss() -> None:
    n = net("hf_style")
    got = fastsharp.fisher_rao(n.model, n.batches)
    inner = fastsharp.fisher_rao(n.model, [(b["input_ids"], b["labels"]) for b in n.batches], lambda out, y: F.cross_entropy(out["logits"].flatten(0, 1), y.flatten()))  # fmt: skip
    tokens = [(b["input_ids"], b["labels"]) for b in n.batches]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = n.model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids)["logits"].transpose(1, 2)

    assert math.isclose(got.value, fastsharp.fisher_rao(Logits(), tokens, F.cross_entropy).value, rel_tol=1e-12)
    assert inner.per_sample.numel() == 11  # a loss of one's own has examples, not tokens


class TinyCausalLM(nn.Module):
    """A language model that shifts its labels itself, so near to its start that every layout of them gives nearly the same loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        for p in self.parameters():
            p.data.mul_(1e-2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embed(input_ids).cumsum(1))
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_a_model_that_shifts_its_labels() -> None:
    torch.manual_seed(0)
    model, ids = TinyCausalLM(), torch.randint(9, (6, 5))
    labels = ids.clone()
    labels[:2, 3:] = -100
    batches = [{"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 4), (4, 6))]
    twin, along = oracle.in_double(model), []
    for i, t in (labels[:, 1:] != -100).nonzero().tolist():
        loss = F.cross_entropy(twin(ids[i : i + 1], labels[i : i + 1])["logits"][:, t], labels[i : i + 1, t + 1])
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, list(twin.parameters()))])
        along.append(g @ oracle.parameters(model))
    got = fastsharp.fisher_rao(model, batches)
    assert math.isclose(got.value, float(torch.stack(along).square().mean().sqrt()), rel_tol=1e-5)
    assert got.per_sample.numel() == len(along) and got.samples == 6


def test_class_weights_and_label_smoothing() -> None:
    n = net("mlp_tanh")
    w = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    along = oracle.gradients(n.model, n.whole, oracle.cross_entropy) @ oracle.parameters(n.model)
    of = w[n.whole[1]]
    want = float((of * along.square()).sum() / of.sum()) ** 0.5
    assert math.isclose(fastsharp.fisher_rao(n.model, n.batches, nn.CrossEntropyLoss(weight=w)).value, want, rel_tol=1e-11)
    for loss in (nn.CrossEntropyLoss(label_smoothing=0.2), nn.CrossEntropyLoss(weight=w, label_smoothing=0.2)):
        single = [(x, y) for x, y in zip(*n.whole, strict=True)]
        rows = oracle.gradients(n.model, n.whole, nn.CrossEntropyLoss(label_smoothing=0.2)) @ oracle.parameters(n.model)
        if loss.weight is None:
            got = fastsharp.fisher_rao(n.model, n.batches, loss).value
            assert math.isclose(got, float(rows.square().mean().sqrt()), rel_tol=1e-11)
        else:  # no sum over samples with weights of their own: its slopes are taken as they are, and must still add up
            assert fastsharp.fisher_rao(n.model, n.batches, loss).per_sample.numel() == len(single)


@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_forms_agree_on_homogeneous_networks(depth: int, dtype: torch.dtype) -> None:
    """Bias-free, positively homogeneous: <grad l, theta> = L (<p, f> - f_y), with L the number of weight layers."""
    model, batches, (x, y) = homogeneous(depth, dtype)
    identity, closed = fastsharp.fisher_rao(model, batches), fastsharp.fisher_rao(model, batches, form="closed")
    assert closed.settings["factor"] == depth
    assert abs(identity.value - closed.value) <= ROOM[dtype] * closed.value
    assert torch.allclose(identity.per_sample, closed.per_sample, rtol=100 * ROOM[dtype], atol=ROOM[dtype])
    published = oracle.fisher_rao_as_published(oracle.in_double(model)(x.double()).detach().numpy(), y.numpy(), depth)
    assert abs(closed.value - published) <= ROOM[dtype] * published
    assert not any("closed form" in note for note in closed.notes)


def test_petzka_counts_one_layer_more() -> None:
    model, batches, (x, y) = homogeneous(3)
    got = fastsharp.fisher_rao(model, batches, form="closed", convention="petzka")
    assert math.isclose(got.value, oracle.fisher_rao_as_published(model(x).detach().numpy(), y.numpy(), 4), rel_tol=1e-12)
    assert got.settings["convention"] == "petzka"


def test_the_forms_differ_where_there_are_biases_and_the_result_says_so() -> None:
    n = net("mlp_relu")
    identity = fastsharp.fisher_rao(n.model, n.batches, n.loss_fn)
    closed = fastsharp.fisher_rao(n.model, n.batches, n.loss_fn, form="closed")
    assert abs(identity.value - closed.value) > 0.05 * closed.value
    assert any("biases" in note and "'0.bias'" in note for note in closed.notes)


def test_a_layer_rescaling_leaves_it_a_temperature_does_not() -> None:
    model, batches, _ = homogeneous(3)
    before = fastsharp.fisher_rao(model, batches).value
    with torch.no_grad():
        model[0].weight *= 7.0
        model[3].weight /= 7.0
    assert math.isclose(fastsharp.fisher_rao(model, batches).value, before, rel_tol=1e-12)
    with torch.no_grad():
        model[3].weight *= 2.0
    assert abs(fastsharp.fisher_rao(model, batches).value - before) > 0.1 * before


def test_a_confident_sample_keeps_its_digits_in_float32() -> None:
    """p_y - 1 has none left in float32 where the margin is 20; the sum over the other classes has all."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([20.0, 19.0, 18.5])))
    x, y = torch.eye(3) * torch.tensor([[1.0], [1.1], [1.2]]), torch.arange(3)
    want = oracle.fisher_rao_norm(model, (x, y), oracle.cross_entropy)
    assert 0 < want < 1e-6
    for form in ("identity", "closed"):
        assert math.isclose(fastsharp.fisher_rao(model, (x, y), form=form).value, want, rel_tol=2e-5)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def test_without_forward_mode_two_reverse_passes_give_the_same() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return NoForwardMode.apply(x)

    n = net("mlp_tanh")
    other = nn.Sequential(n.model[0], Own(), n.model[2], Own(), n.model[4])
    for loss in (n.loss_fn, lambda out, y: F.nll_loss(out.log_softmax(1), y)):
        plain, own = (fastsharp.fisher_rao(m, n.batches, loss, reduction="mean") for m in (n.model, other))
        assert math.isclose(plain.value, own.value, rel_tol=1e-12)
        assert any("two reverse passes" in note for note in own.notes) and not any("two reverse" in note for note in plain.notes)


class WrongForwardMode(NoForwardMode):
    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return 0.9 * t


def test_a_wrong_forward_mode_is_noticed() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return WrongForwardMode.apply(x)

    n = net("mlp_tanh")
    other = nn.Sequential(n.model[0], Own(), n.model[2], Own(), n.model[4])
    got = fastsharp.fisher_rao(other, n.batches, n.loss_fn)
    assert math.isclose(got.value, fastsharp.fisher_rao(n.model, n.batches, n.loss_fn).value, rel_tol=1e-12)
    assert any("not that of its gradient" in note for note in got.notes)


def test_the_standard_error_is_that_of_a_root_mean_square() -> None:
    """Against the spread of the value over many draws of 200 samples from one population."""
    g = torch.Generator().manual_seed(3)
    model = nn.Linear(4, 3).double()
    draws = []
    for _ in range(200):
        x, y = torch.randn(200, 4, generator=g, dtype=torch.float64), torch.randint(3, (200,), generator=g)
        draws.append(fastsharp.fisher_rao(model, (x, y), form="closed"))
    spread = float(torch.tensor([d.value for d in draws]).std())
    stated = sum(d.stderr for d in draws) / len(draws)
    assert 0.8 <= stated / spread <= 1.25  # the spread of 200 draws is known to 5 %: four deviations
    truth = sum(d.value for d in draws) / len(draws)
    assert 180 <= sum(d.interval[0] <= truth <= d.interval[1] for d in draws) <= 198


def test_nothing_of_the_callers_changes() -> None:
    for name, form in (("cnn_batchnorm_eval", "identity"), ("lstm", "identity"), ("mlp_relu", "closed")):
        n = net(name, torch.float32)
        with unchanged(n.model, *(t for b in n.batches for t in b)):
            fastsharp.fisher_rao(n.model, n.batches, n.loss_fn, form=form)


def test_a_penalty_on_the_weights_is_no_sum_over_samples() -> None:
    n = net("mlp_tanh")

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, y) + 0.1 * sum(p.square().sum() for p in n.model.parameters())

    with pytest.raises(InputError, match="penalty"):
        fastsharp.fisher_rao(n.model, n.batches, loss, reduction="mean")
