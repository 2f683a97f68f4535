"""`fastsharp.measure`: the numbers of the single calls, nothing twice, nothing of the caller's changed, and nothing lost where it ends early."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.api.measure import PARTS
from fastsharp.api.measure_job import NAMES, Job
from fastsharp.errors import (
    ArgumentTypeError,
    FastsharpError,
    InputError,
    Interrupted,
    NonFiniteError,
    NoParametersError,
    NotConvergedWarning,
)
from fastsharp.krylov.radau import with_node
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.measures.eigen import MEASURES, hessian_measures
from fastsharp.objective import Objective
from fastsharp.operator import CountingOperator, DenseOperator
from fastsharp.results import Report
from tests.cases import net
from tests.unchanged import unchanged

SMALL: dict[str, Any] = {"k": 2, "steps": 20, "directions": 8, "grid": 3}
ALL = {name for part in NAMES.values() for name in part}
NOT_OF_REGRESSION = {
    "fisher_rao_closed",
    "relative_flatness",
    "margin",
    "prediction_confidence",
    "logit_scale",
    "boundary_tightness",
}
SKIPPED = {  # names without a value, by net
    "mlp_tanh": set(),
    "cnn_batchnorm_eval": set(),
    "two_inputs": set(),
    "frozen": set(),
    "regression": NOT_OF_REGRESSION,
    "tied_language_model": {"boundary_tightness", "input_jacobian"},
    "hf_style": {"boundary_tightness", "input_jacobian"},
}


def measured(case: Any, **options: Any) -> Report:
    return fastsharp.measure(case.model, case.batches, case.loss_fn, **{**SMALL, **options})


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SKIPPED)
def test_every_value_is_that_of_the_single_call(name: str, one_thread: None) -> None:
    case = net(name)
    with unchanged(case.model, *tensors(case.batches)):
        report = measured(case)
    assert set(report.skipped) == SKIPPED[name] and all(len(reason) > 20 for reason in report.skipped.values())
    assert set(report.measures) == ALL - SKIPPED[name]
    assert {name: report.groups[name] for name in report.measures} == {
        n: part for part in NAMES for n in NAMES[part] if n in report.measures
    }

    data = (case.model, case.batches, case.loss_fn)
    spectrum = fastsharp.spectrum(*data, k=2, steps=20, rtol=0.05)
    alone = {**hessian_measures(spectrum), **singles(data, spectrum, set(report.measures))}
    assert set(alone) == set(report.measures) - {"soft_rank"}
    for key, single in alone.items():
        # the same arithmetic on the same batches, up to how samples are summed up
        assert report[key].value == pytest.approx(float(single), rel=1e-12, abs=1e-14), key
        assert report[key].interval == pytest.approx(single.interval, rel=1e-9, abs=1e-13), key
    G = fastsharp.GGN(*data)
    A = G.apply(torch.eye(G.n, dtype=G.dtype))
    c = 1e-3 * report["ggn_lambda_max"].value
    exact = float(torch.linalg.solve(A + c * torch.eye(G.n, dtype=G.dtype), A).trace())
    low, high = report["soft_rank"].interval
    assert low - 1e-9 * exact <= exact <= high + 1e-9 * exact
    drawn = report.landscape
    assert drawn is not None and drawn.plane.shape == (3, 3)
    assert abs(float(drawn.plane[1, 1])) <= 64 * torch.finfo(torch.float64).eps * drawn.loss
    assert drawn.loss == pytest.approx(float(case.objective(case.model, case.whole).detach()), rel=1e-12)


def singles(data: tuple[Any, ...], spectrum: Any, names: set[str]) -> dict[str, Any]:
    """Every other measure by its own call."""
    ggn = hessian_measures(fastsharp.spectrum(*data, k=1, steps=20, rtol=0.05, operator="ggn"))
    top = spectrum.eigenpairs.eigenvectors[0]
    ascent: dict[str, Any] = {"kind": "ascent", "rho": 0.05, "steps": 1}
    calls: dict[str, Callable[[], Any]] = {
        "sam": lambda: fastsharp.sharpness(*data, directions=8),
        "ascent": lambda: fastsharp.sharpness(*data, **ascent),
        "adaptive_ascent": lambda: fastsharp.sharpness(*data, **ascent, scale="adaptive"),
        "directional": lambda: fastsharp.directional_sharpness(*data),
        "gradient_overlap": lambda: fastsharp.gradient_overlap(*data, pairs=spectrum.eigenpairs),
        "fisher_rao": lambda: fastsharp.fisher_rao(*data),
        "fisher_rao_closed": lambda: fastsharp.fisher_rao(*data, form="closed"),
        "relative_flatness": lambda: fastsharp.relative_flatness(*data),
        "margin": lambda: fastsharp.margin(*data),
        "prediction_confidence": lambda: fastsharp.prediction_confidence(*data),
        "logit_scale": lambda: fastsharp.logit_scale(*data),
        "boundary_tightness": lambda: fastsharp.boundary_tightness(*data),
        "input_jacobian": lambda: fastsharp.input_jacobian(*data),
        "top_curvature": lambda: fastsharp.sample_curvature(*data, direction=top),
    }
    found = {f"ggn_{name}": ggn[name] for name in ("lambda_max", "trace", "effective_rank")}
    found |= {name: call() for name, call in calls.items() if name in names}
    size = float(flat_gradient(data).norm())
    found["gradient_norm"] = fastsharp.Estimate(size, 0.0, (size, size), 1.0, 0, 0, True)
    return found


def flat_gradient(data: tuple[Any, ...]) -> torch.Tensor:
    from fastsharp.measures.landscape import Landscape

    landscape = Landscape(Objective(*data))
    return landscape.ascent(torch.zeros_like(landscape.theta))[1]


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree
    return [t for value in values for t in tensors(value)]


def test_the_gradient_norm_against_autograd() -> None:
    case = net("mlp_tanh")
    grads = torch.autograd.grad(case.objective(case.model, case.whole), list(case.model.parameters()))
    exact = float(torch.cat([g.flatten() for g in grads]).norm())
    assert measured(case, parts="trajectory")["gradient_norm"].value == pytest.approx(exact, rel=1e-12)


def test_a_loss_of_the_whole_batch_leaves_out_what_needs_outputs() -> None:
    case = net("mlp_tanh")

    def penalised(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.01 * sum(p.square().sum() for p in model.parameters())

    with unchanged(case.model):
        report = fastsharp.measure(case.model, case.batches, fastsharp.batch_loss(penalised), reduction="mean", **SMALL)
    assert set(MEASURES) | {"sam", "ascent", "adaptive_ascent", "gradient_norm"} <= set(report.measures)
    assert set(NAMES["function"]) | set(NAMES["gauss-newton"]) == set(report.skipped)
    assert "batch_loss" in report.skipped["ggn_trace"] or "whole batch" in report.skipped["ggn_trace"]


def test_parts_that_were_not_asked_for_are_neither_measured_nor_skipped() -> None:
    case = net("mlp_tanh")
    report = measured(case, parts=["trajectory"])
    assert set(report.measures) == {*NAMES["curvature"], *NAMES["trajectory"]} and not report.skipped and report.landscape is None
    whole = measured(case)
    assert all(report[name].value == whole[name].value for name in report.measures)  # a part does not depend on the others
    with pytest.raises(KeyError, match=r"sam.*lambda_max"):
        report["sam"]
    with pytest.raises(KeyError, match=r"not measured: .*needs the cross-entropy"):
        measured(net("regression"), parts="function")["margin"]


# --- its cost -----------------------------------------------------------------------------------------------------------


def test_the_soft_rank_is_bounded_without_a_warning(one_thread: None) -> None:
    """A flat spectrum of a matrix too large to assemble: the probes end at the budget, and the flag, the note and the width say so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x, y = torch.randn(300, 40).double(), torch.randint(4, (300,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastsharp.measure(model, (x, y), parts="gauss-newton", damping=1e-4, rtol=0.01, k=1, steps=30)
    rank = report["soft_rank"]
    krylov = report.cost["products.gauss-newton"]
    assert rank.n_matvec <= 160 and krylov <= 160 + 2000 and not rank.converged
    assert any(note.startswith("soft_rank did not reach") for note in report.notes)
    G = fastsharp.GGN(model, (x, y))
    assert G.n > 512
    values = torch.linalg.eigvalsh(G.apply(torch.eye(G.n, dtype=G.dtype))).clamp_min(0)
    exact = float((values / (values + 1e-4 * values.max())).sum())
    assert rank.interval[0] <= exact <= rank.interval[1]


def test_what_missed_its_tolerance_is_one_warning_with_the_report(one_thread: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 4))
    data = torch.randn(50, 40), torch.randint(4, (50,))
    with pytest.warns(NotConvergedWarning, match="trace") as caught:
        report = fastsharp.measure(model, data, parts="curvature", rtol=1e-6, steps=8, k=1)
    assert len(caught) == 1
    assert caught[0].message.partial is report and not report["trace"].converged  # type: ignore[union-attr]
    assert any(note.startswith("trace did not reach") for note in report.notes)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
def test_gauss_and_radau_enclose_the_quadratic_form(c: float) -> None:
    """Against the eigenvectors of a dense matrix, step by step; a rule with a node at the middle of the spectrum would not."""
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(60, 60, generator=g, dtype=torch.float64)).Q
    values = torch.cat([torch.zeros(20), torch.logspace(-6, 0, 40)]).double()
    A, z = Q @ torch.diag(values) @ Q.T, torch.randn(60, generator=g, dtype=torch.float64).sign()
    exact = float(((Q.T @ z).square() * values / (values + c)).sum())
    run = Tridiagonal(DenseOperator((A + A.T) / 2), z, lambda: z, 60)
    gaps = []
    for _ in range(25):
        run.step()
        theta, S = run.blocks[0].solve()
        above = 60 * float((S[:, 0].square() * theta / (theta + c)).sum())
        nodes, weights = with_node(run.blocks[0], 0.0)
        assert abs(float(nodes[0])) <= 1e-12
        below = 60 * float((weights * nodes / (nodes + c)).sum())
        assert below - 1e-9 <= exact <= above + 1e-9
        gaps.append(above - below)
    assert gaps[-1] < 0.3 * gaps[0]


