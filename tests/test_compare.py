"""Two checkpoints against literal computations: eigenspaces, spectra, the line between them, predictions, ratios; and pairs that are none."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import wasserstein_distance
from torch import nn

import fastsharp
from fastsharp.api.compare import ratio
from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, Interrupted, NonFiniteError, ParamError, ShapeError
from fastsharp.measures.interpolation import barrier, grid
from fastsharp.measures.subspace import overlap_error, principal_angles, space_error, w1
from fastsharp.results import Comparison, Estimate
from tests.cases import Net, net
from tests.oracles.dense import dense_hessian
from tests.oracles.matrices import orthogonal
from tests.unchanged import unchanged

QUICK: dict[str, Any] = {"parts": (), "points": 7, "steps": 10, "rtol": 0.5, "preflight": "off"}


def pair(name: str, **kw: Any) -> tuple[Net, Net]:
    """A case and the same architecture with other numbers."""
    return net(name, **kw), net(name, seed=1, **kw)


def compared(name: str, **arguments: Any) -> tuple[Net, Net, Comparison]:
    a, b = pair(name)
    return a, b, fastsharp.compare(a.model, b.model, a.batches, a.loss_fn, **{**QUICK, **arguments})


# --- eigenspaces -----------------------------------------------------------------------------------------------------------


def test_angles_that_were_put_in() -> None:
    """Planes turned by known angles in a random frame, with bases mixed at random and scaled off unit length by rounding's size."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))[0]
    angles = torch.tensor([0.0, 1e-5, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    A = Q[:5]
    B = angles.cos()[:, None] * Q[:5] + angles.sin()[:, None] * Q[5:10]
    mix = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    found = principal_angles(A * (1 + 1e-3), mix @ B)
    assert (found - angles).abs().max() <= 3e-8  # acos near 1: sqrt(eps)
    assert found == pytest.approx(np.sort(subspace_angles(A.T.numpy(), B.T.numpy())), abs=3e-8)
    assert (principal_angles(A.float(), (mix @ B).float()).double() - angles)[2:].abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_eval", "regression"])
def test_overlap_is_that_of_dense_eigenvectors(name: str) -> None:
    a, b, found = compared(name, k=3)
    spaces = [torch.linalg.eigh(dense_hessian(case.model, a.objective, a.whole))[1][:, -3:] for case in (a, b)]
    projectors = [V @ V.T for V in spaces]
    literal = float((projectors[0] @ projectors[1]).trace()) / 3
    assert abs(found.overlap - literal) <= found.overlap_error < 0.05
    angles = np.sort(subspace_angles(*(V.numpy() for V in spaces)))
    assert found.angles.numpy() == pytest.approx(angles, abs=0.05)
    assert found.random_overlap == 3 / len(projectors[0])


def test_the_baseline_is_what_random_spaces_have() -> None:
    g = torch.Generator().manual_seed(2)
    k, n, draws = 3, 30, 400
    spaces = torch.linalg.qr(torch.randn(2 * draws, n, k, generator=g, dtype=torch.float64))[0].mT
    overlaps = [float(principal_angles(a, b).cos().square().mean()) for a, b in spaces.unflatten(0, (draws, 2))]
    assert abs(np.mean(overlaps) - k / n) <= 5 * np.std(overlaps) / draws**0.5


def turned(values: torch.Tensor) -> torch.Tensor:
    """A matrix with these eigenvalues in a random frame."""
    Q = torch.from_numpy(np.asarray(orthogonal(len(values)), dtype=np.float64))
    A = Q @ torch.diag(values) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("tol", [0.3, 1e-1, 1e-3])
def test_the_error_of_a_space_is_a_bound(tol: float) -> None:
    values = torch.cat([torch.tensor([9.0, 8.0, 7.5, 6.5]), torch.linspace(-1, 5, 196)]).double()
    A = turned(values)
    k = 3
    loose = fastsharp.lanczos(A, k=k + 1, tol=tol)
    tight = torch.linalg.eigh(A)[1][:, -k:]
    V = torch.linalg.qr(loose.eigenvectors[:k].T.double())[0]
    actual = float((V @ V.T - tight @ tight.T).norm())
    bound = space_error(loose, k, len(A))
    assert actual <= bound * (1 + 1e-9) + 1e-12
    W = torch.linalg.qr(torch.randn(len(A), k, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    shift = abs(float(((V @ V.T - tight @ tight.T) @ (W @ W.T)).trace())) / k
    assert shift <= overlap_error(bound, 0.0, k) + 1e-12
    assert space_error(loose, len(A), len(A)) == 0.0


def test_a_cluster_across_k_leaves_the_space_unknown() -> None:
    A = turned(torch.cat([torch.tensor([5.0, 4.0, 4.0]), torch.linspace(0, 1, 60)]).double())
    assert space_error(fastsharp.lanczos(A, k=3), 2, len(A)) == math.inf
    assert overlap_error(math.inf, 0.0, 2) == 1.0
    case = net("mlp_tanh")
    found = fastsharp.compare(case.model, case.model, case.batches, case.loss_fn, k=1, **QUICK)
    assert found.overlap == 1.0 and found.overlap_error < 0.01 and not any("not told apart" in note for note in found.notes)


# --- spectra ---------------------------------------------------------------------------------------------------------------


def test_distance_of_spectra() -> None:
    a, b, found = compared("mlp_tanh", parts=())
    mine, yours = found.a.spectrum.density, found.b.spectrum.density
    literal = wasserstein_distance(mine.nodes.numpy(), yours.nodes.numpy(), mine.weights.numpy(), yours.weights.numpy())
    assert found.w1 == pytest.approx(literal, rel=1e-9)
    true = [torch.linalg.eigvalsh(dense_hessian(case.model, a.objective, a.whole)).numpy() for case in (a, b)]
    assert abs(found.w1 - wasserstein_distance(*true)) <= found.w1_bound == mine.w1_bound + yours.w1_bound
    assert found.w1_confidence == pytest.approx(0.9)
    assert w1(mine, mine)[0] == 0.0 and w1(mine, yours) == w1(yours, mine)


# --- the line ----------------------------------------------------------------------------------------------------------------


def between(a: Net, b: Net, t: float) -> float:
    """The loss of a copy whose every parameter and statistic is written by hand."""
    model = copy.deepcopy(a.model)
    s = min(max(t, 0.0), 1.0)
    with torch.no_grad():
        for p, q in zip(model.parameters(), b.model.parameters(), strict=True):
            p.copy_((1 - t) * p + t * q)
        for p, q in zip(model.buffers(), b.model.buffers(), strict=True):
            if p.is_floating_point():
                p.copy_((1 - s) * p + s * q)
        return float(a.objective(model, a.whole))


@pytest.mark.parametrize("name", ["cnn_batchnorm_eval", "lstm", "tied_language_model", "hf_style", "two_inputs", "regression", "frozen"])
def test_losses_on_the_line(name: str) -> None:
    a, b, found = compared(name, k=1, points=7)
    assert found.t.tolist() == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    literal = [between(a, b, t) for t in found.t.tolist()]
    assert found.losses.tolist() == pytest.approx(literal, rel=1e-12)
    heights = [loss - (1 - t) * literal[1] - t * literal[5] for t, loss in zip(found.t.tolist()[1:6], literal[1:6], strict=True)]
    assert found.barrier == pytest.approx(max(heights), rel=1e-9, abs=1e-14) and found.barrier >= 0
    assert found.barrier_at == found.t.tolist()[1 + int(np.argmax(heights))]


def test_grid_and_barrier() -> None:
    assert len(grid(31)) == 31 and {0.0, 1.0} <= set(grid(31).tolist())
    assert len(grid(4)) == 6 and grid(4).tolist() == [-0.25, 0.0, 0.25, 0.75, 1.0, 1.25]
    t = torch.tensor([-0.25, 0.0, 0.5, 1.0, 1.25], dtype=torch.float64)
    assert barrier(t, torch.tensor([9.0, 1.0, 5.0, 3.0, 9.0], dtype=torch.float64)) == (3.0, 0.5)
    assert barrier(t, torch.tensor([9.0, 1.0, 0.0, 3.0, 9.0], dtype=torch.float64)) == (0.0, 0.0)
    assert barrier(t, torch.tensor([9.0, 1.0, math.nan, 3.0, 9.0], dtype=torch.float64)) == (math.inf, 0.5)


def permuted(model: nn.Sequential) -> nn.Sequential:
    """The same function, hidden units in reverse."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))
        model[0].bias.copy_(model[0].bias.flip(0))
        model[2].weight.copy_(model[2].weight.flip(1))
    return model


def test_a_permuted_network_is_the_same_function_behind_a_barrier() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for p in a.parameters():
        p.data.mul_(4.0)
    y = a(x).argmax(1)
    found = fastsharp.compare(a, permuted(a), (x, y), parts=("function",), k=2, preflight="off")
    assert found.disagreement is not None and found.disagreement.value == 0.0
    assert found.barrier > 0.1 and 0 < found.barrier_at < 1
    assert found["margin"].value == pytest.approx(1.0, rel=1e-12) and found["lambda_max"].value == pytest.approx(1.0, rel=1e-5)


# --- predictions and ratios ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_relu", "tied_language_model", "hf_style"])
def test_disagreement_is_the_share_of_labels_predicted_differently(name: str) -> None:
    a, b, found = compared(name, k=1)
    assert found.disagreement is not None
    labels = a.whole["labels"] if isinstance(a.whole, Mapping) else a.whole[1]
    outputs = [
        (m(a.whole["input_ids"])["logits"].argmax(-1) if name == "hf_style" else m(a.whole[0]).argmax(1)) for m in (a.model, b.model)
    ]
    counted = labels != -100
    share = float((outputs[0] != outputs[1])[counted].double().mean())
    assert found.disagreement.value == pytest.approx(share, rel=1e-12) and share > 0


def test_no_classes_no_disagreement() -> None:
    _, _, found = compared("regression", k=1)
    assert found.disagreement is None and any("the loss is MSELoss" in note for note in found.notes)


def test_ratios_are_those_of_the_reports() -> None:
    a, b, found = compared("mlp_tanh", parts=("perturbation", "function"))
    for which, case in ((found.a, a), (found.b, b)):
        alone = fastsharp.measure(
            case.model, a.batches, a.loss_fn, parts=("perturbation", "function"), k=6, steps=10, rtol=0.5, preflight="off"
        )
        for name, e in alone.measures.items():
            assert which[name].value == pytest.approx(e.value, rel=1e-12, nan_ok=True)
    assert {"lambda_max", "trace", "sam", "fisher_rao", "margin", "input_jacobian"} <= set(found.measures)
    for name, e in found.measures.items():
        assert e.value == found.b[name].value / found.a[name].value
        lo, hi = e.interval
        assert math.isnan(lo) or lo <= e.value <= hi, name
    with pytest.raises(KeyError, match="no ratio"):
        Comparison.__getitem__(_with_skipped(found), "nothing")


def _with_skipped(found: Comparison) -> Comparison:
    import dataclasses

    return dataclasses.replace(found, skipped={"nothing": "it is 0 in a"})


def estimate(value: float, lo: float, hi: float, stderr: float = 0.1) -> Estimate:
    return Estimate(value, stderr, (lo, hi), 0.95, 10, 3, True)


def test_interval_of_a_ratio() -> None:
    r = ratio(estimate(2.0, 1.0, 4.0), estimate(6.0, 3.0, 8.0))
    assert (r.value, r.interval) == (3.0, (0.75, 8.0)) and r.confidence == pytest.approx(0.9)
    assert r.stderr == pytest.approx(math.hypot(0.05, 3 * 0.05))
    assert ratio(estimate(-2.0, -4.0, -1.0), estimate(6.0, -3.0, 8.0)).interval == (-8.0, 3.0)
    assert ratio(estimate(2.0, -1.0, 4.0), estimate(6.0, 3.0, 8.0)).interval == (-math.inf, math.inf)
    assert math.isnan(ratio(estimate(2.0, 1.0, 4.0), estimate(6.0, math.nan, math.nan)).interval[0])


def test_a_model_and_itself() -> None:
    case = net("cnn_batchnorm_eval")
    found = fastsharp.compare(case.model, case.model, case.batches, case.loss_fn, k=2, **{**QUICK, "parts": ("function",)})
    assert found.overlap == pytest.approx(1.0, abs=1e-12) and found.w1 == 0.0 and found.barrier == pytest.approx(0.0, abs=1e-14)
    assert {e.value for e in found.measures.values()} == {1.0} and found.disagreement is not None and found.disagreement.value == 0.0


# --- b as a state dict, the data, the caller's things -----------------------------------------------------------------------------


def test_a_state_dict_is_the_model_it_was_taken_from() -> None:
    a, b = pair("cnn_batchnorm_eval")
    by_model, by_dict = (fastsharp.compare(a.model, x, a.batches, a.loss_fn, k=2, **QUICK) for x in (b.model, b.model.state_dict()))
    assert by_dict.overlap == by_model.overlap and torch.equal(by_dict.losses, by_model.losses)
    assert by_dict["trace"].value == by_model["trace"].value


def test_both_are_measured_on_the_same_samples() -> None:
    """A generator can be read once."""
    a, b = pair("mlp_relu")
    found = fastsharp.compare(a.model, b.model, iter(a.batches), a.loss_fn, k=1, **QUICK)
    assert found.a.provenance["data_hash"] == found.b.provenance["data_hash"]
    assert found.provenance["weights_hash"] != found.provenance["weights_hash_b"]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*a.whole), batch_size=4, shuffle=True)
    streamed = fastsharp.compare(a.model, b.model, loader, a.loss_fn, k=1, memory=200, **QUICK)
    assert streamed.losses.tolist() == pytest.approx(found.losses.tolist(), rel=1e-12)


def test_nothing_of_the_callers_changes() -> None:
    a, b = pair("cnn_batchnorm_eval")
    tensors = [t for batch in a.batches for t in batch]
    with unchanged(a.model, *tensors), unchanged(b.model):
        fastsharp.compare(a.model, b.model, a.batches, a.loss_fn, k=1, points=4, steps=10, rtol=0.5)


def test_parameters_outside_of_params_lie_on_the_line_too() -> None:
    a, b = pair("mlp_tanh")
    found = fastsharp.compare(a.model, b.model, a.batches, a.loss_fn, k=1, params="4.*", **QUICK)
    assert found.a.provenance["n"] == 6 * 3 + 3
    assert found.losses.tolist() == pytest.approx([between(a, b, t) for t in found.t.tolist()], rel=1e-12)


# --- pairs that are none, and bad input ----------------------------------------------------------------------------------------------


def mlp(activation: type[nn.Module] = nn.Tanh, width: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(3, width), activation(), nn.Linear(width, 2))


BATCH = (torch.linspace(-1, 1, 24).reshape(8, 3), torch.arange(8) % 2)


class Scaled(nn.Module):
    """A factor that is neither parameter nor buffer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = mlp(), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.inner(x)


class Indexed(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("at", torch.tensor([at]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.roll(int(self.at), 1))


def _nan(model: nn.Module) -> nn.Module:
    next(model.parameters()).data[0, 0] = math.nan
    return model


def _frozen(model: nn.Sequential) -> nn.Module:
    model[2].bias.requires_grad_(False)
    return model


NO_PAIRS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "another activation": (mlp(), mlp(nn.ReLU), InputError, "'1' is a Tanh in a and a ReLU in b"),
    "another width": (mlp(), mlp(width=5), ShapeError, r"'0.weight' has shape \(4, 3\) in a and \(5, 3\) in b"),
    "a layer more": (mlp(), nn.Sequential(*mlp(), nn.Identity()), InputError, "'3' in b unknown to a"),
    "a layer fewer": (mlp(), mlp()[:2], InputError, "'2' of a missing in b"),
    "no bias": (mlp(), nn.Sequential(nn.Linear(3, 4, bias=False), *mlp()[1:]), ParamError, "'0.bias' of a missing in b"),
    "another dtype": (mlp(), mlp().double(), DtypeError, "'0.weight' is torch.float32 in a and torch.float64 in b"),
    "another device": (mlp(), mlp().to("meta"), DeviceError, "'0.weight' is on cpu in a and on meta in b"),
    "one in train mode": (mlp(), mlp().eval(), InputError, "train mode in one"),
    "other parameters frozen": (mlp(), _frozen(mlp()), InputError, "choose other parameters in a than in b: '2.bias'"),
    "another attribute": (Scaled(1.0), Scaled(2.0), InputError, "neither\nparameter nor buffer"),
    "another index": (Indexed(0), Indexed(1), InputError, "the buffer 'at'"),
    "nan in a": (_nan(mlp()), mlp(), NonFiniteError, "checkpoint a: parameter '0.weight'"),
    "nan in b": (mlp(), _nan(mlp()), NonFiniteError, "checkpoint b: parameter '0.weight'"),
    "a matrix": (torch.eye(3), mlp(), ArgumentTypeError, "a is a Tensor"),
    "b is a path": (mlp(), "b.pt", ArgumentTypeError, "b is a str"),
    "b is a checkpoint": (mlp(), {"epoch": 3, "state_dict": {}}, ArgumentTypeError, "'epoch' in b is a int"),
    "b has other names": (
        mlp(),
        {"module." + k: v for k, v in mlp().state_dict().items()},
        ParamError,
        "'0.weight', '0.bias', '2.weight' and 1 more",
    ),
    "b has other shapes": (mlp(), mlp(width=5).state_dict(), ShapeError, "in the state dict b"),
    "b has another dtype": (mlp(), mlp().double().state_dict(), DtypeError, "in the state dict b"),
    "b has nan": (mlp(), _nan(mlp()).state_dict(), NonFiniteError, "checkpoint b: parameter '0.weight'"),
}


@pytest.mark.parametrize("case", NO_PAIRS)
def test_what_is_no_pair_is_refused_by_name(case: str) -> None:
    a, b, error, text = NO_PAIRS[case]
    with pytest.raises(error, match=text):
        fastsharp.compare(a, b, BATCH, k=1, **QUICK)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "k above n": ({"k": 27}, "k=27 eigenvectors, and the chosen parameters have 26"),
    "k 0": ({"k": 0}, "k=0"),
    "k True": ({"k": True}, "k=True"),
    "two points": ({"points": 2}, "points=2"),
    "unknown part": ({"parts": "everything"}, "parts has 'everything'"),
    "frozen statistics": ({"bn": "frozen-batch-stats"}, "not those of b"),
    "confidence 1": ({"confidence": 1.0}, "confidence is 1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, text = BAD[case]
    with pytest.raises(InputError, match=text):
        fastsharp.compare(mlp(), mlp(), BATCH, **{**QUICK, **arguments})


def test_k_of_the_whole_space() -> None:
    found = fastsharp.compare(mlp().double(), mlp(width=4).double(), (BATCH[0].double(), BATCH[1]), k=26, **QUICK)
    assert found.overlap == pytest.approx(1.0, abs=1e-12) and found.overlap_error == 0.0 and found.random_overlap == 1.0


def test_ctrl_c_carries_the_report_of_a(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []

    def once(*args: Any, **kw: Any) -> Any:
        if reports:
            raise KeyboardInterrupt
        reports.append(fastsharp.measure(*args, **kw))
        return reports[0]

    monkeypatch.setitem(fastsharp.compare.__globals__, "measure", once)
    with pytest.raises(Interrupted, match="report of b") as e:
        fastsharp.compare(mlp(), mlp(), BATCH, k=1, **QUICK)
    assert e.value.partial is reports[0]


# --- how it looks -----------------------------------------------------------------------------------------------------------------


def test_table_figure_and_file(tmp_path: Any) -> None:
    from rich.console import Console

    _, _, found = compared("mlp_relu", parts=("function",), k=2)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    for part in ("overlap of the top 2 eigenvectors", "barrier of the loss", "predictions that differ", "lambda_max", "fisher_rao"):
        assert part in text
    fig = found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    line, angles, _, ratios = fig.axes
    assert line.lines[0].get_ydata().tolist() == found.losses.tolist()
    assert [bar.get_height() for bar in angles.patches] == found.angles.rad2deg().tolist()
    assert [tick.get_text() for tick in ratios.get_yticklabels()] == [n for n, r in found.measures.items() if r.value > 0]
    back = fastsharp.load(found.save(tmp_path / "a.npz"))
    assert isinstance(back, Comparison) and back.overlap == found.overlap and torch.equal(back.losses, found.losses)
    assert back.a["fisher_rao"].value == found.a["fisher_rao"].value
