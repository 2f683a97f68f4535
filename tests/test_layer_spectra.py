"""`fastsharp.layer_spectra`: its numbers against dense matrices, its errors, and what a result shows and writes."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import (
    ArgumentTypeError,
    FastsharpError,
    InputError,
    Interrupted,
    ModelModeError,
    NoParametersError,
    NotConvergedError,
    NotConvergedWarning,
    ParamError,
    UnusedParamWarning,
)
from tests.curvature.test_layers import LOSS, Partly, Tied, problem, whole
from tests.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_blocks(model, batches, kind="hessian"):
    """{module: (rows of its parameters, the whole matrix)}, from names in order."""
    H, names = whole(kind, model, batches)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    rows, start = {}, 0
    for name in names:
        rows.setdefault(name.rpartition(".")[0], []).append(torch.arange(start, start + sizes[name]))
        start += sizes[name]
    return H, {module: torch.cat(parts) for module, parts in rows.items()}


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["residual", "gelu"])
def test_values_bounds_traces_and_vectors_of_every_layer(name, operator):
    model, batches = problem(name)
    H, rows = dense_blocks(model, batches, operator)
    with unchanged(model, *(t for batch in batches for t in batch)):
        spectra = fastsharp.layer_spectra(model, batches, LOSS, k=3, tol=1e-6, operator=operator, vectors=True, trace_rtol=0.2)
    assert [layer.name for layer in spectra] == list(rows)
    for layer in spectra:
        block = H[rows[layer.name]][:, rows[layer.name]]
        exact = torch.linalg.eigvalsh(block).flip(0)[: len(layer.eigenvalues)]
        assert bool(layer.converged.all()) and layer.n == len(block)
        assert bool(((layer.eigenvalues - exact).abs() <= layer.error_bounds + 1e-12).all()), layer.name
        X = layer.eigenvectors
        r = (X @ block - layer.eigenvalues[:, None] * X).norm(dim=1)
        assert torch.allclose(r, layer.residuals, atol=1e-12), layer.name
        lo, hi = layer.trace.interval
        assert lo - 1e-12 <= float(block.trace()) <= hi + 1e-12, layer.name
        parts = layer.as_dict(0)
        assert list(parts) == list(layer.params)
        assert torch.equal(torch.cat([p.reshape(-1) for p in parts.values()]), X[0])


def test_both_ways_agree():
    """The local factors and products of the engine, by the same net."""
    model, batches = problem("residual")
    local = fastsharp.layer_spectra(model, batches, LOSS, k=2, tol=1e-8, coupling=None)
    for backend in ("rop", "autograd"):
        other = fastsharp.layer_spectra(model, batches, LOSS, k=2, tol=1e-8, coupling=None, backend=backend, trace_rtol=0.3)
        for a, b in zip(local, other, strict=True):
            assert a.route != "engine" and b.route == "engine" and backend in b.reason
            assert bool(((a.eigenvalues - b.eigenvalues).abs() <= a.error_bounds + b.error_bounds + 1e-12).all())


def test_float32_agrees_with_float64():
    model, batches = problem("residual")
    exact = fastsharp.layer_spectra(model, batches, LOSS, k=2, coupling=None)
    single = fastsharp.layer_spectra(model.float(), [(x.float(), y) for x, y in batches], LOSS, k=2, coupling=None)
    for a, b in zip(exact, single, strict=True):
        assert a.route == b.route
        assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-5, atol=1e-6 * float(a.eigenvalues[0]))
        assert float(b.trace) == pytest.approx(float(a.trace), rel=1e-5)


# --- coupling ---------------------------------------------------------------------------------------------------------


def test_the_coupling_is_within_its_standard_error():
    """Over 16 seeds the mean of each estimate is within 4 standard errors of its mean, and the stated errors are those of the spread."""
    model, batches = problem("relu")
    H, rows = dense_blocks(model, batches)
    D = torch.zeros_like(H)
    for r in rows.values():
        D[r[:, None], r] = H[r[:, None], r]
    rest, total = float((H - D).norm() ** 2), float(H.norm() ** 2)
    runs = [fastsharp.layer_spectra(model, batches, LOSS, k=2, preflight="off", seed=seed).coupling for seed in range(16)]
    squares = torch.tensor([c.rest[0] ** 2 for c in runs])
    assert abs(float(squares.mean()) - rest) <= 4 * float(squares.std()) / 4
    stated = torch.tensor([2 * c.rest[0] * c.rest[1] for c in runs]).mean()
    assert 0.5 <= float(stated / squares.std()) <= 2.0
    shares = torch.tensor([c.share[0] for c in runs])
    assert float(shares.mean()) == pytest.approx(rest / total, abs=4 * float(shares.std()) / 4 + 0.01)  # a ratio of means is biased
    assert all(c.probes == 8 for c in runs)


def test_pairs_of_layers():
    model, batches = problem("relu")
    H, rows = dense_blocks(model, batches)
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=2, coupling="pairs", probes=400)
    assert spectra.n_matvec == 400 * 3
    pairs, error = spectra.coupling.pairs, spectra.coupling.pairs_stderr
    assert torch.equal(pairs, pairs.T)
    for i, a in enumerate(rows.values()):
        for j, b in enumerate(rows.values()):
            assert abs(float(pairs[i, j]) - float(H[a][:, b].norm())) <= 4 * float(error[i, j]), (i, j)
        assert abs(spectra[i].coupling[0] ** 2 + spectra[i].norm[0] ** 2 - float(H[a].norm() ** 2)) <= 0.1 * float(H[a].norm() ** 2)


def test_blocks_without_coupling_measure_none():
    """Two layers side by side on a loss that adds them up: H is block-diagonal."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return torch.cat([self.left(x[:, :3]), self.right(x[:, 3:])], 1)

    x, t = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    spectra = fastsharp.layer_spectra(Beside().double(), (x, t), nn.MSELoss(), k=2)
    assert spectra.coupling.rest[0] <= 1e-12 * spectra.coupling.blocks[0]
    assert spectra.coupling.share[0] <= 1e-24


