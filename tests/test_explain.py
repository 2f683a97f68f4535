"""`explain`: the backend that a run takes, the reasons of the others, and every call that depends on the parameters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsharp
from fastsharp.curvature.rop.rule import RULES
from fastsharp.errors import DisconnectedLossError, DoubleBackwardError, EmptyLoaderError, InputError, ModelModeError
from fastsharp.results import Calls
from tests.unchanged import unchanged

ATEN = torch.ops.aten


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, (torch.randn(9, 5), torch.arange(9) % 3)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, y_g):
        return 2.0 * y_g


class Once(Doubled):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, y_g):
        return 2.0 * y_g


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.net, self.function = problem()[0], function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.net(x))


def test_every_call_is_there_with_its_modules():
    model, batch = problem()
    with unchanged(model, *batch):
        explanation = fastsharp.explain(model, batch, nn.CrossEntropyLoss())
    assert explanation.backend in ("mlp", "rop") and explanation.refusals == {}  # the kernel where it is built
    by_name = {c.op: c for c in explanation.calls}
    assert by_name["tanh.default"] == Calls("tanh.default", 2, "rule", ("1", "3"))
    assert by_name["linear"].count == 3 and by_name["linear"].modules == ("0", "2", "4")
    assert [c.count for c in explanation.calls] == sorted((c.count for c in explanation.calls), reverse=True)


def test_it_is_what_a_run_does():
    model, batch = problem()
    explanation = fastsharp.explain(model, batch, nn.CrossEntropyLoss())
    result = fastsharp.lanczos(model, batch, nn.CrossEntropyLoss(), k=1)
    assert result.settings["backend"] == explanation.backend
    assert any("double backward of one call" in note for note in result.notes) == bool(explanation.islands)


def test_a_call_without_a_rule_is_an_island(monkeypatch):
    monkeypatch.delitem(RULES, ATEN.tanh.default)
    model, batch = problem()
    explanation = fastsharp.explain(model, batch)
    assert "tanh.default" in explanation.islands
    assert Calls("tanh.default", 2, "island", ("1", "3")) in explanation.calls
    line = next(line for line in str(explanation).splitlines() if line.startswith("tanh.default"))
    assert line.split() == ["tanh.default", "2", "island", "1,", "3"]


def test_what_cannot_be_recorded_is_named():
    model, batch = Custom(Doubled), problem()[1]
    explanation = fastsharp.explain(model, batch)
    assert explanation.backend == "autograd" and explanation.calls == () and explanation.islands == ()
    assert "Doubled" in explanation.refusals["rop"]
    notes = fastsharp.lanczos(model, batch, k=1).notes
    assert f"products by autograd: {explanation.refusals['rop']}" in notes
    text = str(explanation).splitlines()
    assert text[0] == "backend='auto' takes 'autograd'"
    assert f"'rop' is not available: {explanation.refusals['rop']}" in text


def test_the_native_kernel_says_why_not():
    model, (x, y) = problem()
    smoothed = fastsharp.explain(model, (x, y), nn.CrossEntropyLoss(label_smoothing=0.1))
    assert list(smoothed.refusals) == ["mlp"] and "label smoothing" in smoothed.refusals["mlp"]


def test_frozen_parameters_make_no_calls():
    model, batch = problem()
    count = {c.op: c.count for c in fastsharp.explain(model, batch, params="4.*").calls}
    assert count["linear"] == 1 and "tanh.default" not in count


def test_of_a_loader_the_first_batch_is_taken():
    model, (x, y) = problem()
    want = fastsharp.explain(model, (x[:4], y[:4]))

    def batches():
        yield x[:4], y[:4]
        raise AssertionError("the second batch was read")

    for data in (batches(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4), [(x[:4], y[:4]), (x, y)]):
        got = fastsharp.explain(model, data)
        assert (got.backend, got.refusals, got.calls) == (want.backend, want.refusals, want.calls)


@pytest.mark.parametrize(
    ("model", "loss_fn", "error"),
    [
        (Custom(Once), F.cross_entropy, DoubleBackwardError),
        (nn.Sequential(problem()[0], nn.Dropout()), F.cross_entropy, ModelModeError),
        (problem()[0], lambda z, y: F.cross_entropy(z.detach(), y), DisconnectedLossError),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_models_that_lanczos_refuses_are_refused(model, loss_fn, error):
    for call in (fastsharp.explain, fastsharp.lanczos):
        with pytest.raises(error):
            call(model, problem()[1], loss_fn)


def test_no_data():
    with pytest.raises(EmptyLoaderError):
        fastsharp.explain(problem()[0], [])


def test_an_explanation_is_frozen():
    explanation = fastsharp.explain(*problem())
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.backend = "mlp"


def test_many_modules_are_cut_short():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    line = next(s for s in str(fastsharp.explain(model, (torch.randn(4, 3), torch.arange(4) % 3))).splitlines() if s.startswith("linear"))
    assert line.endswith("0, 1, 2, 3 and 5 more")


def test_the_gauss_newton_matrix_and_its_refusal():
    model, (x, y) = problem()
    with unchanged(model, x, y):
        explanation = fastsharp.explain(model, (x, y), nn.CrossEntropyLoss(), operator="ggn")
    assert explanation.backend == "mlp" and explanation.calls
    with pytest.raises(InputError, match="operator='fischer' is none of 'hessian', 'ggn'"):
        fastsharp.explain(model, (x, y), nn.CrossEntropyLoss(), operator="fischer")

    def penalised(z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z, target) + model[0].weight.square().sum()

    assert fastsharp.explain(model, (x, y), penalised).backend == "rop"
    with pytest.raises(InputError, match="not only through the network's output"):
        fastsharp.explain(model, (x, y), penalised, operator="ggn")


def test_why_products_would_not_be_cuda_graphs():
    model, batch = problem()
    assert fastsharp.explain(model, batch, lambda z, target: F.cross_entropy(z, target)).cuda_graph == ""  # by the engine
    assert fastsharp.explain(model, batch, nn.CrossEntropyLoss()).cuda_graph == "the native kernel takes a batch in one launch or two"
    custom = fastsharp.explain(Custom(Doubled), batch, nn.CrossEntropyLoss())
    assert custom.cuda_graph == "autograd walks its graph on the host" and f": {custom.cuda_graph}" in str(custom)
