"""Rescalings that leave the decisions as they are: found where they hold and nowhere else, and what they do to each measure."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.api.measures_named import DEFAULT, MEASURES
from fastsharp.errors import (
    ArgumentTypeError,
    InputError,
    Interrupted,
    LabelShapeError,
    ModelModeError,
    NondeterministicOperatorError,
    NonFiniteError,
)
from fastsharp.measures.rescaling import Outputs, Scaling, layer_scalings
from fastsharp.objective import Objective
from fastsharp.report.meaning import MEANINGS
from tests.cases import net
from tests.oracles import measures as oracle
from tests.oracles.dense import dense_hessian
from tests.unchanged import unchanged

OUTPUTS = ["margin", "logit_scale"]


def data(count: int = 24, width: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=g, dtype=torch.float64), torch.arange(count) % classes


def relu_net(*, bias: bool = False, widths: tuple[int, ...] = (5, 4, 3, 3), seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
        made = nn.Sequential(*layers[:-1]).double()
        for p in made.parameters():
            p.data.mul_(1.5)
    return made


def rescaled(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    """A copy whose parameters of these names are multiplied."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        p.data.mul_(factors.get(name, 1.0))
    return model


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# --- values against their definitions at weights rescaled by hand ------------------------------------------------------


def literal(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """What tests/oracles says of a model."""
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, loss, batch).double())
    one_by_one = lambda f, y: F.cross_entropy(f, y)  # noqa: E731
    with torch.no_grad():
        logits = model(batch[0])
    far = oracle.distances(model, batch)
    return {
        "lambda_max": float(eigenvalues[-1]),
        "lambda_min": float(eigenvalues[0]),
        "trace": float(eigenvalues.sum()),
        "frobenius": float(eigenvalues.norm()),
        "fisher_rao": oracle.fisher_rao_norm(model, batch, one_by_one),
        "relative_flatness": oracle.relative_flatness_as_published(model, batch, "4", loss, normalize=True)[0],
        "margin": float(oracle.margins(logits.numpy(), batch[1].numpy()).mean()),
        "logit_scale": float((logits - logits.mean(1, keepdim=True)).norm(dim=1).mean()),
        "boundary_tightness": 1 / float(abs(far[np.isfinite(far)]).mean()),  # without samples whose units are all dead
        "input_jacobian": float(oracle.input_jacobian_norms(model, batch).mean()),
    }


def test_values_are_those_of_models_rescaled_by_hand() -> None:
    """The Krylov space of 41 coordinates is exhausted, so that trace and norm are exact too."""
    model, batch = relu_net(), data()
    found = fastsharp.invariance(model, [(batch[0][:16], batch[1][:16]), (batch[0][16:], batch[1][16:])], measures=list(MEASURES), factor=3)
    by_hand = {
        "0 x 3, 2 / 3": {"0.weight": 3.0, "2.weight": 1 / 3},
        "2 x 3, 4 / 3": {"2.weight": 3.0, "4.weight": 1 / 3},
        "temperature 2": {"4.weight": 0.5},
    }
    assert found.rescalings == found.applicable == tuple(by_hand) and found.kinds == ("layers", "layers", "temperature")
    for row, base, factors in [(None, found.base, {}), *((i, found.values[i], f) for i, f in enumerate(by_hand.values()))]:
        truth = literal(rescaled(model, factors), batch)
        for name, value in truth.items():
            at = found.measures.index(name)
            got = float(base[at])
            # 1e-3 of the residual makes 1e-6 of an eigenvalue; the rest are sums in float64
            assert got == pytest.approx(value, rel=1e-5), (row, name)


