"""Margins, distances, Jacobians, curvature of single samples and coherence, each against a loop over samples in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.measures.facts import one_pass
from fastsharp.measures.fisher_rao import FisherRaoIdentity
from fastsharp.measures.head import HeadFinder
from fastsharp.measures.inputs import BoundaryTightness
from fastsharp.measures.outputs import Confidence, LogitScale, Margin
from fastsharp.measures.relative_flatness import HeadFlatness
from fastsharp.objective import Objective
from tests.cases import net
from tests.oracles import measures as oracle
from tests.oracles.dense import dense_hessian
from tests.unchanged import unchanged

ROOM = {torch.float64: 1e-10, torch.float32: 1e-5}
NETS = ("mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "vit_block", "gru", "two_inputs")


def logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    n = net(name)
    x, y = n.whole
    f = n.model(*x) if isinstance(x, tuple) else n.model(x)
    return f.detach().numpy(), y.numpy()


@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_outputs(name: str, dtype: torch.dtype) -> None:
    n, (f, y) = net(name, dtype), logits(name)
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    wanted = {
        fastsharp.margin: oracle.margins(f, y),
        fastsharp.prediction_confidence: p.max(1),
        fastsharp.logit_scale: np.linalg.norm(f - f.mean(1, keepdims=True), axis=1),
    }
    for call, want in wanted.items():
        got = call(n.model, n.batches, n.loss_fn)
        np.testing.assert_allclose(got.per_sample.numpy(), want, rtol=ROOM[dtype], atol=ROOM[dtype] * np.abs(want).max())
        assert math.isclose(got.value, want.mean(), rel_tol=ROOM[dtype], abs_tol=ROOM[dtype] * np.abs(want).max())
        assert math.isclose(got.stderr, want.std(ddof=1) / math.sqrt(len(want)), rel_tol=10 * ROOM[dtype])


@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_input_side(name: str, dtype: torch.dtype) -> None:
    n = net(name, dtype)
    d = oracle.distances(net(name).model, n.whole)
    tight = fastsharp.boundary_tightness(n.model, n.batches, n.loss_fn)
    np.testing.assert_allclose(tight.per_sample.numpy(), d, rtol=10 * ROOM[dtype], atol=ROOM[dtype])
    assert math.isclose(tight.value, 1 / np.abs(d).mean(), rel_tol=ROOM[dtype])
    far = np.abs(d)
    assert math.isclose(tight.stderr, far.std(ddof=1) / math.sqrt(len(d)) / far.mean() ** 2, rel_tol=10 * ROOM[dtype])
    assert tight.interval[0] < tight.value < tight.interval[1]
    for of in ("logits", "probabilities"):
        want = oracle.input_jacobian_norms(net(name).model, n.whole, probabilities=of == "probabilities")
        got = fastsharp.input_jacobian(n.model, n.batches, n.loss_fn, of=of)
        np.testing.assert_allclose(got.per_sample.numpy(), want, rtol=ROOM[dtype])


def test_the_jacobian_takes_any_loss() -> None:
    n = net("regression")
    want = oracle.input_jacobian_norms(n.model, n.whole)
    np.testing.assert_allclose(fastsharp.input_jacobian(n.model, n.batches, n.loss_fn).per_sample.numpy(), want, rtol=1e-10)


@pytest.mark.parametrize("name", ["mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "vit_block", "gru", "regression", "unused", "frozen"])
def test_curvature_of_single_samples_is_that_of_their_own_hessians(name: str) -> None:
    n = net(name)
    x, y = n.whole
    H = torch.stack([dense_hessian(n.model, n.objective, (x[i : i + 1], y[i : i + 1])) for i in range(len(y))])
    g = torch.Generator().manual_seed(0)
    u = torch.randn(H.shape[1], generator=g, dtype=torch.float64)
    want = torch.einsum("j,ijk,k->i", u, H, u) / (u @ u)
    got = fastsharp.sample_curvature(n.model, n.batches, n.loss_fn, direction=u)
    assert torch.allclose(got.per_sample, want, rtol=1e-9, atol=1e-10 * float(want.abs().max()))
    traces = H.diagonal(dim1=1, dim2=2).sum(1)
    probed = fastsharp.loss_trace(n.model, n.batches, n.loss_fn, probes=64)
    spread = (2 * (H.square().sum((1, 2)) - H.diagonal(dim1=1, dim2=2).square().sum(1)) / 64).sqrt()  # of z'H_i z over random signs
    assert bool(((probed.per_sample - traces).abs() <= 5 * spread + 1e-12).all())
    exact = (
        fastsharp.trace(n.model, n.batches, n.loss_fn, rtol=1e-6, max_products=20_000).value if H.shape[1] <= 64 else float(traces.mean())
    )
    assert math.isclose(float(traces.mean()), exact, rel_tol=1e-6)


def test_the_mean_over_samples_is_the_rayleigh_quotient() -> None:
    n = net("mlp_tanh", torch.float32)
    pairs = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=1)
    got = fastsharp.sample_curvature(n.model, n.batches, n.loss_fn, direction=pairs)
    assert math.isclose(got.value, float(pairs.eigenvalues[0]), rel_tol=1e-5)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_eval", "gru", "regression"])
def test_coherence(name: str) -> None:
    n = net(name)
    g = oracle.gradients(n.model, n.whole, F.mse_loss if name == "regression" else oracle.cross_entropy)
    want = float(len(g) * g.mean(0).square().sum() / g.square().sum(1).mean())
    got = fastsharp.coherence(n.model, n.batches, n.loss_fn)
    assert math.isclose(got.value, want, rel_tol=1e-10)
    assert torch.allclose(got.per_sample, g.square().sum(1), rtol=1e-9)
    jack = torch.stack([leave_one_out(g, i) for i in range(len(g))]) * len(g) / (len(g) - 1)
    spread = float((jack - jack.mean()).square().sum() * (len(g) - 1) / len(g)) ** 0.5
    assert 0.5 <= got.stderr / spread <= 1.5  # the jackknife's own standard error; the two agree to order 1/N


def leave_one_out(g: torch.Tensor, i: int) -> torch.Tensor:
    rest = torch.cat([g[:i], g[i + 1 :]])
    return len(rest) * rest.mean(0).square().sum() / rest.square().sum(1).mean()


def test_coherence_of_equal_and_of_orthogonal_gradients() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    same = (torch.ones(4, 4).double(), torch.full((4, 1), 9.0).double())
    assert math.isclose(fastsharp.coherence(model, same, nn.MSELoss()).value, 4.0, rel_tol=1e-12)
    with torch.no_grad():
        model.weight.zero_()
    apart = (torch.eye(4).double(), torch.ones(4, 1).double())
    assert math.isclose(fastsharp.coherence(model, apart, nn.MSELoss()).value, 1.0, rel_tol=1e-12)


def test_one_pass_feeds_several_measures_with_the_same_numbers() -> None:
    """The evaluations of a pass are those of its most demanding measure: tangents, and a graph to the inputs, no more."""
    n = net("cnn_batchnorm_eval")
    calls = 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = n.model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return self.inner(x)

    model = Counted().eval()
    objective = Objective(model, n.batches, n.loss_fn)
    together = [Margin(0.95), Confidence(0.95), LogitScale(0.95), FisherRaoIdentity(objective, 0.95)]
    calls = 0
    one_pass(objective, together, what="all")
    assert calls == len(n.batches) + 1  # the first batch's tangents are compared with its gradient
    calls = 0
    tightness = BoundaryTightness(0.95)
    one_pass(objective, [tightness, Margin(0.95)], what="all")
    assert calls == len(n.batches)
    alone = [f(n.model, n.batches, n.loss_fn).value for f in (fastsharp.margin, fastsharp.prediction_confidence, fastsharp.logit_scale)]
    alone.append(fastsharp.fisher_rao(n.model, n.batches, n.loss_fn).value)
    assert [m.result().value for m in together] == alone
    assert tightness.result().value == fastsharp.boundary_tightness(n.model, n.batches, n.loss_fn).value


@pytest.mark.parametrize("name", ["cnn_residual", "gru"])
def test_features_and_tangents_come_from_one_pass(name: str) -> None:
    """The evaluations that check a tangent are no calls of a layer."""
    n = net(name)
    objective = Objective(n.model, n.batches, n.loss_fn)
    finder = HeadFinder(n.model)
    one_pass(objective, [finder], what="all", first_only=True)
    flatness = HeadFlatness(finder.head("all"), kind="trace", normalize=True, confidence=0.95, room=1 << 30)
    norm, margin = FisherRaoIdentity(objective, 0.95), Margin(0.95)
    one_pass(objective, [flatness, norm, margin], what="all")
    assert flatness.result().value == fastsharp.relative_flatness(n.model, n.batches, n.loss_fn).value
    assert norm.result().value == fastsharp.fisher_rao(n.model, n.batches, n.loss_fn).value


def test_rescaled_layers_and_temperature() -> None:
    """What the docstrings say of invariance: measures of the function do not see the weights, those of the weights do."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = (torch.randn(20, 6).double(), torch.randint(3, (20,)))
    u = torch.ones(sum(p.numel() for p in model.parameters())).double()
    of_function = {
        f: f(model, data).value
        for f in (
            fastsharp.margin,
            fastsharp.prediction_confidence,
            fastsharp.logit_scale,
            fastsharp.boundary_tightness,
            fastsharp.input_jacobian,
        )
    }
    of_weights = {f: f(model, data).value for f in (fastsharp.coherence, fastsharp.loss_trace)}
    curvature = fastsharp.sample_curvature(model, data, direction=u).value
    with torch.no_grad():
        model[0].weight *= 5.0
        model[0].bias *= 5.0
        model[2].weight /= 5.0
    for f, value in of_function.items():
        assert math.isclose(f(model, data).value, value, rel_tol=1e-10), f.__name__
    for f, value in of_weights.items():
        assert not math.isclose(f(model, data).value, value, rel_tol=1e-3), f.__name__
    assert not math.isclose(fastsharp.sample_curvature(model, data, direction=u).value, curvature, rel_tol=1e-3)
    with torch.no_grad():
        model[2].weight /= 2.0
        model[2].bias /= 2.0
    halved = (fastsharp.margin, fastsharp.logit_scale, fastsharp.input_jacobian)
    for f in halved:
        assert math.isclose(f(model, data).value, of_function[f] / 2, rel_tol=1e-10), f.__name__
    assert math.isclose(fastsharp.boundary_tightness(model, data).value, of_function[fastsharp.boundary_tightness], rel_tol=1e-10)


def test_nothing_of_the_callers_changes() -> None:
    n = net("cnn_batchnorm_eval", torch.float32)
    u = torch.ones(sum(p.numel() for p in n.model.parameters()))
    with unchanged(n.model, *(t for b in n.batches for t in b)):
        for f in (fastsharp.margin, fastsharp.boundary_tightness, fastsharp.input_jacobian, fastsharp.loss_trace, fastsharp.coherence):
            f(n.model, n.batches, n.loss_fn)
        fastsharp.sample_curvature(n.model, n.batches, n.loss_fn, direction=u)