# --- bad and odd input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": "nothing.*"}, InputError, r"'nothing\.\*' matches no module.*0, 2, 4"),
        ({"layers": lambda name, module: False}, InputError, "the callable chose no module"),
        ({"layers": []}, InputError, "none was asked for"),
        ({"layers": {}}, InputError, "none was asked for"),
        ({"layers": ["", "0"]}, InputError, r"'0\.weight' belongs to 'Sequential' and to '0'"),
        ({"layers": {"a": "0.*", "b": "*.bias"}}, InputError, r"'0\.bias' belongs to 'a' and to 'b'"),
        ({"layers": {"a": "2.*"}, "params": "0.*"}, ParamError, "a has none of the chosen parameters"),
        ({"layers": [3]}, ArgumentTypeError, "got a int"),
        ({"coupling": "some"}, InputError, "coupling='some'"),
        ({"probes": 1}, InputError, "no standard error"),
        ({"probes": 2.0}, ArgumentTypeError, "probes is 2.0"),
        ({"k": 0}, InputError, "k is 0"),
        ({"k": "5"}, ArgumentTypeError, "k is '5'"),
        ({"tol": -1.0}, InputError, "tol is -1"),
        ({"trace_rtol": 0.0}, InputError, "rtol is 0"),
        ({"operator": "newton"}, InputError, "newton"),
        ({"backend": "fast"}, InputError, "fast"),
        ({"params": "no.*"}, ParamError, "matches no parameter"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, words):
    model, batches = problem("relu")
    with pytest.raises(error, match=words):
        fastsharp.layer_spectra(model, batches, LOSS, **options)


def test_a_matrix_has_no_layers():
    with pytest.raises(ArgumentTypeError, match="only a model has layers"):
        fastsharp.layer_spectra(torch.eye(3), None)


def test_a_model_in_train_mode_is_refused():
    model, batches = problem("residual")
    with pytest.raises(ModelModeError, match=r"stem\.1"):
        fastsharp.layer_spectra(model.train(), batches, LOSS)


def test_one_layer_has_no_coupling():
    model, batches = problem("relu")
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=2, layers="2")
    assert len(spectra) == 1 and spectra.coupling is None and spectra["2"].coupling is None
    assert "one layer: there is no coupling between layers" in spectra.notes
    assert any("of no chosen layer left out: 0.weight" in note for note in spectra.notes)
    with pytest.raises(KeyError, match="no layer is called '0'"):
        spectra["0"]


def test_frozen_layers_are_left_out_and_said():
    model, batches = problem("relu")
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=2)
    assert [layer.name for layer in spectra] == ["0", "4"]
    assert spectra["0"].params == ("0.weight",)
    assert any(note.startswith("frozen parameters left out: 0.bias, 2.weight") for note in spectra.notes)
    with pytest.raises(InputError, match="'2' matches no module with chosen parameters"):
        fastsharp.layer_spectra(model, batches, LOSS, layers=["2"])
    model.requires_grad_(False)
    with pytest.raises(NoParametersError):
        fastsharp.layer_spectra(model, batches, LOSS)


def test_tied_weights_count_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).double()
    model[2].weight = model[0].weight
    batches = problem("relu")[1]
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=2)
    assert [layer.name for layer in spectra] == ["0", "4"]
    assert any("counted once: 2.weight = 0.weight" in note for note in spectra.notes)
    assert spectra["0"].route == "engine" and spectra["4"].route != "engine"


def test_a_layer_without_a_path_is_zero_and_said():
    torch.manual_seed(0)
    with pytest.warns(UnusedParamWarning, match=r"spare\.weight"):
        spectra = fastsharp.layer_spectra(Partly().double(), problem("relu")[1], LOSS, k=3)
    spare = spectra["spare"]
    assert spare.route == "none" and not bool(spare.eigenvalues.any()) and float(spare.trace) == 0.0 and spare.norm == (0.0, 0.0)
    assert "no gradient path, the block is zero: spare" in spectra.notes


