"""spectrum: every part against the dense matrix, every product counted once, and nothing lost on the way."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastsharp.errors import ArgumentTypeError, BasisMemoryError, InputError, Interrupted, NotConvergedWarning
from fastsharp.krylov import plan
from fastsharp.krylov.spectrum import spectrum
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator
from fastsharp.results import Spectrum
from tests.krylov.checks import unit
from tests.oracles.matrices import Case, family

F64 = torch.float64
NAMES = ("outliers_rotated", "random", "even_rotated", "rank3_rotated", "identity", "zero")


def solve(case: Case, dtype: torch.dtype = F64, **arguments: Any) -> tuple[Spectrum, int]:
    counted = CountingOperator(DenseOperator(case.tensor(dtype)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        result = spectrum(counted, **{"check": "off", "k": 3, **arguments})
    return result, counted.count


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_that_of_the_dense_matrix(name: str, dtype: torch.dtype) -> None:
    """Values at both ends within their bounds, W1 within its bound, trace and norm inside their intervals (this seed)."""
    case = family(name, 200, dtype)
    s, count = solve(case, dtype)
    exact, u = np.sort(case.exact)[::-1], unit(case, dtype)
    assert s.n_matvec == count, "a product was not counted, or counted twice"
    values = s.eigenpairs.eigenvalues.numpy()
    ends = np.concatenate([exact[:3], exact[-3:]])
    good = s.eigenpairs.converged.numpy()
    assert name in ("rank3_rotated", "identity", "zero") or np.all(
        np.abs(values - ends)[good] <= s.eigenpairs.error_bounds.numpy()[good] + u
    )
    assert float(s.density.weights.sum()) == pytest.approx(1.0, abs=1e-6)
    nodes, weights = s.density.nodes.numpy(), s.density.weights.numpy()
    grid = np.sort(np.concatenate([nodes, exact]))
    F = np.searchsorted(np.sort(exact), grid, side="right") / 200
    G = np.concatenate([[0.0], np.cumsum(weights)])[np.searchsorted(nodes, grid, side="right")]
    assert float((np.abs(F - G)[:-1] * np.diff(grid)).sum()) <= s.density.w1_bound + u
    assert s.trace is not None and s.frobenius is not None
    for estimate, truth in ((s.trace, exact.sum()), (s.frobenius, np.sqrt((exact**2).sum()))):
        assert estimate.interval[0] - 200 * u <= truth <= estimate.interval[1] + 200 * u
        assert estimate.converged


def test_trace_and_norm_share_their_products() -> None:
    case = family("random", 200, F64)
    s, count = solve(case, rtol=0.1)
    krylov, verified = s.eigenpairs.n_matvec, s.eigenpairs.n_verify
    assert s.trace is not None and s.frobenius is not None
    assert s.frobenius.n_matvec == count - krylov - verified
    assert s.trace.n_matvec <= s.frobenius.n_matvec < s.trace.n_matvec + s.frobenius.samples + 16


def test_intervals_cover_the_truth_over_seeds() -> None:
    """200 seeds of a nominal 95 %: at least 177 hits have probability 0.9999 under the promise."""
    case = family("random", 80, F64)
    hits = np.zeros(2, dtype=int)
    for seed in range(200):
        s, _ = solve(case, k=1, steps=10, tol=0.5, rtol=0.2, seed=seed, max_iter=12)
        assert s.trace is not None and s.frobenius is not None
        hits += [
            s.trace.interval[0] <= case.exact.sum() <= s.trace.interval[1],
            s.frobenius.interval[0] <= np.sqrt((case.exact**2).sum()) <= s.frobenius.interval[1],
        ]
    print(f"covered: trace {hits[0]}, norm {hits[1]} of 200")  # shown by pytest -rP
    assert hits.min() >= 177


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_small_matrix_is_known_whole(n: int) -> None:
    A = torch.diag(torch.arange(1.0, n + 1, dtype=F64))
    s = spectrum(DenseOperator(A), k=1, check="off")
    assert s.trace is not None and s.frobenius is not None
    assert float(s.trace) == pytest.approx(n * (n + 1) / 2) and s.trace.samples == 0
    assert float(s.frobenius) == pytest.approx(float(A.norm()))
    assert len(s.eigenpairs) == min(2, n)


def test_power_of_two_scaling_is_bitwise() -> None:
    case = family("outliers_rotated", 100, F64)
    one = spectrum(DenseOperator(case.tensor(F64)), k=2, check="off", seed=3)
    other = spectrum(DenseOperator(case.tensor(F64) * 2.0**600), k=2, check="off", seed=3)
    assert torch.equal(one.eigenpairs.eigenvalues * 2.0**600, other.eigenpairs.eigenvalues)
    assert torch.equal(one.density.nodes * 2.0**600, other.density.nodes)
    assert one.trace is not None and other.trace is not None and one.trace.value * 2.0**600 == other.trace.value


@pytest.mark.parametrize("at", [1, 5, 40, 95])
def test_ctrl_c_keeps_what_there_is(at: int) -> None:
    A, calls = family("random", 200, F64).tensor(F64), [0]

    def product(v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return A @ v

    with pytest.raises(Interrupted) as caught:
        spectrum(CallableOperator(product, 200, F64), k=2, check="off", steps=60)
    partial = caught.value.partial
    assert (partial is None) == (at == 1)
    if partial is not None:
        assert len(partial.eigenpairs) and float(partial.density.weights.sum()) == pytest.approx(1.0)
        assert partial.trace is None


def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    A = DenseOperator(torch.eye(100, dtype=F64))
    for bad, error in (
        ({"steps": 0}, InputError),
        ({"steps": 2.0}, ArgumentTypeError),
        ({"rtol": 0.0}, InputError),
        ({"k": 0}, InputError),
        ({"k": True}, ArgumentTypeError),
        ({"max_products": 3}, InputError),
        ({"confidence": 1.5}, InputError),
    ):
        with pytest.raises(error, match=next(iter(bad))):
            spectrum(A, **bad)  # type: ignore[arg-type]
    monkeypatch.setattr(plan, "UNRATIONED", 0)
    B = DenseOperator(torch.eye(100))
    with pytest.raises(BasisMemoryError, match="one by one"):
        spectrum(B, k=1, memory=(60 + 4) * 112 * 2)
