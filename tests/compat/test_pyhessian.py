"""PyHessian's example runs with one import line changed; numbers are those of the dense Hessian; what has no meaning is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.compat.pyhessian import density_generate, get_esd_plot, hessian
from fastsharp.errors import ArgumentTypeError, DeviceError, InputError, LabelError, NotConvergedWarning
from tests.compat.scripts import changed_lines, run
from tests.oracles.dense import dense_hessian

OURS = "fastsharp.compat.pyhessian"
SCRIPT = "script_pyhessian.py"
PLOT = """
import numpy as np

def get_esd_plot(eigenvalues, weights):
    x, w = np.array(eigenvalues), np.array(weights)
    assert x.shape == w.shape == (1, 100) and np.isclose(w.sum(), 1)
    low, high = np.mean(np.min(x, axis=1)), np.mean(np.max(x, axis=1))
    assert low < high
    open("plotted", "w").close()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a density_plot.py in it, as PyHessian's repository has one beside its example."""
    (tmp_path / "density_plot.py").write_text(PLOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


BATCHES = [(torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3) for n in (8, 5, 3)]


def dense(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], reduction: str = "mean") -> torch.Tensor:
    """sum_b n_b H_b / sum_b n_b."""
    was = model.training
    model.eval()
    H = sum(
        len(x) * dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1], reduction=reduction), (x, y)) for x, y in batches
    )
    model.train(was)
    return H / sum(len(x) for x, _ in batches)


def test_one_line_changes() -> None:
    assert changed_lines(SCRIPT, "pyhessian", OURS) == 1


@pytest.mark.parametrize("size", [12, 36])
def test_the_example_runs(folder: Path, size: int) -> None:
    found = run(SCRIPT, "--cuda", "--hessian-batch-size", str(size), package=OURS)
    assert (folder / "plotted").exists()
    assert found["eigenvalues"][0] > found["eigenvalues"][1] > 0
    assert found["shapes"] == [[[4, 2, 3, 3], [4], [4], [4], [3, 64], [3]]] * 2
    assert 2 <= len(found["trace"]) <= 100


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning", "ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("size", [12, 36])
def test_the_example_gives_what_pyhessian_gives(folder: Path, size: int) -> None:
    pytest.importorskip("pyhessian", reason="PyHessian is not installed")
    options = ["--cuda", "--no-density", "--hessian-batch-size", str(size)]
    theirs = run(SCRIPT, *options, "--tol", "1e-9", "--max-iter", "3000")  # with the default its values are a few per cent too small
    ours = run(SCRIPT, *options, package=OURS)
    assert ours["shapes"] == theirs["shapes"]
    assert ours["eigenvalues"] == pytest.approx(theirs["eigenvalues"], rel=1e-3)  # our residual bounds the error of the value
    spread = [np.std(t) / math.sqrt(len(t)) for t in (ours["trace"], theirs["trace"])]
    assert abs(np.mean(ours["trace"]) - np.mean(theirs["trace"])) < 5 * math.hypot(*spread)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_vectors_and_trace_against_the_dense_hessian(several: bool, reduction: str) -> None:
    """The loss is criterion's own on one batch, and the mean of the batches' losses weighted by their samples on several."""
    model, batches = net(), BATCHES if several else BATCHES[:1]
    H = dense(model, batches, reduction)
    data = {"dataloader": batches} if several else {"data": batches[0]}
    found = hessian(model, nn.CrossEntropyLoss(reduction=reduction), cuda=False, **data)
    values, vectors = found.eigenvalues(tol=1e-8, top_n=3)
    exact = torch.linalg.eigvalsh(H)
    largest = exact[exact.abs().argsort(descending=True)][:3]
    assert values == pytest.approx(largest.tolist(), rel=1e-7)
    for value, parts in zip(values, vectors, strict=True):
        assert [t.shape for t in parts] == [p.shape for p in model.parameters()]
        v = torch.cat([t.reshape(-1) for t in parts])
        assert float((H @ v - value * v).norm()) <= 1e-7 * abs(value)
    samples = found.trace(maxIter=400, tol=1e-12)
    assert len(samples) == 400 and all(type(s) is float for s in samples)
    error = math.sqrt(2 * float((H - H.diagonal().diag()).square().sum()) / 400)  # standard error of Rademacher probes
    assert abs(np.mean(samples) - float(H.trace())) < 4.5 * error


def test_the_largest_modulus_may_be_negative() -> None:
    found = hessian(net(), lambda out, y: -F.cross_entropy(out, y), data=BATCHES[0], cuda=False)
    values, _ = found.eigenvalues(top_n=2)
    assert values[0] < values[1] < 0


def test_names_are_those_of_the_network_inside_data_parallel() -> None:
    model = net()
    found = hessian(nn.DataParallel(model), F.cross_entropy, data=BATCHES[0], cuda=False)
    found.eigenvalues()
    assert found.pairs is not None and list(found.pairs.as_dict(0)) == [name for name, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(found.params, model.parameters(), strict=True))


