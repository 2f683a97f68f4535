"""ggn_spectrum against dense J' H_L J in float64, its totals, its refusals, and parameters of every kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.curvature.gram import Gram, gram
from fastsharp.curvature.gram.uses import Record
from fastsharp.errors import ArgumentTypeError, BasisMemoryError, InputError
from tests.cases import NAMES, cut, net
from tests.curvature.test_gauss_newton import LOSSES, dense

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = ("mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "cnn_residual", "vit_block", "lstm")
EPS = torch.finfo(torch.float64).eps


def assembled(model: nn.Module, data: Any, loss_fn: Any = None, **options: Any) -> torch.Tensor:
    operator = fastsharp.GGN(model, data, loss_fn, **options)
    G = operator.apply(torch.eye(operator.n, dtype=operator.dtype)).double()
    return (G + G.T) / 2


def check(found: fastsharp.GGNSpectrum, G: torch.Tensor, tol: float) -> None:
    """All eigenvalues, zeros included, to `tol` of the largest; trace and norm from K, not from the eigenvalues."""
    exact = torch.linalg.eigvalsh(G)
    ours = torch.cat([found.eigenvalues, torch.zeros(found.n - len(found), dtype=torch.float64)]).sort().values
    scale = float(exact.abs().max())
    assert float((ours - exact).abs().max()) <= tol * scale
    assert abs(found.trace - float(G.trace())) <= tol * float(exact.abs().sum())
    assert abs(found.frobenius - float(G.norm())) <= tol * float(G.norm())


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
def test_the_whole_spectrum_over_uneven_batches(name, loss, dtype, tol):
    exact, n = net(name), net(name, dtype)
    with torch.no_grad():
        G = dense(exact.model, LOSSES[loss], *exact.whole)
    found = fastsharp.ggn_spectrum(n.model, cut(n.whole, (4, 5, 2)), LOSSES[loss], reduction="mean", vectors=2, preflight="off")
    check(found, G, tol)
    for value, x in zip(found.eigenvalues, found.eigenvectors.double(), strict=False):
        assert float((G @ x - value * x).norm()) <= 10 * tol * float(G.norm())
    if loss != "nonconvex":
        assert float(found.eigenvalues.min()) > 0.0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NETS])
def test_every_network_of_the_catalogue_by_the_operators_own_products(name):
    n = net(name)
    with pytest.warns(fastsharp.errors.UnusedParamWarning) if name == "unused" else _quiet():
        found = fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn)
        check(found, assembled(n.model, n.batches, n.loss_fn), 1e-10)
    assert found.error <= 1e-12


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


class Kinds(nn.Module):
    """A grouped, strided, dilated convolution, 'same' padding, GroupNorm, RMSNorm, a bare parameter, a weight used twice, an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
        self.norm, self.b = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.c, self.twice, self.rms = nn.Conv1d(4, 5, 2), nn.Linear(5, 5), nn.RMSNorm(5)
        self.scale, self.head = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.a(x)), inplace=True)
        x = self.c(self.b(x).flatten(2)).mean(2)
        return self.head(self.rms(self.twice(torch.tanh(self.twice(x)))) * self.scale)


def test_kinds_of_parameters():
    torch.manual_seed(0)
    model, batch = Kinds().double(), (torch.randn(7, 2, 5, 6, dtype=torch.float64), torch.arange(7) % 3)
    found = fastsharp.ggn_spectrum(model, cut(batch, (4, 3)))
    check(found, assembled(model, cut(batch, (4, 3))), 1e-10)
    (note,) = (note for note in found.notes if "one backward pass" in note)
    assert note.endswith("rows: scale")