def test_more_pairs_than_parameters():
    model, batches = problem("residual")
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=10, layers=["stem.1", "head"], trace_rtol=0.3)
    assert len(spectra["stem.1"].eigenvalues) == 8  # four channels, weight and bias


def test_a_run_that_does_not_converge_names_the_layer():
    model, batches = problem("conv")
    with pytest.warns(NotConvergedWarning, match=r"layer \d+: lanczos: "):
        fastsharp.layer_spectra(model, batches, LOSS, k=3, max_iter=4, coupling=None, layers=["0", "3"])
    with pytest.raises(NotConvergedError, match="layer"):
        fastsharp.layer_spectra(model, batches, LOSS, k=3, max_iter=4, coupling=None, layers=["0", "3"], strict=True)


def test_ctrl_c_carries_the_layers_so_far(monkeypatch):
    module = importlib.import_module("fastsharp.api.layer_spectra")
    calls = []
    original = module.solve

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "solve", interrupted)
    model, batches = problem("relu")
    with pytest.raises(Interrupted, match="after 2 of 3 layers") as caught:
        fastsharp.layer_spectra(model, batches, LOSS, k=2)
    assert [layer.name for layer in caught.value.partial] == ["2", "4"]


def test_vectors_are_kept_on_request_alone():
    model, batches = problem("relu")
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=2, coupling=None)
    assert all(layer.eigenvectors is None for layer in spectra)
    with pytest.raises(FastsharpError, match="vectors=True"):
        spectra["0"].as_dict(0)


def test_saturated_samples_keep_their_small_curvature():
    """Softmax rows of one to within 1e-9: the roots of most samples are tiny, and none is lost that matters."""
    model, batches = problem("relu")
    with torch.no_grad():
        model[4].weight.mul_(40.0)
    H, rows = dense_blocks(model, batches)
    spectra = fastsharp.layer_spectra(model, batches, LOSS, k=2, tol=1e-6, coupling=None)
    for layer in spectra:
        exact = torch.linalg.eigvalsh(H[rows[layer.name]][:, rows[layer.name]]).flip(0)[:2]
        assert layer.route != "engine"
        assert bool(((layer.eigenvalues - exact).abs() <= layer.error_bounds + 1e-9 * exact[0]).all()), layer.name


# --- what a result shows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spectra():
    model, batches = problem("gelu")
    return fastsharp.layer_spectra(model, batches, LOSS, k=2, coupling="pairs", trace_rtol=0.3)


def test_notes_say_how_each_block_was_multiplied(spectra):
    assert "block by the engine, the network bends in what follows from it, or it multiplies itself: 0" in spectra.notes
    assert any(note.startswith("block by its local factor") and note.endswith("4") for note in spectra.notes)


def test_files_hold_everything(spectra, tmp_path):
    spectra.save(tmp_path / "layers.json")
    record = json.loads((tmp_path / "layers.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert (record["schema"], record["schema_version"]) == ("fastsharp.layer_spectra", 1)
    assert [layer["name"] for layer in record["layers"]] == ["0", "2", "4"]
    assert record["settings"]["operator"] == "hessian" and record["provenance"]["samples"] == 11
    again = fastsharp.load(tmp_path / "layers.json")
    assert again.coupling.share == spectra.coupling.share and torch.equal(again.coupling.pairs, spectra.coupling.pairs)
    for a, b in zip(again, spectra, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues) and torch.equal(a.converged, b.converged)
        assert (a.trace.value, a.norm, a.coupling, a.layout, a.params) == (b.trace.value, b.norm, b.coupling, b.layout, b.params)


def test_the_table_has_a_row_a_layer(spectra):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(spectra.table())
    console.file.close()
    text = console.export_text()
    for layer in spectra:
        assert f"{float(layer.eigenvalues[0]):.5g}" in text and layer.route in text
    assert "±" in text


def heights(ax):
    return [float(p.get_height()) for p in ax.patches]


def test_the_figure_has_a_bar_a_layer(spectra, tmp_path):
    figure = spectra.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    top, traces, coupling = figure.axes
    assert heights(top) == [max(float(layer.eigenvalues[0]), 0.0) for layer in spectra]  # the axis is logarithmic
    assert heights(traces) == [max(layer.trace.value, 0.0) for layer in spectra]
    assert len(coupling.patches) == 6
    assert [t.get_text() for t in coupling.get_xticklabels()] == ["0", "2", "4"]


def test_a_figure_of_zeros_can_be_drawn(tmp_path):
    with pytest.warns(UnusedParamWarning):
        result = fastsharp.layer_spectra(Partly().double(), problem("relu")[1], LOSS, k=1, coupling=None)
    result.plot(tmp_path / "zeros.png")


def test_tied_models_run_through():
    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
    spectra = fastsharp.layer_spectra(model, (x, y), lambda z, y: F.cross_entropy(z, y), k=1, trace_rtol=0.3)
    assert spectra["embed"].route == "engine"
