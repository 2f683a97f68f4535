"""diagonal and row_norms: exact by unit vectors, unbiased and covered at the stated confidence by probes, bad input refused."""

from __future__ import annotations

import math

import pytest
import torch

import fastsharp
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, NonFiniteError
from tests.cases import net

pytestmark = pytest.mark.usefixtures("one_thread")
N, SEEDS = 60, 200
SPECTRA = {
    "indefinite": torch.randn(N, generator=torch.Generator().manual_seed(3)).double(),
    "decaying": 0.8 ** torch.arange(N).double(),
}


def matrix(name: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    Q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))[0]
    A = (Q * SPECTRA[name]) @ Q.T
    return (A + A.T) / 2


def runs(call: str, A: torch.Tensor, truth: torch.Tensor, **options: object) -> tuple[float, float, float, float]:
    """Share of intervals that hold the truth, bias in standard errors of the mean, rms error, rms of the stated standard error."""
    operator = fastsharp.DenseOperator(A)
    solver = getattr(fastsharp, call)
    results = [solver(operator, seed=s, **options) for s in range(SEEDS)]
    held = torch.stack([((r.interval[0] <= truth) & (truth <= r.interval[1])).double() for r in results])
    error = torch.stack([r.value - truth for r in results])
    bias = error.mean(0) / (error.std(0) / math.sqrt(SEEDS))
    stated = torch.stack([r.stderr for r in results]).square().mean().sqrt()
    return float(held.mean()), float(bias.square().mean().sqrt()), float(error.square().mean().sqrt()), float(stated)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("call", ["diagonal", "row_norms"])
def test_the_stated_interval_holds_in_95_percent(call, name):
    """Hutchinson samples are independent, normal probes make rows chi-square: 93 to 97 % over 60 entries and 200 seeds."""
    A = matrix(name)
    truth = A.diagonal() if call == "diagonal" else A.norm(dim=1)
    held, bias, error, stated = runs(call, A, truth, products=48)
    assert 0.93 <= held <= 0.97
    assert stated == pytest.approx(error, rel=0.05)
    if call == "diagonal":
        assert bias <= 1.5  # 1 where there is none; the root of the mean square is biased by 1 / 4m


def test_squares_of_row_norms_are_unbiased():
    A = matrix("decaying")
    squares = torch.stack([fastsharp.row_norms(fastsharp.DenseOperator(A), products=32, seed=s).value.square() for s in range(SEEDS)])
    error = squares - A.square().sum(1)
    assert float((error.mean(0) / (error.std(0) / math.sqrt(SEEDS))).square().mean().sqrt()) <= 1.5


def test_xdiag_is_exchangeable_and_says_that_its_interval_is_approximate():
    """Each leave-one-out estimate is unbiased; their spread understates the error, by less than a third."""
    A = matrix("decaying")
    held, bias, error, stated = runs("diagonal", A, A.diagonal(), products=32, method="xdiag")
    assert bias <= 1.5
    assert 0.85 <= held <= 0.97 and 0.67 * error <= stated <= 1.1 * error
    plain = runs("diagonal", A, A.diagonal(), products=32, method="hutchinson")
    assert error <= plain[2] / 4  # its reason to exist
    assert any("approximate" in note for note in fastsharp.diagonal(A, products=32, method="xdiag").notes)


def test_xdiag_against_its_definition():
    """The mean of diag(P_i A) + w_i o (A w_i - P_i A w_i), each projection made from scratch."""
    from fastsharp import ops

    A, m = matrix("decaying"), 16
    W = ops.probes("rademacher", out=torch.empty((m, N), dtype=torch.float64), seed=5).T
    samples = []
    for i in range(m):
        Q = torch.linalg.qr(A @ torch.cat([W[:, :i], W[:, i + 1 :]], 1))[0]
        P = Q @ Q.T
        y = A @ W[:, i]
        samples.append((P @ A).diagonal() + W[:, i] * (y - P @ y))
    want = torch.stack(samples)
    found = fastsharp.diagonal(A, products=2 * m, method="xdiag", seed=5)
    assert float((found.value - want.mean(0)).abs().max()) <= 1e-12
    assert float((found.stderr - want.std(0) / math.sqrt(m)).abs().max()) <= 1e-12


