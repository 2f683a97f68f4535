"""Relative flatness: the closed form and the Hessian products against the double-backward loop over every entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastsharp
from tests.cases import net
from tests.oracles import measures as oracle
from tests.unchanged import unchanged

ROOM = {torch.float64: 1e-10, torch.float32: 1e-5}
HEADS = {"mlp_relu": "4", "cnn_batchnorm_eval": "8", "cnn_residual": "head", "vit_block": "head", "gru": "head", "two_inputs": "last"}
OTHERS = {"mlp_relu": "2", "mlp_tanh": "0", "cnn_batchnorm_eval": "4", "vit_block": "down", "regression": "2"}
INDEX = {"trace": 0, "max": 1}


@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize("name", HEADS)
def test_the_closed_form_is_the_double_backward_loop(name: str, kind: str, normalize: bool, dtype: torch.dtype) -> None:
    n = net(name, dtype)
    want = oracle.relative_flatness_as_published(n.model, n.whole, HEADS[name], n.objective, normalize=normalize)[INDEX[kind]]
    got = fastsharp.relative_flatness(n.model, n.batches, n.loss_fn, kind=kind, normalize=normalize)
    assert got.settings["method"] == "closed" and got.settings["layer"] == HEADS[name]
    assert abs(got.value - want) <= ROOM[dtype] * want


@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize("name", OTHERS)
def test_products_are_the_double_backward_loop(name: str, kind: str, normalize: bool, dtype: torch.dtype) -> None:
    n = net(name, dtype)
    want = oracle.relative_flatness_as_published(n.model, n.whole, OTHERS[name], n.objective, normalize=normalize)[INDEX[kind]]
    rtol = 1e-6 if dtype == torch.float64 else 1e-3
    got = fastsharp.relative_flatness(n.model, n.batches, n.loss_fn, layer=OTHERS[name], kind=kind, normalize=normalize, rtol=rtol)
    assert got.settings["method"] == "products"
    assert abs(got.value - want) <= ROOM[dtype] * abs(want) + (got.interval[1] - got.interval[0])
    assert got.interval[1] - got.interval[0] <= 0.01 * abs(want) + ROOM[dtype] * max(1.0, abs(want))


@pytest.mark.parametrize("kind", INDEX)
def test_closed_form_and_products_agree_on_a_head(kind: str) -> None:
    n = net("mlp_tanh")
    closed, products = (
        fastsharp.relative_flatness(n.model, n.batches, n.loss_fn, layer="4", method=m, kind=kind) for m in ("closed", "products")
    )
    assert math.isclose(closed.value, products.value, rel_tol=1e-9)
    assert (closed.settings["method"], products.settings["method"]) == ("closed", "products")


def test_probes_hold_what_they_promise_on_a_wider_layer() -> None:
    """100 x 40: more unit vectors than a trace multiplies, so probes decide."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 100), nn.Tanh(), nn.Linear(100, 5))
    data = (torch.randn(60, 40), torch.randint(5, (60,)))
    want = oracle.relative_flatness_as_published(
        nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4), torch.arange(3)), "0", lambda c, b: nn.functional.cross_entropy(c(b[0]), b[1]), normalize=True
    )  # fmt: skip
    assert want[0] > 0  # the loop itself works on any layer; for 4,000 entries the dense route below is the oracle
    got = fastsharp.relative_flatness(model, data, layer="0", normalize=False, rtol=0.02)
    exact = dense_trace(model, data)
    assert got.samples > 0 and got.interval[0] <= exact <= got.interval[1]
    assert abs(got.value - exact) <= 0.05 * abs(exact)


def dense_trace(model: nn.Sequential, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """sum_st <w_s, w_t> tr H_st from the whole Hessian of the first weight."""
    from torch.func import functional_call, hessian

    W = model[0].weight.detach().double()
    twin = oracle.in_double(model).requires_grad_(False)
    H = hessian(lambda w: nn.functional.cross_entropy(functional_call(twin, {"0.weight": w}, (data[0].double(),)), data[1]))(W)
    return float(torch.einsum("sk,tk,sjtj->", W, W, H))


def test_thousands_of_classes_in_one_pass() -> None:
    """C = 3,000: the double-backward loop would be 36,000 gradients; the per-sample dense form is the oracle."""
    g = torch.Generator().manual_seed(0)
    head = nn.Linear(12, 3000)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), head)
    x, y = torch.randn(40, 12, generator=g), torch.randint(3000, (40,), generator=g)
    twin = oracle.in_double(model)
    phi = twin[:2](x.double()).detach()
    p, W = (phi @ twin[2].weight.T + twin[2].bias).softmax(1).detach(), twin[2].weight.detach()
    G = W @ W.T
    want = float((phi.square().sum(1) * (p @ G.diagonal() - ((p @ G) * p).sum(1))).mean())
    got = fastsharp.relative_flatness(model, [(x[:25], y[:25]), (x[25:], y[25:])], normalize=False)
    assert math.isclose(got.value, want, rel_tol=1e-5)
    assert got.n_matvec == 0 and got.per_sample.numel() == 40