def test_power_of_two_changes_no_bit_of_the_outputs() -> None:
    found = fastsharp.invariance(relu_net(bias=True), data(), measures=OUTPUTS, factor=4.0, temperature=0.5)
    assert found.outputs.tolist() == [0.0] * 3
    assert found.ratios.tolist() == [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("factor", [3.0, 1 / 7, 0.25, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_hides_no_rescaling(factor: float, dtype: torch.dtype) -> None:
    x, y = data()
    found = fastsharp.invariance(relu_net(bias=True, widths=(5, 8, 8, 8, 3)).to(dtype), (x.to(dtype), y), measures=OUTPUTS, factor=factor)
    assert len(found.applicable) == 4 and not found.refused
    assert float(found.outputs.max()) <= 100 * torch.finfo(dtype).eps
    assert not bool(found.moved[:3].any()) and bool(found.moved[3].all())


# --- what survives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_the_table_of_meanings_says_what_is_measured(name: str) -> None:
    """Bias-free ReLU net: "survives" in `report.meaning` is what the rescalings show."""
    found = fastsharp.invariance(relu_net(), data(), measures=name, directions=200)
    assert found.survives(name, "layers") is MEANINGS[name].rescaling, found.ratios
    assert found.survives(name, "temperature") is MEANINGS[name].temperature, found.ratios


REPORTED = ("curvature", "gauss-newton", "perturbation", "trajectory", "function")


def test_the_table_of_meanings_holds_for_a_whole_report() -> None:
    """All that `measure` reports of a net so small that its Krylov space is exhausted: nothing is left to probes but the share below zero."""
    model, batch = relu_net(), data()
    variants = (model, rescaled(model, {"0.weight": 4.0, "2.weight": 0.25}), rescaled(model, {"4.weight": 0.5}))
    base, layers, temperature = (fastsharp.measure(m, batch, parts=REPORTED, k=2, preflight="off") for m in variants)
    names = set(base.measures) - {"negative_share"}
    assert len(names) >= 24
    for name in names:
        for report, stated in ((layers, MEANINGS[name].rescaling), (temperature, MEANINGS[name].temperature)):
            same = report[name].value == pytest.approx(base[name].value, rel=1e-3, nan_ok=True)
            assert same or not stated, name
            assert stated or not same or name == "outliers", name  # a count may be the same by chance


def test_the_number_of_negative_eigenvalues_survives_rescaled_layers_alone() -> None:
    """H' = D^-1 H D^-1: inertia (Sylvester); a temperature changes the loss itself."""
    model, batch = relu_net(seed=4), data()

    def negative(m: nn.Module) -> int:
        values = torch.linalg.eigvalsh(dense_hessian(m, loss, batch).double())
        return int((values < -1e-10 * values.abs().max()).sum())

    assert negative(rescaled(model, {"0.weight": 4.0, "2.weight": 0.25})) == negative(model) > 0
    assert negative(rescaled(model, {"4.weight": 1 / 16})) != negative(model)
    assert MEANINGS["negative_share"][2:] == (True, False)


@pytest.mark.parametrize("which", ["bias", "batchnorm"])
def test_with_biases_the_layers_scale_sees_a_rescaling_and_the_filters_does_not(which: str) -> None:
    """A bias of B stays while its weight is divided, so that the module's perturbation is no longer in proportion; filters have no biases."""
    batch = data()
    if which == "bias":
        model: nn.Module = relu_net(bias=True)
        factors = {"0.weight": 4.0, "0.bias": 4.0, "2.weight": 0.25}
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
        factors = {"1.weight": 4.0, "1.bias": 4.0, "3.weight": 0.25}
    other = rescaled(model, factors)
    assert (model(batch[0]) - other(batch[0])).abs().max() < 1e-14
    for scale, kind, survives in (("layer", "sam", False), ("filter", "sam", True), ("adaptive", "ascent", True), ("none", "sam", False)):
        mine, yours = (fastsharp.sharpness(m, batch, kind=kind, scale=scale, rho=0.05) for m in (model, other))
        moved = float((mine.changes - yours.changes).abs().max())
        assert (moved < 1e-13) is survives, (scale, moved)
    # any rescaling theta' = D theta has D g' = g, so <g', theta'> = <g, theta>: biases and norms do not matter
    assert float(fastsharp.fisher_rao(other, batch)) == pytest.approx(float(fastsharp.fisher_rao(model, batch)), rel=1e-12)


# --- what is found -------------------------------------------------------------------------------------------------------


def scalings(model: nn.Module, batch: Any, loss_fn: Any = None, t: float = 4.0) -> tuple[list[str], dict[str, str]]:
    found, refused = layer_scalings(Outputs(Objective(model, batch, loss_fn), 0), t)
    return [s.name for s in found], refused


def test_layers_around_homogeneous_activations_are_found() -> None:
    layers = [
        nn.Linear(5, 6),
        nn.LeakyReLU(),
        nn.Dropout(0.5),
        nn.Linear(6, 6),
        nn.PReLU(),
        nn.Linear(6, 6),
        nn.Identity(),
        nn.Linear(6, 3),
    ]
    found, refused = scalings(nn.Sequential(*layers).double().eval(), data())
    assert found == ["0 x 4, 3 / 4", "3 x 4, 5 / 4", "5 x 4, 7 / 4"] and not refused


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.ELU, nn.Hardswish, nn.ReLU6])
def test_other_activations_are_refused_by_what_they_do(activation: type[nn.Module]) -> None:
    found, refused = scalings(nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 3)).double(), data(), t=64.0)
    assert not found and list(refused) == ["0 -> 2"]
    assert activation.__name__ in refused["0 -> 2"] and "of the largest" in refused["0 -> 2"]


