"""Fisher matrices, covariance and residual in every solver, in the preflight, and where they are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.api.subject import OPERATORS
from fastsharp.curvature import scores
from fastsharp.curvature.batch_products import Request
from fastsharp.curvature.residual import _Slope
from fastsharp.errors import EngineError, InputError
from tests.cases import net

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("fisher", "empirical-fisher", "gradient-covariance", "residual")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def dense(kind: str, name: str = "mlp_tanh", **options: Any) -> torch.Tensor:
    n = net(name)
    operator = OPERATORS[kind](n.model, n.batches, n.loss_fn, **options)
    return operator.apply(torch.eye(operator.n, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_takes_them_by_name(kind, tmp_path):
    n, A = net("mlp_tanh"), dense(kind)
    call = {"operator": kind}
    values = torch.linalg.eigvalsh(A)
    found = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=2, tol=1e-8, resume=tmp_path / "log", **call)
    assert relative(found.eigenvalues, values.flip(0)[:2]) <= 1e-8
    assert found.settings["operator"] == kind and found.settings["preflight"]["reference"] <= 1e-14
    again = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=2, tol=1e-8, resume=tmp_path / "log", **call)
    assert torch.equal(again.eigenvalues, found.eigenvalues)
    low, high = fastsharp.trace(n.model, n.batches, n.loss_fn, rtol=0.2, **call).interval
    assert low <= float(A.trace()) <= high
    low, high = fastsharp.frobenius(n.model, n.batches, n.loss_fn, rtol=0.2, **call).interval
    assert low <= float(A.norm()) <= high
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fastsharp.density(n.model, n.batches, n.loss_fn, **call).settings["operator"] == kind
        assert fastsharp.spectrum(n.model, n.batches, n.loss_fn, **call).eigenpairs.settings["operator"] == kind
        steps = fastsharp.Tracker(n.model, n.batches, n.loss_fn, k=1, **call)
        assert float(steps.update().eigenvalues[0]) == pytest.approx(float(values[-1]), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tracker_follows_the_weights(kind):
    n = net("mlp_tanh")
    steps = fastsharp.Tracker(n.model, n.batches, n.loss_fn, k=1, operator=kind, tol=1e-6)
    steps.update()
    with torch.no_grad():
        for p in n.model.parameters():
            p.mul_(1.1)
    operator = OPERATORS[kind](n.model, n.batches, n.loss_fn)
    values = torch.linalg.eigvalsh(operator.apply(torch.eye(operator.n, dtype=torch.float64)))
    assert float(steps.update().eigenvalues[0]) == pytest.approx(float(values[-1]), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ensembles_and_explanations(kind):
    nets = [net("mlp_tanh", seed=s) for s in range(2)]
    data = [nets[0].whole]  # one batch, so that the native ensemble is asked first
    found = fastsharp.lanczos([n.model for n in nets], data, nets[0].loss_fn, operator=kind, k=1)
    for n, one in zip(nets, found, strict=True):
        alone = fastsharp.lanczos(n.model, data, nets[0].loss_fn, operator=kind, k=1)
        assert relative(one.eigenvalues, alone.eigenvalues) <= 1e-4
    shown = fastsharp.explain(nets[0].model, nets[0].batches, nets[0].loss_fn, operator=kind)
    assert shown.backend == "rop" and "Gauss-Newton matrix alone" in shown.refusals["mlp"]
    assert all(calls.by == "rule" for calls in shown.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_cheap_products_are_of_the_same_matrix(kind):
    """In bf16 other labels would be drawn, and p - y would lose its digits, were they not those of the exact outputs."""
    n = net("mlp_tanh", torch.float32)
    operator = OPERATORS[kind](n.model, n.batches, n.loss_fn)
    V = torch.randn(2, operator.n)
    exact = operator.apply(V)
    assert 2.0**-11 <= relative(operator.cheap("bf16").apply(V), exact) <= 2.0**-4
    found = fastsharp.lanczos(n.model, n.batches, n.loss_fn, operator=kind, k=1, precision="bf16", which="LA")
    values = torch.linalg.eigvalsh(dense(kind))
    assert float(found.eigenvalues[0]) == pytest.approx(float(values[-1]), rel=1e-3)


def test_cheap_products_take_their_scores_from_exact_outputs():
    """A confident network: in bf16 a logit of 20 is off by 0.06, and p - y by as much of itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(40, 4)
    with torch.no_grad():
        model[2].weight *= 60.0
        y = model(x).argmax(1)
    operator = fastsharp.Residual(model, [(x, y)])
    labelled = fastsharp.Fisher(model, [(x, y)], kind="empirical")
    for A in (operator, labelled):
        request = Request(A.objective, 0, (x, y), A.form, bf16=True)
        with A.objective.quiet():
            held, own = request.exact().constants, Request(A.objective, 0, (x, y), A.form).exact().constants
            rounded = A.form.constants(*_in_bf16(A, (x, y)))
        held, own, rounded = (c.r if isinstance(c, scores.Vectors) else c for c in (held, own, rounded))
        assert torch.equal(held, own) and relative(rounded, own) > 0.02
        v = torch.randn(A.n)
        assert relative(A.cheap("bf16") @ v, A @ v) <= 0.02