def test_an_embedding_with_a_padding_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=-2), nn.Flatten(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[0].weight[5] = 1.0
    batch = (torch.randint(7, (9, 4)), torch.arange(9) % 3)
    batch[0][0] = 5
    found = fastsharp.ggn_spectrum(model, batch)
    check(found, assembled(model, batch), 1e-10)
    assert not any("one backward pass" in note for note in found.notes)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_eval", "cnn_residual", "vit_block", "tied_language_model"])
def test_structure_is_used_where_there_is_one(name):
    """No parameter goes by a backward pass for each row, and weights that a sample passes once go by factors."""
    n = net(name)
    made = gram(fastsharp.GGN(n.model, n.batches, n.loss_fn).objective, 10_000, 10**9)
    assert made.by_rows == ()
    single = {made.names[i] for i in made._single}
    heads = {"cnn_batchnorm_eval": "8", "cnn_residual": "head", "vit_block": "head"}
    once = {"mlp_tanh": set(made.names), "tied_language_model": set()}.get(name)
    assert single == (once if once is not None else {f"{heads[name]}.weight", f"{heads[name]}.bias"})


class Coupled(nn.Module):
    """Samples that see each other: every output depends on the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h - h.mean(0))


def test_coupled_samples_are_found_and_go_by_rows():
    torch.manual_seed(0)
    model, batch = Coupled().double(), (torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)
    found = fastsharp.ggn_spectrum(model, batch)
    check(found, assembled(model, batch), 1e-10)
    assert any("first.weight" in note for note in found.notes if "one backward pass" in note)


def test_a_call_that_was_not_seen_is_found(monkeypatch):
    """The comparison with a backward pass, not the record of calls, is what the result stands on."""
    n = net("cnn_residual")
    G = assembled(n.model, n.batches, n.loss_fn)
    own = Record.uses.fget
    monkeypatch.setattr(Record, "uses", property(lambda self: own(self)[1:]))
    found = fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn)
    check(found, G, 1e-10)
    assert any("stem.weight" in note for note in found.notes if "one backward pass" in note)


def test_weights_of_classes_and_ignored_labels_and_sums():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double(), torch.randn(9, 5, dtype=torch.float64)
    y = torch.arange(9) % 4
    y[[0, 1, 2, 7]] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64))
    data = cut((x, y), (3, 2, 4))
    found = fastsharp.ggn_spectrum(model, data, loss)
    check(found, assembled(model, data, loss), 1e-10)
    assert found.rows == 5 * 3  # labels that count, times C - 1
    total = fastsharp.ggn_spectrum(model, data, nn.CrossEntropyLoss(reduction="sum"))
    check(total, assembled(model, data, nn.CrossEntropyLoss(reduction="sum")), 1e-10)


def test_functions_of_the_spectrum():
    n = net("mlp_tanh")
    found = fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn, vectors=True)
    G = assembled(n.model, n.batches, n.loss_fn)
    shifted = G + 0.1 * torch.eye(found.n, dtype=torch.float64)
    assert found.logdet(0.1) == pytest.approx(float(torch.logdet(shifted)), rel=1e-12)
    assert found.effective_dimension(0.1) == pytest.approx(float(torch.linalg.solve(shifted, G).trace()), rel=1e-10)
    assert found.stable_rank() == pytest.approx(float(G.norm() / torch.linalg.matrix_norm(G, 2)) ** 2, rel=1e-12)
    assert found.participation() == pytest.approx(float(G.trace() / G.norm()) ** 2, rel=1e-12)
    X = found.eigenvectors
    assert float((X @ X.T - torch.eye(len(X), dtype=X.dtype)).abs().max()) <= 1e-9
    assert {k: v.shape for k, v in found.as_dict(0).items()} == {k: p.shape for k, p in n.model.named_parameters()}
    assert found.equivalent_products > 0 and math.isfinite(found.equivalent_products)
    with pytest.raises(InputError, match="not positive definite"):
        found.logdet(0.0)


def test_chosen_parameters_alone():
    n = net("cnn_batchnorm_eval")
    for chosen in ("0.bias", "1.weight", ["4.weight", "8.bias"]):
        found = fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn, params=chosen)
        check(found, assembled(n.model, n.batches, n.loss_fn, params=chosen), 1e-10)


def test_groups_of_explicit_rows_do_not_change_the_result(monkeypatch):
    n = net("cnn_residual")
    whole = fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn)
    passes = []
    own = Gram._explicit
    monkeypatch.setattr(Gram, "_explicit", lambda self, group, truth: passes.append(group) or own(self, group, truth))
    parts = fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn, memory=100_000)  # 50 kB: K, and one kernel of 4 x 4 x 3 x 3 at a time
    assert len(passes) > 1
    assert torch.allclose(whole.eigenvalues, parts.eigenvalues, rtol=0, atol=64 * EPS * float(whole.eigenvalues[0]))


def test_too_large_is_refused_with_its_size():
    n = net("mlp_tanh")
    with pytest.raises(InputError, match=r"33 rows .*above max_rows = 32[\s\S]*lanczos\(operator='ggn'\)"):
        fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn, max_rows=32)
    with pytest.raises(BasisMemoryError, match=r"33 rows .*need[\s\S]*lanczos\(operator='ggn'\)"):
        fastsharp.ggn_spectrum(n.model, n.batches, n.loss_fn, memory=20_000)


def test_a_loss_that_couples_samples_is_refused():
    model, batch = nn.Linear(4, 2).double(), (torch.randn(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    with pytest.raises(InputError, match="couples the samples"):
        fastsharp.ggn_spectrum(model, batch, lambda z, y: z.mean(0).square().sum(), reduction="mean")


def test_a_matrix_and_bad_arguments_are_refused():
    with pytest.raises(ArgumentTypeError, match=r"torch\.nn\.Module"):
        fastsharp.ggn_spectrum(torch.eye(3), None)
    n = net("mlp_tanh")
    with pytest.raises(ArgumentTypeError, match="vectors"):
        fastsharp.ggn_spectrum(n.model, n.batches, vectors=-1)
    with pytest.raises(InputError, match="max_rows"):
        fastsharp.ggn_spectrum(n.model, n.batches, max_rows=0)


def test_a_linear_loss_has_a_zero_matrix():
    n = net("mlp_tanh")
    found = fastsharp.ggn_spectrum(n.model, n.batches, lambda z, y: z.mean(), reduction="mean", preflight="off")
    assert len(found) == 0 and found.trace == 0.0 and found.logdet(1.0) == 0.0