class Nearly(nn.Module):
    """relu(x) and a little that is not homogeneous."""

    def __init__(self, little: float) -> None:
        super().__init__()
        self.little = little

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() + self.little * x.tanh()


@pytest.mark.parametrize("little", [0.0, 1e-10, 1e-4, 1e-2])
def test_nearly_homogeneous_is_not_homogeneous(little: float) -> None:
    found, refused = scalings(nn.Sequential(nn.Linear(5, 6), Nearly(little), nn.Linear(6, 3)).double(), data())
    assert (len(found), len(refused)) == ((1, 0) if little == 0 else (0, 1))


def test_normalisation_carries_the_factor_in_place_of_the_layer_before_it() -> None:
    case = net("cnn_batchnorm_eval")
    found, refused = scalings(case.model, case.batches, case.loss_fn)
    assert found == ["1 x 4, 4 / 4"]  # conv, BatchNorm, ReLU, MaxPool, conv
    assert list(refused) == ["4 -> 8"] and "GELU" in refused["4 -> 8"]
    plain = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, elementwise_affine=False), nn.ReLU(), nn.Linear(6, 3)).double()
    found, refused = scalings(plain, data())
    assert not found and "LayerNorm" in refused["0 -> 3"]


def test_what_else_reads_a_layer_refuses_it() -> None:
    case = net("cnn_residual")
    found, refused = scalings(case.model, case.batches, case.loss_fn)
    assert not found and list(refused) == ["stem -> conv", "conv -> head"]
    assert "no module lies between" in refused["conv -> head"]


def test_attention_has_rescalings_through_its_norm() -> None:
    case = net("vit_block")
    found, _ = scalings(case.model, case.batches, case.loss_fn)
    assert "norm x 4, qkv / 4" in found


def test_a_wrong_rescaling_is_seen() -> None:
    """The bias left out, the factor not undone, the wrong layer: each is off by far more than rounding."""
    model, batch = relu_net(bias=True), data()
    outputs = Outputs(Objective(model, batch), 0)
    right = (("0.weight", 4.0), ("0.bias", 4.0), ("2.weight", 0.25))
    with Scaling("right", right).applied(model):
        assert outputs.distance() <= outputs.room
    for wrong in (right[::2], right[:2], (*right[:2], ("4.weight", 0.25)), (("0.weight", -4.0), ("0.bias", -4.0), ("2.weight", -0.25))):
        with Scaling("wrong", wrong).applied(model):
            assert outputs.distance() > 1e6 * outputs.room
    assert outputs.room < 1e-13
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), Scaling("right", right).applied(model):
        raise RuntimeError("inside")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_shared_weights() -> None:
    case = net("tied_language_model")
    with pytest.raises(InputError, match="weights also enter elsewhere"):
        fastsharp.invariance(case.model, case.batches, case.loss_fn, measures="trace")
    shared = nn.Linear(5, 5).double()
    _, refused = scalings(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(5, 3).double()), data())
    assert list(refused) == ["0 -> 4"]
    two = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)).double()
    two[2].weight = two[0].weight
    found, refused = scalings(two, data())
    assert not found and refused["0 -> 2"] == "the two share one weight"


def test_models_that_compute_their_own_loss() -> None:
    case = net("hf_style")
    found = fastsharp.invariance(case.model, case.batches, measures=[*OUTPUTS, "fisher_rao"])
    assert found.rescalings[-1] == "temperature 2" and "hidden -> head" in found.refused
    assert found.ratios[-1, :2].tolist() == [0.5, 0.5]