def _in_bf16(A: Any, batch: Any) -> tuple[Any, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        return A.objective.evaluate(0, batch), batch, A.objective.loss, 0


def test_brackets_of_means_over_samples_alone():
    n = net("mlp_tanh")
    x, y = n.whole
    data = (x.repeat(8, 1), y.repeat(8))
    for kind in ("empirical-fisher", "residual"):
        run = fastsharp.bracket(n.model, data, n.loss_fn, operator=kind, start=16)
        assert run.lower <= float(torch.linalg.eigvalsh(dense(kind))[-1]) * (1 + 1e-6) and run.samples == 88
    for kind in ("fisher", "gradient-covariance"):
        with pytest.raises(InputError, match=f"operator='{kind}' is no mean over samples"):
            fastsharp.bracket(n.model, data, n.loss_fn, operator=kind, start=16)


def contrastive(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


@pytest.mark.parametrize(
    "loss",
    [
        contrastive,
        lambda z, y: F.cross_entropy(z, y) + z.mean(0).square().sum(),
        lambda z, y: (z.sum(1) * (y + 1)).max(),  # piecewise linear: its second derivative says nothing
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / (y != -100).sum(),  # a mean over labels whose number it does not tell
    ],
    ids=["contrastive", "batch_mean", "maximum", "uncounted"],
)
@pytest.mark.parametrize("kind", ["empirical-fisher", "gradient-covariance"])
def test_losses_that_are_no_sum_over_examples_are_refused(kind, loss):
    n = net("mlp_tanh")
    x, y = n.whole
    y = y.clone()
    y[:3] = -100 if "cross_entropy" in loss.__code__.co_names and "sum" in loss.__code__.co_names else 0
    with pytest.raises(InputError, match="needs a loss that is a sum over examples") as caught:
        OPERATORS[kind](n.model, [(x, y)], loss, reduction="mean")
    assert len(str(caught.value).splitlines()) <= 4


def test_additive_losses_pass_whatever_they_are_made_of():
    n = net("mlp_tanh")
    x, y = n.whole
    for loss in (
        lambda z, t: F.cross_entropy(z, t),
        lambda z, t: F.multi_margin_loss(z, t),
        lambda z, t: (z.abs().sum(1) * (t + 1)).mean(),
        lambda z, t: (F.cross_entropy(z, t, reduction="sum"), len(t)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)),
    ):
        reduction = "auto" if isinstance(loss, nn.Module) else "mean"
        operator = fastsharp.Fisher(n.model, [(x, y)], loss, kind="empirical", reduction=reduction)
        fastsharp.lanczos(operator, k=1)
        assert operator.preflight["reference"] <= 1e-13


def test_a_confident_network_raises_no_alarm():
    """At a loss of 1e-7 and below, p - y is rounding to the eighth digit and further: in float64 and in float32."""
    for scale in (10.0, 18.0, 30.0):
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
            x = torch.randn(12, 4, dtype=torch.float64)
            with torch.no_grad():
                y = model(x).argmax(1)
                model[2].weight *= scale / (model(x).topk(2, 1).values @ torch.tensor([1.0, -1.0], dtype=torch.float64)).min()
                model[2].bias.zero_()
                y = model(x).argmax(1)
            model, x = model.to(dtype), x.to(dtype)
            for kind in KINDS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fastsharp.lanczos(model, [(x, y)], operator=kind, k=1)


class Mixing(nn.Module):
    """Examples of a batch see one another."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.first, self.last, self.share = nn.Linear(6, 5), nn.Linear(5, 3), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h - self.share * h.mean(0))


def test_a_network_that_mixes_examples_is_refused():
    n = net("mlp_tanh")
    with pytest.raises(InputError, match="needs a loss that is a sum over examples"):
        fastsharp.Fisher(Mixing(1.0).double(), n.batches, n.loss_fn, kind="empirical")
    faint = Mixing(1e-6).double()  # for the preflight
    with pytest.raises(InputError, match="some example's gradient depends on the others"):
        fastsharp.lanczos(faint, n.batches, n.loss_fn, operator="empirical-fisher", k=1)
    fastsharp.lanczos(faint, n.batches, n.loss_fn, operator="fisher", k=1)  # a score of the output is one whatever made it


def test_examples_must_be_rows_of_the_output():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).flatten(0, 1)

    batch = (torch.randn(6, 5, 4), torch.arange(30).reshape(6, 5) % 3)
    with pytest.raises(InputError, match=r"output has shape \(30, 3\), the batch 6 examples"):
        fastsharp.Fisher(Flat(), [batch], lambda z, y: F.cross_entropy(z, y.flatten()), kind="empirical", reduction="mean")


def test_the_preflight_sees_wrong_scores(monkeypatch):
    n = net("mlp_tanh")

    def run(kind: str) -> None:
        fastsharp.lanczos(n.model, n.batches, n.loss_fn, operator=kind, k=1)

    right = scores.Classes.quadratics
    with monkeypatch.context() as m:
        m.setattr(scores.Classes, "quadratics", lambda self, z: right(self, z) * 1.001)
        with pytest.raises(EngineError, match=r"misses the scores written out by 1\.0e-03"):
            run("fisher")
    with monkeypatch.context() as m:
        m.setattr(_Slope, "at", lambda self, z, r: (z * r).sum() * 1.001)
        with pytest.raises(EngineError, match="misses H v - G v"):
            run("residual")
    outer = scores.Vectors.quadratics
    with monkeypatch.context() as m:
        m.setattr(scores.Vectors, "quadratics", lambda self, z: outer(self, z) * 1.001)
        with pytest.raises(InputError, match="misses the sum over single examples"):
            run("empirical-fisher")


def test_settings_and_notes_say_what_was_drawn():
    n = net("mlp_tanh")
    found = fastsharp.lanczos(fastsharp.Fisher(n.model, n.batches, n.loss_fn, mc_samples=5, seed=7), k=1)
    assert found.settings["mc_samples"] == 5 and found.settings["draw_seed"] == 7
    assert any("drawn 5 times" in note and "seed 7" in note for note in found.notes)
    assert fastsharp.lanczos(n.model, n.batches, n.loss_fn, operator="gradient-covariance", k=1).settings["ddof"] == 0
    with pytest.raises(InputError, match="ddof is 2"):
        fastsharp.GradientCovariance(n.model, n.batches, n.loss_fn, ddof=2)
    with pytest.raises(InputError, match="1 example has no covariance"):
        fastsharp.GradientCovariance(n.model, [(n.whole[0][:1], n.whole[1][:1])], n.loss_fn, ddof=1)


def test_a_backend_without_these_products_says_so():
    n = net("mlp_tanh")
    for kind in KINDS:
        with pytest.raises(EngineError, match="Gauss-Newton matrix alone"):
            fastsharp.lanczos(n.model, n.batches, n.loss_fn, operator=kind, k=1, backend="mlp")