def test_gradient_and_rounding_are_taken_once() -> None:
    """Passes: 8 directions, one gradient (3), two ascents, 8 for the rounding, two lines of 21, the plane."""
    case = net("mlp_tanh")
    report = measured(case)
    assert report.cost["passes"] == 8 + 3 + 2 + 8 + 2 * 21 + 9
    assert report.cost["products"] == report.spectrum.n_matvec + 1  # one along the gradient


def test_streamed_data_give_the_same_numbers() -> None:
    case = net("mlp_tanh")
    held, streamed = measured(case), fastsharp.measure(case.model, Stream(case.batches), case.loss_fn, memory=50_000, **SMALL)
    assert not Objective(case.model, case.batches, case.loss_fn).batches.streamed
    assert set(held.measures) == set(streamed.measures)
    for name, estimate in held.measures.items():
        assert streamed[name].value == pytest.approx(estimate.value, rel=1e-12, abs=1e-14), name


class Stream:
    """A loader that forms its batches anew in each pass."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        return iter([tuple(t.clone() for t in batch) for batch in self._batches])

    def __len__(self) -> int:
        return len(self._batches)


# --- early ends ---------------------------------------------------------------------------------------------------------


class Ticks:
    """Counts products and evaluations of the loss, and ends the call at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
        self.parts: list[str] = []
        self.end: int | None = None
        self._part, self._error = "", error
        apply, evaluate, part = CountingOperator._apply, Objective.evaluate_unchecked, Job.part
        monkeypatch.setattr(CountingOperator, "_apply", lambda *a: (self.tick(), apply(*a))[1])
        monkeypatch.setattr(Objective, "evaluate_unchecked", lambda *a: (self.tick(), evaluate(*a))[1])
        monkeypatch.setattr(Job, "part", lambda job, name: (setattr(self, "_part", name), part(job, name))[1])

    def tick(self) -> None:
        if self.end == len(self.parts):
            raise self._error("ended by the test")
        self.parts.append(self._part)

    def run(self, end: int | None, call: Callable[[], Report]) -> Report:
        self.parts, self.end = [], end
        return call()