def test_how_many_are_measured() -> None:
    model = relu_net(widths=(5, 4, 4, 4, 4, 4, 3))
    found = fastsharp.invariance(model, data(), measures="margin", pairs=2, temperature=None)
    assert found.rescalings == ("0 x 4, 2 / 4", "8 x 4, 10 / 4") and len(found.applicable) == 5
    assert "3 of 5 rescalings found were not measured: pairs=2" in found.notes
    assert len(fastsharp.invariance(model, data(), measures="margin", pairs=None).rescalings) == 6
    assert fastsharp.invariance(model, data(), measures="margin", pairs=0).kinds == ("temperature",)


def test_what_does_not_apply_is_said() -> None:
    regression = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    batch = (data()[0], data()[0][:, :2])
    found = fastsharp.invariance(regression, batch, nn.MSELoss(), measures=["lambda_max", "margin", "fisher_rao"], preflight="off")
    assert found.measures == ("lambda_max", "fisher_rao") and "cross-entropy" in found.skipped["margin"]
    assert found.kinds == ("layers",) and "the decision" in found.refused["temperature"]
    assert found.survives("fisher_rao", "temperature") is None and found.survives("fisher_rao", "layers") is True


# --- moved, or within the error --------------------------------------------------------------------------------------------


def test_a_move_is_a_change_beyond_its_error() -> None:
    found = fastsharp.invariance(relu_net(), data(), measures=["sam", "trace"], directions=6, pairs=1, temperature=None)
    assert bool((found.errors > 0).all()) and found.survives("trace", "layers") is False
    held = dataclasses.replace(found, errors=found.errors + 1e6)
    assert not bool(held.moved.any()) and held.survives("trace", "layers") is True
    assert not bool(dataclasses.replace(found, errors=(found.values - found.base).abs()).moved.any())
    assert torch.equal(found.ratios, found.values / found.base)
    zero = dataclasses.replace(found, base=torch.zeros_like(found.base))
    assert bool(zero.ratios.isnan().all())
    with pytest.raises(InputError, match="measures are sam, trace"):
        found.survives("margin", "layers")


def test_differences_of_the_same_directions_are_compared_pair_by_pair() -> None:
    """The error of a change of SAM-sharpness is that of the mean difference, which for equal numbers is rounding."""
    model, batch = relu_net(), data()
    found = fastsharp.invariance(model, batch, measures=["sam", "layer_sam"], directions=40, pairs=1, rho=0.05)
    of_temperature = rescaled(model, {"4.weight": 0.5})
    a, b = (fastsharp.sharpness(m, batch, rho=0.05, directions=40).changes.abs() / 0.05 for m in (model, of_temperature))
    student = 2.0226909  # 97.5 % with 39 degrees of freedom
    assert float(found.errors[1, 0]) == pytest.approx(student * float((b - a).std()) / 40**0.5, rel=1e-4)
    assert float(found.errors[0, 1]) < 1e-12


# --- the caller's things, and bad input --------------------------------------------------------------------------------------


