"""fastsharp.lanczos of a list of models: the results of single calls, whatever multiplies, and errors that name the member."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsharp
from fastsharp.api import ensemble_check
from fastsharp.api.ensemble import loaders_of
from fastsharp.curvature.ensemble import MlpEnsemble
from fastsharp.errors import (
    ArgumentTypeError,
    BatchFormatError,
    EngineError,
    InputError,
    LabelError,
    ModelModeError,
    NondeterministicOperatorError,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotSymmetricError,
    UnstableDataWarning,
)

F64 = torch.float64


def net(seed: int, dtype: torch.dtype = F64, middle: Any = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), middle(), nn.Linear(12, 3)).to(dtype)


def data(seed: int, N: int = 30, dtype: torch.dtype = F64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(N, 4, generator=g, dtype=F64).to(dtype), torch.randint(0, 3, (N,), generator=g))]


def counted(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_values_are_those_of_single_calls(operator: str, loss: Any) -> None:
    models, loaders = [net(e) for e in range(4)], [data(e + 10) for e in range(4)]
    together = fastsharp.lanczos(models, loaders, loss, k=2, operator=operator, tol=1e-6)
    for model, loader, result in zip(models, loaders, together, strict=True):
        single = fastsharp.lanczos(model, loader, loss, k=2, operator=operator, tol=1e-6, backend="autograd")
        torch.testing.assert_close(result.eigenvalues, single.eigenvalues, rtol=1e-10, atol=0)
        torch.testing.assert_close(result.residuals, single.residuals, rtol=1e-3, atol=1e-12)
        assert (result.n_matvec, result.n_verify) == (single.n_matvec, single.n_verify)
        assert bool(result.converged.all()) and result.verified
        assert set(result.settings) == {*single.settings, "ensemble"} and result.settings["ensemble"] == 4
        assert result.provenance == single.provenance and result.layout == single.layout
        assert result.notes == single.notes
    smooth = loss is not None and loss.label_smoothing > 0
    assert (together[0].settings["backend"] == "mlp") is not smooth  # a loss without a native kernel goes member by member


def test_a_loss_that_states_its_count() -> None:
    models, loaders = [net(0), net(1)], [data(2), data(3)]
    for model, loader, result in zip(models, loaders, fastsharp.lanczos(models, loaders, fastsharp.batch_loss(counted), k=1), strict=True):
        single = fastsharp.lanczos(model, loader, fastsharp.batch_loss(counted), k=1, backend="autograd")
        torch.testing.assert_close(result.eigenvalues, single.eigenvalues, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_other_sizes_and_layers_go_member_by_member(dtype: torch.dtype) -> None:
    models, loaders = [net(e, dtype, nn.Softplus) for e in range(2)], [data(5, 30, dtype), data(6, 20, dtype)]
    for model, loader, result in zip(models, loaders, fastsharp.lanczos(models, loaders, k=2), strict=True):
        single = fastsharp.lanczos(model, loader, k=2)
        torch.testing.assert_close(result.eigenvalues, single.eigenvalues, rtol=1e-5, atol=0)
        assert result.settings["backend"] == single.settings["backend"] and result.notes == single.notes


def test_one_loader_for_all() -> None:
    models, shared = [net(e) for e in range(3)], data(4)
    x, y = shared[0]
    dataset = TensorDataset(x, y)
    own = fastsharp.lanczos(models, [shared] * 3, k=1)
    for loader in (shared, shared[0], dataset, DataLoader(dataset, batch_size=30), (batch for batch in shared)):
        for a, b in zip(fastsharp.lanczos(models, loader, k=1), own, strict=True):
            assert torch.equal(a.eigenvalues, b.eigenvalues)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    for a, b in zip(fastsharp.lanczos(models[:2], batches, k=1, tol=1e-6), own, strict=False):
        assert float(a.eigenvalues[0]) == pytest.approx(float(b.eigenvalues[0]), rel=1e-5)


def test_what_a_list_of_loaders_is() -> None:
    (batch,) = data(0)
    lists = [[batch], [batch]]
    assert loaders_of(lists, 2) == lists
    for one in ([batch, batch], [list(batch), list(batch)], [{"x": batch[0]}, {"x": batch[0]}], list(batch)):
        assert all(got is one for got in loaders_of(one, 2))
    dataset = TensorDataset(*batch)
    assert loaders_of([dataset, dataset], 2) == [dataset, dataset]
    with pytest.raises(InputError, match="3 loaders for 2 models"):
        loaders_of([[batch]] * 3, 2)
    with pytest.raises(InputError, match="entry 1 of the loaders is a batch, entry 0 a loader"):
        loaders_of([[batch], batch], 2)
    with pytest.raises(InputError, match="models need data"):
        loaders_of(None, 2)


def test_errors_name_the_member() -> None:
    models, loaders = [net(e) for e in range(4)], [data(e) for e in range(4)]
    bad = [*loaders[:3], [(loaders[3][0][0], loaders[3][0][1] + 5)]]
    with pytest.raises(LabelError, match=r"^member 3: label"):
        fastsharp.lanczos(models, bad)
    with pytest.raises(BatchFormatError, match=r"^member 1: "):
        fastsharp.lanczos(models, [loaders[0], [(loaders[1][0][0],) * 3], *loaders[2:]])
    with pytest.raises(InputError, match=r"^member 2: 0.weight has shape \(5, 4\), in member 0 \(12, 4\)"):
        fastsharp.lanczos([*models[:2], nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))], loaders[:3])
    with pytest.raises(ArgumentTypeError, match=r"^member 1: a Tensor"):
        fastsharp.lanczos([models[0], torch.eye(3)], loaders[:2])
    with pytest.raises(InputError, match="list of models is empty"):
        fastsharp.lanczos([], loaders)
    with pytest.raises(InputError, match="resume= is for one model"):
        fastsharp.lanczos(models, loaders, resume="log")
    with pytest.raises(ModelModeError, match=r"^member 1: Dropout"):
        fastsharp.lanczos([net(0), net(0, middle=nn.Dropout)], loaders[:2])
    with torch.no_grad():
        models[2][0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^member 2: "):
        fastsharp.lanczos(models, loaders)
    with pytest.raises(InputError, match="k is 0"):
        fastsharp.lanczos(models[:2], loaders[:2], k=0)


def test_not_converged() -> None:
    models, loaders = [net(e) for e in range(2)], [data(e) for e in range(2)]
    with pytest.warns(NotConvergedWarning) as caught:
        fastsharp.lanczos(models, loaders, k=2, max_iter=3)
    assert [str(w.message)[:9] for w in caught] == ["member 0:", "member 1:"] and all(w.filename == __file__ for w in caught)
    with pytest.raises(NotConvergedError, match=r"^member 0: lanczos: "):
        fastsharp.lanczos(models, loaders, k=2, max_iter=3, strict=True)


def test_models_and_data_are_left_alone() -> None:
    models, loaders = [net(e) for e in range(2)], [data(e) for e in range(2)]
    before = [{name: (t.clone(), t._version) for name, t in m.state_dict().items()} for m in models]
    state = torch.get_rng_state()
    fastsharp.lanczos(models, loaders, k=1)
    assert torch.equal(torch.get_rng_state(), state)
    for m, kept in zip(models, before, strict=True):
        assert all(torch.equal(t, kept[name][0]) and t._version == kept[name][1] for name, t in m.state_dict().items())
        assert all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize("level", ["off", "fast", "full"])
def test_what_the_preflight_did_is_said(level: str) -> None:
    models, loaders = [net(e) for e in range(3)], [data(e) for e in range(3)]
    first, second, _ = fastsharp.lanczos(models, loaders, k=1, preflight=level)
    assert first.settings["preflight"]["level"] == second.settings["preflight"]["level"] == level
    if level == "off":
        assert "unchecked: preflight='off'" in second.notes
    elif level == "fast":
        for measured in (first.settings["preflight"], second.settings["preflight"]):
            assert max(measured["engine"], measured["rounding"]) < 1e-12 and measured["finite_difference"] < 1e-7
            assert measured["repeat"] == 0.0 and measured["symmetry"] < 4e-15 and measured["data"] == "read once"
    else:
        assert second.settings["preflight"]["finite_difference"] < 1e-5


def test_members_that_a_gate_stops_are_asked_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's fault is the kernel's; what rounding or a kink does is settled by the member's own preflight."""
    models, loaders = [net(e) for e in range(4)], [data(e) for e in range(4)]
    plain = MlpEnsemble._apply

    def wrong(self: MlpEnsemble, V: torch.Tensor, member: torch.Tensor, out: torch.Tensor) -> None:
        plain(self, V, member, out)
        out[member == 2] *= 1.02

    monkeypatch.setattr(MlpEnsemble, "_apply", wrong)
    with pytest.raises(EngineError, match=r"^member 2: a product of backend='mlp' misses autograd's by 2\.0e-02"):
        fastsharp.lanczos(models, loaders, k=1)

    def crooked(self: MlpEnsemble, V: torch.Tensor, member: torch.Tensor, out: torch.Tensor) -> None:
        plain(self, V, member, out)
        out[member == 1] += 1e-9 * V[member == 1].roll(1, 1)

    monkeypatch.setattr(MlpEnsemble, "_apply", crooked)
    with pytest.raises(NotSymmetricError, match=r"^member 1: "):
        fastsharp.lanczos(models, loaders, k=1)
    monkeypatch.undo()
    asked: list[int] = []
    measured = ensemble_check._measured

    def kink(*args: Any) -> Any:
        rows = measured(*args)
        rows[3]["finite_difference"] = 2e-5
        return rows

    own = ensemble_check.preflight
    monkeypatch.setattr(ensemble_check, "_measured", kink)
    monkeypatch.setattr(ensemble_check, "preflight", lambda operator, *a, **k: (asked.append(operator), own(operator, *a, **k))[1])
    last = fastsharp.lanczos(models, loaders, k=1)[3]
    assert [operator.objective.model for operator in asked] == [models[0], models[3]]
    assert last.settings["preflight"]["finite_difference"] < 1e-7