def test_density_lists_are_rectangular_and_hold_the_ends() -> None:
    model = net()
    found = hessian(model, F.cross_entropy, data=BATCHES[0], cuda=False)
    nodes, weights = found.density(iter=200, n_v=3)
    n = sum(p.numel() for p in model.parameters())
    assert {len(x) for x in nodes} == {len(w) for w in weights} and len(nodes) == 3 and len(nodes[0]) <= n
    assert [sum(w) for w in weights] == pytest.approx([1.0] * 3)
    exact = torch.linalg.eigvalsh(dense(model, BATCHES[:1]))
    assert max(nodes[0]) == pytest.approx(float(exact[-1]), rel=1e-6) and min(nodes[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    assert found.measure is not None and found.measure.n_matvec > 0


def test_shorter_runs_are_filled_up_with_weight_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = torch.ones(1, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    measure = fastsharp.density(torch.eye(3), steps=2)
    monkeypatch.setattr(fastsharp, "density", lambda *a, **k: type(measure)(**{**vars(measure), "probes": ((one, one), (two, two / 3))}))
    nodes, weights = hessian(net(), F.cross_entropy, data=BATCHES[0], cuda=False).density(iter=2, n_v=2)
    assert nodes == [[1.0, 1.0], [1.0, 2.0]] and weights == [[1.0, 0.0], [1 / 3, 2 / 3]]


def test_the_trace_stops_by_the_running_mean_and_for_negative_traces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 0.1 divides by trace + 1e-6, which is negative here, and stops after two probes."""
    samples = [-10.0, -20.0, -15.001, -15.0, -99.0]
    monkeypatch.setattr("fastsharp.compat.pyhessian.probe_forms", lambda *a: iter(samples))
    assert hessian(net(), F.cross_entropy, data=BATCHES[0], cuda=False).trace(tol=1e-3) == samples[:3]


def test_the_seed_is_torchs_and_calls_differ() -> None:
    found = hessian(net(), F.cross_entropy, data=BATCHES[0], cuda=False)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs += [found.trace(maxIter=3, tol=1e-12), found.trace(maxIter=3, tol=1e-12)]
    assert runs[0] == runs[2] and runs[1] == runs[3]
    assert found.density(iter=3) != found.density(iter=3)
    assert runs[0] != runs[1] and runs[0] != runs[4]


def test_the_model_is_left_as_it_was() -> None:
    """PyHessian leaves it in eval mode, with gradients and a graph."""
    model = net().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    found = hessian(model, F.cross_entropy, dataloader=BATCHES, cuda=False)
    found.eigenvalues(), found.trace(maxIter=3), found.density(iter=3)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_present_weights_count() -> None:
    model = net()
    found = hessian(model, F.cross_entropy, dataloader=BATCHES, cuda=False)
    before = found.eigenvalues()[0][0]
    with torch.no_grad():
        model[4].weight.mul_(1.5)
    after = found.eigenvalues()[0][0]
    fresh = hessian(model, F.cross_entropy, dataloader=BATCHES, cuda=False).eigenvalues()[0][0]
    assert after == pytest.approx(fresh, rel=1e-3) and abs(after - before) > 1e-2 * before


def test_inputs_that_cannot_be_meant() -> None:
    model, batch = net(), BATCHES[0]
    with pytest.raises(InputError, match="one of the two"):
        hessian(model, F.cross_entropy, cuda=False)
    with pytest.raises(InputError, match="one of the two"):
        hessian(model, F.cross_entropy, data=batch, dataloader=[batch], cuda=False)
    with pytest.raises(ArgumentTypeError, match=r"torch\.nn\.Module"):
        hessian(lambda x: x, F.cross_entropy, data=batch, cuda=False)
    with pytest.raises(LabelError):
        hessian(model, F.cross_entropy, data=(batch[0], batch[1] + 1), cuda=False)
    found = hessian(model, F.cross_entropy, data=batch, cuda=False)
    for call, name in ((found.eigenvalues, "top_n"), (found.eigenvalues, "maxIter"), (found.trace, "maxIter"), (found.density, "n_v")):
        with pytest.raises(InputError, match=name):
            call(**{name: 0})
    with pytest.warns(NotConvergedWarning):
        hessian(nn.Linear(100, 3), F.cross_entropy, data=(torch.randn(9, 100), torch.arange(9) % 3), cuda=False).eigenvalues(maxIter=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_the_default_and_says_so() -> None:
    with pytest.raises(DeviceError, match="cuda=False"):
        hessian(net(), F.cross_entropy, data=BATCHES[0])


def test_the_plot(folder: Path) -> None:
    get_esd_plot([[0.0, 1.0, 5.0]], [[0.5, 0.3, 0.2]])
    assert Path("example.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("far", [0.5, 8.0])
def test_the_curve_of_the_plot(far: float) -> None:
    """Two runs of one node each: half a Gaussian each, of variance 1e-5 max(1, range), on a grid with an integral of one."""
    density, grid = density_generate([[0.0, 0.0], [far, far]], [[0.25, 0.75], [1.0, 0.0]], overhead=far)
    assert (grid[0], grid[-1], len(grid)) == (-far / 2, 3 * far / 2, 10000)  # means of the ends
    variance = 1e-5 * max(1.0, 2 * far)
    exact = sum(np.exp(-((grid - m) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance) / 2 for m in (0.0, far))
    assert np.abs(density - exact).max() < 1e-9 * exact.max()