def ends(parts: list[str]) -> list[int]:
    """The first tick of each part, one in its middle and its last."""
    found = []
    for part in dict.fromkeys(parts):
        at = [i for i, p in enumerate(parts) if p == part]
        found += [at[0], at[len(at) // 2], at[-1]]
    return sorted(set(found))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_wherever_the_call_ends_it_carries_what_was_measured(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    case = net("mlp_tanh")
    ticks = Ticks(monkeypatch, error)
    whole = ticks.run(None, lambda: measured(case, preflight="off"))
    points = ends(ticks.parts)
    assert {ticks.parts[i] for i in points} == {"preflight", *PARTS} and len(points) > 15
    parts, order = list(ticks.parts), list(dict.fromkeys(ticks.parts))
    for end in points:
        with unchanged(case.model), pytest.raises(BaseException) as caught:
            ticks.run(end, lambda: measured(case, preflight="off"))
        assert isinstance(caught.value, Interrupted if error is KeyboardInterrupt else RuntimeError)
        report = getattr(caught.value, "partial", None)
        if parts[end] == "preflight" or end == parts.index("curvature"):
            assert report is None
            continue
        assert isinstance(report, Report)
        assert set(report.measures) | set(report.skipped) == ALL and not set(report.measures) & set(report.skipped)
        done = {name for part in order[: order.index(parts[end])] if part != "preflight" for name in NAMES[part]}
        assert all(report[name].value == whole[name].value for name in done), (end, parts[end])
        assert f"in the part {parts[end]!r}" in report.notes[-1]
        assert f"in the part {parts[end]!r}" in str(caught.value) or error is RuntimeError
        json.loads(report.to_json())
    last = [i for i in points if parts[i] == "landscape"]
    with pytest.raises(BaseException) as caught:
        ticks.run(last[-1], lambda: measured(case, preflight="off"))
    if error is KeyboardInterrupt:  # both lines were there, the plane was not
        drawn = caught.value.partial.landscape
        assert whole.landscape is not None and torch.equal(drawn.lines, whole.landscape.lines) and not drawn.plane.numel()


def test_a_loss_that_blows_up_near_the_weights_costs_that_measure_alone() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = sum(p.square().sum() for p in self.parameters()) / self.at
            return self.layer(x) * torch.where(size > 1.2, size * 1e300 * 1e300, size)

    model = Steep().double()
    model.at = float(sum(p.detach().square().sum() for p in model.parameters()))
    report = fastsharp.measure(model, (torch.randn(20, 3).double(), torch.arange(20) % 2), ascent_rho=3.0, **SMALL)
    assert (
        {"ascent", "adaptive_ascent", "landscape"}
        <= set(report.skipped)
        <= {"ascent", "adaptive_ascent", "landscape", "sam", "relative_flatness"}
    )
    assert all("finite" in report.skipped[name] for name in ("ascent", "adaptive_ascent", "landscape"))
    assert set(MEASURES) <= set(report.measures)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"parts": ["curvature", "sharpness"]}, InputError, "'sharpness'"),
        ({"parts": None}, ArgumentTypeError, "parts"),
        ({"grid": 1}, InputError, "grid=1"),
        ({"grid": True}, InputError, "grid=True"),
        ({"rho": 0.0}, InputError, "rho=0"),
        ({"rho": float("nan")}, InputError, "rho=nan"),
        ({"ascent_rho": -1.0}, InputError, "ascent_rho=-1"),
        ({"damping": True}, InputError, "damping=True"),
        ({"directions": 2}, InputError, "directions=2"),
        ({"confidence": 1.0}, InputError, "confidence"),
        ({"k": 0}, FastsharpError, "k "),
        ({"steps": 0}, InputError, "steps"),
        ({"rtol": -1.0}, FastsharpError, "rtol"),
        ({"preflight": "slow"}, InputError, "preflight"),
        ({"params": "absent*"}, FastsharpError, "absent"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], said: str) -> None:
    case = net("mlp_tanh")
    with unchanged(case.model), pytest.raises(error) as caught:
        fastsharp.measure(case.model, case.batches, case.loss_fn, **options)
    assert said in str(caught.value)


def test_a_matrix_is_no_model() -> None:
    with pytest.raises(ArgumentTypeError, match=r"fastsharp\.spectrum"):
        fastsharp.measure(torch.eye(3), [])  # type: ignore[arg-type]


def test_nan_in_the_data_is_found_before_anything_is_measured() -> None:
    case = net("mlp_tanh")
    x, y = case.batches[1]
    x = x.clone()
    x[1, 2] = float("nan")
    for preflight in ("fast", "off"):
        with unchanged(case.model), pytest.raises(NonFiniteError):
            fastsharp.measure(case.model, [case.batches[0], (x, y)], case.loss_fn, preflight=preflight, **SMALL)


def test_no_parameter_left() -> None:
    case = net("mlp_tanh")
    for p in case.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(NoParametersError):
        measured(case)


def test_one_hot_labels_are_named() -> None:
    case = net("mlp_tanh")
    x, y = case.batches[0]
    with pytest.raises(FastsharpError, match="one-hot"):
        fastsharp.measure(case.model, [(x, F.one_hot(y, 3))], F.cross_entropy, **SMALL)