def test_confident_samples_keep_their_digits_in_float32() -> None:
    """A margin of 25 leaves 1e-11 of the probability to the others; E[w^2] - E[w]^2 has nothing left of it in float32."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[25.0, 0.1, 0.2], [0.3, 26.0, 0.1], [0.0, 0.4, 27.0]]))
    x, y = torch.eye(3) + 0.01, torch.arange(3)
    for kind in INDEX:
        want = oracle.relative_flatness_as_published(
            nn.Sequential(model), (x, y), "0", lambda c, b: nn.functional.cross_entropy(c(b[0]), b[1]), normalize=False
        )[INDEX[kind]]  # fmt: skip
        assert 0 < want < 1e-6
        assert math.isclose(fastsharp.relative_flatness(model, (x, y), kind=kind, normalize=False).value, want, rel_tol=1e-4)


def test_a_mean_over_samples_however_they_are_cut() -> None:
    n = net("cnn_batchnorm_eval")
    values = [fastsharp.relative_flatness(n.model, data, n.loss_fn).value for data in (n.batches, n.whole)]
    assert math.isclose(*values, rel_tol=1e-12)


@pytest.mark.parametrize("layer", [None, "0"])
def test_a_rescaling_between_layers_leaves_it(layer: str | None) -> None:
    """ReLU: W_1 -> 5 W_1, b_1 -> 5 b_1, W_2 -> W_2 / 5 is the same function."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = (torch.randn(20, 6).double(), torch.randint(3, (20,)))
    before = fastsharp.relative_flatness(model, data, layer=layer, normalize=False).value
    with torch.no_grad():
        model[0].weight *= 5.0
        model[0].bias *= 5.0
        model[2].weight /= 5.0
    assert math.isclose(fastsharp.relative_flatness(model, data, layer=layer, normalize=False).value, before, rel_tol=1e-9)


def test_normalisation_survives_a_rescaling_of_single_features() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = (torch.randn(20, 6).double(), torch.randint(3, (20,)))
    before = [fastsharp.relative_flatness(model, data, normalize=on).value for on in (True, False)]
    by = torch.linspace(0.2, 4.0, 8, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight *= by[:, None]
        model[0].bias *= by
        model[2].weight /= by
    after = [fastsharp.relative_flatness(model, data, normalize=on).value for on in (True, False)]
    assert math.isclose(before[0], after[0], rel_tol=1e-10)
    assert abs(before[1] - after[1]) > 0.01 * before[1]


def test_a_dead_feature_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    data = (torch.randn(9, 4).double(), torch.arange(9) % 3)
    got = fastsharp.relative_flatness(model, data)
    want = oracle.relative_flatness_as_published(model, data, "2", lambda c, b: nn.functional.cross_entropy(c(b[0]), b[1]), normalize=True)[
        0
    ]
    assert math.isfinite(got.value) and math.isclose(got.value, want, rel_tol=1e-10)


def test_tokens_and_tied_weights() -> None:
    n = net("tied_language_model")
    got = fastsharp.relative_flatness(n.model, n.batches, n.loss_fn, normalize=False)
    x, y = n.whole
    seen: list[torch.Tensor] = []
    handle = n.model.head.register_forward_hook(lambda m, a, o: seen.append(a[0].detach()))
    p = n.model(x).softmax(1).detach().transpose(1, 2)[y != -100]
    handle.remove()
    phi, W = seen[0][y != -100], n.model.head.weight.detach()
    G = W @ W.T
    want = float((phi.square().sum(1) * (p @ G.diagonal() - ((p @ G) * p).sum(1))).mean())
    assert math.isclose(got.value, want, rel_tol=1e-12)
    assert any("tied with" in note for note in got.notes)


def test_nothing_of_the_callers_changes() -> None:
    n = net("cnn_batchnorm_eval", torch.float32)
    with unchanged(n.model, *(t for b in n.batches for t in b)):
        fastsharp.relative_flatness(n.model, n.batches, n.loss_fn)
        fastsharp.relative_flatness(n.model, n.batches, n.loss_fn, layer="4")