def test_all_unit_vectors_leave_nothing_to_chance():
    A = matrix("indefinite")
    for found, truth in ((fastsharp.diagonal(A), A.diagonal()), (fastsharp.row_norms(A, method="exact", products=1), A.norm(dim=1))):
        assert found.samples == 0 and found.n_matvec == N
        assert float((found.value - truth).abs().max()) <= 8 * torch.finfo(torch.float64).eps * float(truth.abs().max())


def test_a_diagonal_matrix_has_no_variance():
    d = torch.linspace(-3, 2, 400, dtype=torch.float64)
    found = fastsharp.diagonal((lambda v: d * v, 400, torch.float64), products=16)
    low, high = found.interval
    assert bool(((low <= d) & (d <= high)).all()) and float(found.stderr.max()) <= 1e-14


@pytest.mark.parametrize("power", [-200, 200])
def test_scale(power):
    A = matrix("decaying")
    one, other = fastsharp.diagonal(A, products=32), fastsharp.diagonal(A * 2.0**power, products=32)
    assert torch.equal(one.value * 2.0**power, other.value) and torch.equal(one.stderr * 2.0**power, other.stderr)


def test_models_by_parameter():
    n = net("mlp_tanh")
    exact = fastsharp.diagonal(n.model, n.batches, n.loss_fn, method="exact")
    operator = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    H = operator.apply(torch.eye(operator.n, dtype=torch.float64))
    assert float((exact.value - H.diagonal()).abs().max()) <= 1e-13
    assert sum(exact.sums().values()) == pytest.approx(float(H.trace()))
    assert exact.as_dict()["0.weight"].shape == n.model[0].weight.shape == exact.stderr_dict()["0.weight"].shape
    sampled = fastsharp.diagonal(n.model, n.batches, n.loss_fn, operator="ggn", products=20, seed=4)
    again = fastsharp.diagonal(fastsharp.GGN(n.model, n.batches, n.loss_fn), products=20, seed=4)
    assert torch.equal(sampled.value, again.value) and sampled.settings["operator"] == "ggn"


def test_resume_is_bitwise(tmp_path):
    n = net("mlp_tanh")
    options = {"products": 24, "seed": 1, "resume": tmp_path / "log"}
    one = fastsharp.row_norms(n.model, n.batches, n.loss_fn, **options)
    again = fastsharp.row_norms(n.model, n.batches, n.loss_fn, **options)
    assert torch.equal(one.value, again.value)
    assert torch.equal(one.value, fastsharp.row_norms(n.model, n.batches, n.loss_fn, products=24, seed=1).value)


def test_interrupt_keeps_the_probes():
    A, seen = matrix("decaying"), []

    def product(v: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        if len(seen) > 30:
            raise KeyboardInterrupt
        return A @ v

    with pytest.raises(Interrupted, match="of 48 probes") as caught:
        fastsharp.diagonal((product, N, torch.float64), products=48, preflight="off")
    assert caught.value.partial.samples == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"products": 8}, "too few"),
        ({"products": 16, "method": "xdiag"}, "at least 32"),
        ({"products": 62, "method": "xdiag"}, "more than n"),
        ({"method": "hutch"}, "method"),
        ({"confidence": 0.2}, "confidence"),
        ({"seed": 2**70}, "64-bit"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(InputError, match=words):
        fastsharp.diagonal(matrix("decaying"), **options)


def test_other_bad_input():
    with pytest.raises(ArgumentTypeError, match="products"):
        fastsharp.diagonal(matrix("decaying"), products=32.0)
    with pytest.raises(InputError, match="method"):
        fastsharp.row_norms(matrix("decaying"), method="xdiag")
    with pytest.raises(InputError, match="rank"):
        fastsharp.diagonal(torch.ones(N, N, dtype=torch.float64), products=32, method="xdiag")
    with pytest.raises(NonFiniteError):
        fastsharp.diagonal((lambda v: v / 0.0, N, torch.float64), products=16, preflight="off")
    with pytest.raises(InputError, match="plain matrix"):
        fastsharp.diagonal(matrix("decaying")).as_dict()