def test_a_forward_that_draws_is_seen() -> None:
    class Noisy(nn.Module):
        def __init__(self, seed: int, noise: float) -> None:
            super().__init__()
            self.inner, self.noise = net(seed), noise

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x + self.noise * torch.randn_like(x) if self.noise else x)

    with pytest.raises(NondeterministicOperatorError, match=r"^member 2: "):
        fastsharp.lanczos([Noisy(e, 0.1 * (e == 2)) for e in range(4)], [data(e) for e in range(4)], k=1)


def test_stacked_parameters() -> None:
    models, loaders = [net(e) for e in range(3)], [data(e) for e in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    template, before = net(7), net(7)
    found = fastsharp.lanczos((template, stacked), loaders, k=1)
    for a, b in zip(found, fastsharp.lanczos(models, loaders, k=1), strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues) and a.provenance == b.provenance
    assert all(torch.equal(p, q) for p, q in zip(template.parameters(), before.parameters(), strict=True))
    with pytest.raises(InputError, match=r"unknown or missing: 0\.bias"):
        fastsharp.lanczos((template, {k: v for k, v in stacked.items() if k != "0.bias"}), loaders)
    with pytest.raises(InputError, match=r"0.bias is torch.float64 \(3, 11\), expected torch.float64 \(members, 12\)"):
        fastsharp.lanczos((template, stacked | {"0.bias": stacked["0.bias"][:, 1:]}), loaders)
    with pytest.raises(InputError, match="unlike first dimensions"):
        fastsharp.lanczos((template, stacked | {"0.bias": stacked["0.bias"][1:]}), loaders)


def test_a_generator_for_each() -> None:
    models = [net(e) for e in range(3)]
    lists = [data(e) for e in range(3)]
    for a, b in zip(
        fastsharp.lanczos(models, [iter(d) for d in lists], k=1, preflight="off"),
        fastsharp.lanczos(models, lists, k=1, preflight="off"),
        strict=True,
    ):
        assert torch.equal(a.eigenvalues, b.eigenvalues)


def test_a_loader_that_changes_is_seen() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            x, y = super().__getitem__(i)
            return x + torch.randn(()), y

    loaders = [data(0), DataLoader(Noisy(*data(1)[0]), batch_size=30)]
    with pytest.warns(UnstableDataWarning):
        fastsharp.lanczos([net(0), net(1)], loaders, k=1)


def test_a_long_list_is_no_faster_than_right() -> None:
    """The kernel's rows and members stay in step where members finish at different times."""
    models, loaders = [net(e, torch.float32) for e in range(12)], [data(e, 30, torch.float32) for e in range(12)]
    with torch.no_grad():
        for e, m in enumerate(models):
            m[0].weight.mul_(1.0 + e)
    together = fastsharp.lanczos(models, loaders, k=3, preflight="off")
    assert len({r.n_matvec for r in together}) > 2
    for model, loader, result in zip(models, loaders, together, strict=True):
        single = fastsharp.lanczos(model, loader, k=3, backend="autograd", preflight="off")
        torch.testing.assert_close(result.eigenvalues, single.eigenvalues, rtol=1e-5, atol=1e-6 * float(single.eigenvalues[0]))