def test_nothing_of_the_callers_changes() -> None:
    model, (x, y) = relu_net(bias=True), data()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model, x, y):
        fastsharp.invariance(model, (x, y), measures=["lambda_max", "sam", "fisher_rao"], directions=6)


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = (fastsharp.invariance(relu_net(), data(), pairs=1, directions=6) for _ in range(2))
    assert torch.equal(a.values, b.values) and torch.equal(a.errors, b.errors) and a.measures == DEFAULT


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown measure": ({"measures": ["trace", "flatness"]}, "measures has 'flatness' in it"),
    "no measure": ({"measures": []}, "measures is empty"),
    "factor 1": ({"factor": 1.0}, "factor=1.0"),
    "factor 0": ({"factor": 0}, "factor=0"),
    "a negative factor": ({"factor": -2.0}, "factor=-2.0"),
    "factor nan": ({"factor": math.nan}, "factor=nan"),
    "factor inf": ({"factor": math.inf}, "factor=inf"),
    "factor True": ({"factor": True}, "factor=True"),
    "temperature 0": ({"temperature": 0.0}, "temperature=0.0"),
    "temperature text": ({"temperature": "hot"}, "temperature='hot'"),
    "pairs -1": ({"pairs": -1}, "pairs=-1"),
    "pairs 1.5": ({"pairs": 1.5}, "pairs=1.5"),
    "confidence 2": ({"confidence": 2.0}, "confidence is 2.0"),
    "directions 2": ({"directions": 2}, "directions=2"),
    "rho 0": ({"rho": 0.0}, "rho=0.0"),
    "ascent_rho negative": ({"ascent_rho": -1.0}, "rho=-1.0"),
    "rtol 0": ({"rtol": 0.0}, "rtol"),
    "an unknown backend": ({"backend": "magic"}, "backend='magic'"),
    "an unknown preflight": ({"preflight": "slow"}, "preflight='slow'"),
    "nothing to rescale": ({"temperature": None, "pairs": 0}, "nothing is left to measure"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, text = BAD[case]
    with pytest.raises(InputError, match=text.replace("[", r"\[").replace("(", r"\(")):
        fastsharp.invariance(relu_net(), data(), **arguments)


def test_bad_models_and_data_are_named() -> None:
    batch = data()
    with pytest.raises(ArgumentTypeError, match="a matrix has no layers"):
        fastsharp.invariance(torch.eye(3), batch)  # type: ignore[arg-type]
    single = nn.Linear(5, 2).double()
    with pytest.raises(InputError, match="no rescaling leaves the decisions of Linear as they are") as e:
        fastsharp.invariance(single, (batch[0], batch[0][:, :2]), nn.MSELoss())
    assert "modules with a weight that were called" in str(e.value) and "cross-entropy" in str(e.value)
    broken = relu_net()
    broken[2].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        fastsharp.invariance(broken, batch)
    with pytest.raises(ModelModeError, match="BatchNorm"):
        fastsharp.invariance(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double(), batch)
    with pytest.raises(LabelShapeError):
        fastsharp.invariance(relu_net(), (batch[0], F.one_hot(batch[1], 3)))
    with pytest.raises(InputError, match="which a batch_loss does not show"):
        fastsharp.invariance(relu_net(), batch, fastsharp.batch_loss(lambda m, b: F.cross_entropy(m(b[0]), b[1])))
    holder = relu_net()
    holder.kept = holder(batch[0]).sum()  # type: ignore[assignment]
    with pytest.raises(InputError, match="cannot be copied"):
        fastsharp.invariance(holder, batch)


class Turning:
    """Two batches, the other one first in every second pass."""

    passes = 0

    def __iter__(self) -> Any:
        x, y = data()
        self.passes += 1
        pair = [(x[:12], y[:12]), (x[12:], y[12:])]
        return iter(pair[:: 1 if self.passes % 2 else -1])


def test_streamed_data() -> None:
    """Read in every pass; in another order they would be compared with the outputs of other samples."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8, shuffle=True)
    found = fastsharp.invariance(relu_net(), loader, memory=600, measures=OUTPUTS)
    frozen = fastsharp.invariance(relu_net(), data(), measures=OUTPUTS)
    assert found.rescalings == frozen.rescalings and torch.allclose(found.values, frozen.values, rtol=1e-12, atol=0)
    with pytest.raises(NondeterministicOperatorError, match="other samples"):
        fastsharp.invariance(relu_net(), Turning(), memory=600, measures="margin")


def test_ctrl_c_carries_the_rescalings_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsharp.api import measures_named

    calls = []

    def third(subject: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return MEASURES["margin"](subject)

    monkeypatch.setitem(measures_named.MEASURES, "logit_scale", third)
    model = relu_net()
    with unchanged(model), pytest.raises(Interrupted, match="after 1 of 3 rescalings") as e:
        fastsharp.invariance(model, data(), measures=OUTPUTS)
    assert e.value.partial.rescalings == ("0 x 4, 2 / 4",) and e.value.partial.values.shape == (1, 2)


# --- how it looks ---------------------------------------------------------------------------------------------------------------


def test_the_table_names_what_was_refused() -> None:
    from rich.console import Console

    tanh = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(fastsharp.invariance(tanh, data(), measures="margin").table())
    text = console.export_text()
    assert "0 -> 2: the outputs move by" in text and "between them: Tanh" in text


def test_table_and_figure(tmp_path: Any) -> None:
    from rich.console import Console

    found = fastsharp.invariance(relu_net(), data(), measures=["lambda_max", "fisher_rao", "margin"], pairs=1, preflight="off")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "stays" in lines["fisher_rao"] and "x 0.5" in lines["margin"] and "0 x 4, 2 / 4" in text
    fig = found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    drawn = sorted(round(float(line.get_xdata()[0]), 9) for line in fig.axes[0].lines if len(line.get_xdata()) == 1)
    assert drawn == sorted(round(float(r), 9) for r in found.ratios.flatten() if r > 0)
