"""`fastsharp.lanczos` from end to end: results, Ctrl-C, and what a user's session looks like afterwards."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.errors import FastsharpError, Interrupted, NotConvergedError, NotConvergedWarning
from tests.cases import net
from tests.curvature.checks import exact, spectrum
from tests.unchanged import check_message, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")


class Bell(torch.autograd.Function):
    """The identity, which rings at every second derivative."""

    ring: Any = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Bell.ring()
        return Bell.apply(grad)


class Ringing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Bell.apply(self.inner(x))


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """interrupted_at(j): the j-th backward through a Bell raises KeyboardInterrupt."""

    def at(j: int | None) -> list[int]:
        rung: list[int] = []

        def ring() -> None:
            rung.append(1)
            if len(rung) == j:
                raise KeyboardInterrupt

        monkeypatch.setattr(Bell, "ring", staticmethod(ring))
        return rung

    return at


def run(model: nn.Module, **options: Any) -> fastsharp.Eigenpairs:
    n = net("mlp_tanh")
    return fastsharp.lanczos(model, n.batches, n.loss_fn, **({"method": "lanczos", "tol": 1e-8} | options))


# --- results -----------------------------------------------------------------------------------------------------------


def test_values_and_vectors_unpack():
    n = net("mlp_tanh")
    values, vectors = run(n.model)
    assert values.dtype == torch.float64 and values.shape == (5,) and vectors.shape == (5, 131)
    H = exact("mlp_tanh")
    assert float((vectors @ H - values[:, None] * vectors).norm(dim=1).max()) <= 1e-8 * float(values[0])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("method", ["lanczos", "dense"])
def test_which_end_of_the_spectrum(which, method):
    n = net("regression")
    exact_values = spectrum("regression")
    want = {
        "LA": exact_values[:4],
        "SA": exact_values[-4:],
        "LM": exact_values[exact_values.abs().argsort(descending=True)][:4],
        "BE": torch.cat([exact_values[:2], exact_values[-2:]]),
    }[which]
    result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=4, which=which, method=method, tol=1e-8)
    assert float((result.eigenvalues - want).abs().max()) <= 1e-10 * float(exact_values.abs().max())


def test_true_residuals_are_those_of_the_dense_hessian():
    n = net("vit_block", torch.float32)
    result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, method="lanczos")
    X = result.eigenvectors.double()
    true = (X @ exact("vit_block") - result.eigenvalues[:, None] * X).norm(dim=1)
    assert float((result.residuals - true).abs().max()) <= 1e-5 * float(spectrum("vit_block")[0])  # P4, for a float32 product
    assert result.verified and result.n_verify == 5
    nearest = (result.eigenvalues[:, None] - spectrum("vit_block")).abs().min(1).values
    assert bool((nearest <= result.error_bounds + 1e-5 * spectrum("vit_block")[0]).all())


def test_an_operator_and_its_model_give_the_same_bits():
    n = net("mlp_tanh", torch.float32)
    direct = run(n.model.double())
    H = fastsharp.Hessian(n.model, net("mlp_tanh").batches, nn.CrossEntropyLoss())
    through = fastsharp.lanczos(H, method="lanczos", tol=1e-8)
    assert torch.equal(direct.eigenvalues, through.eigenvalues) and torch.equal(direct.eigenvectors, through.eigenvectors)


def test_the_same_seed_gives_the_same_bits_whatever_the_global_state():  # P28
    n = net("mlp_tanh", torch.float32)
    first = run(n.model.double(), seed=3)
    torch.manual_seed(99)
    second = run(n.model, seed=3)
    assert torch.equal(first.eigenvalues, second.eigenvalues) and torch.equal(first.eigenvectors, second.eigenvectors)
    assert not torch.equal(run(n.model, seed=4).eigenvectors, first.eigenvectors)


def test_not_converged_warns_or_raises_with_what_there_is():
    n = net("mlp_tanh")
    with unchanged(n.model), pytest.warns(NotConvergedWarning) as caught:
        result = run(n.model, max_iter=8)
    warning = next(w.message for w in caught if isinstance(w.message, NotConvergedWarning))
    assert torch.equal(warning.partial.eigenvalues, result.eigenvalues) and not bool(result.converged.all())
    with unchanged(n.model), pytest.raises(NotConvergedError) as strict:
        run(n.model, max_iter=8, strict=True)
    assert torch.equal(strict.value.partial.eigenvalues, result.eigenvalues)
    check_message(strict.value, "8 products", "max_iter")


def test_what_a_result_says_of_itself():
    n = net("frozen", torch.float32)
    result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=2)
    assert result.settings["operator"] == "hessian" and result.settings["reduction"] == "mean"
    assert result.settings["k"] == 2 and result.settings["which"] == "LA"
    assert result.provenance["params"][0] == "0.weight" and result.provenance["torch"] == torch.__version__
    parts = result.as_dict(1)
    assert torch.equal(torch.cat([p.reshape(-1) for p in parts.values()]), result.eigenvectors[1])
    assert parts["0.weight"].shape == n.model[0].weight.shape


def test_every_argument_is_documented():
    signature = inspect.signature(fastsharp.lanczos)
    doc = fastsharp.lanczos.__doc__ or ""
    for name in signature.parameters:
        assert name in doc, name


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["auto", 64], ids=["kept", "streamed"])
def test_ctrl_c_at_any_product_leaves_no_trace_and_carries_the_pairs_so_far(interrupted_at, memory):
    model = Ringing(net("mlp_tanh").model)
    rung = interrupted_at(None)
    full = run(model, memory=memory)
    total = len(rung)
    carried = []
    for j in sorted({1, 2, 5, *range(8, total, max(1, total // 8)), total}):
        interrupted_at(j)
        with unchanged(model), pytest.raises(Interrupted) as caught:
            run(model, memory=memory)
        check_message(caught.value, "interrupted")
        carried.append(caught.value.partial)
    assert carried[0] is None and carried[-1] is not None
    last = carried[-1]
    assert not last.verified and len(last) == 5
    assert float((last.eigenvalues - full.eigenvalues).abs().max()) <= 1e-8  # only its verification was missing
    interrupted_at(None)
    assert torch.equal(run(model, memory=memory).eigenvalues, full.eigenvalues)


def test_ctrl_c_in_the_loss_leaves_no_trace():
    n = net("cnn_batchnorm_eval", torch.float32)
    calls: list[int] = []
    broken = [0]

    def loss(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == broken[0]:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(o, t)

    for p in n.model.parameters():
        p.grad = torch.randn_like(p)
    fastsharp.lanczos(n.model, n.batches, loss, k=1, tol=1e-2)
    total = len(calls)
    for broken[0] in range(1, total + 1):
        calls.clear()
        with unchanged(n.model), pytest.raises(KeyboardInterrupt) as caught:
            fastsharp.lanczos(n.model, n.batches, loss, k=1, tol=1e-2)
        assert isinstance(caught.value, Interrupted) and caught.value.partial is None


def test_ctrl_c_while_a_block_is_multiplied_leaves_the_operator_usable(interrupted_at):
    n = net("mlp_tanh")
    model = Ringing(n.model)
    interrupted_at(None)
    V = torch.randn(4, 131, dtype=torch.float64)
    want = fastsharp.Hessian(model, n.batches, n.loss_fn).apply(V)
    for j in range(1, 14):
        H = fastsharp.Hessian(model, n.batches, n.loss_fn)
        interrupted_at(j)
        with pytest.raises(KeyboardInterrupt):
            H.apply(V)
        interrupted_at(None)
        assert torch.equal(H.apply(V), want)


def test_any_other_error_carries_the_pairs_so_far_too(interrupted_at, monkeypatch):
    model = Ringing(net("mlp_tanh").model)
    rung: list[int] = []

    def ring() -> None:
        rung.append(1)
        if len(rung) == 80:
            raise OSError("the disk is gone")

    monkeypatch.setattr(Bell, "ring", staticmethod(ring))
    with unchanged(model), pytest.raises(OSError, match="the disk is gone") as caught:
        run(model)
    assert len(caught.value.partial) >= 1


# --- a session ---------------------------------------------------------------------------------------------------------


def test_training_goes_on_as_if_nothing_had_been_measured():
    def train(measure: bool) -> list[torch.Tensor]:
        torch.manual_seed(7)
        n = net("mlp_relu", torch.float32)
        model = nn.Sequential(*n.model, nn.BatchNorm1d(3), nn.Dropout(0.3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*n.whole), batch_size=4, shuffle=True, drop_last=True)
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                if measure:
                    with pytest.warns(UserWarning):
                        fastsharp.lanczos(model, loader, k=1, bn="eval", dropout="eval", tol=1e-2, preflight="full")
                optimizer.step()
        return [t.clone() for t in model.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_errors_are_caught_by_one_name():
    with pytest.raises(FastsharpError):
        fastsharp.lanczos(nn.Linear(2, 2), [])
