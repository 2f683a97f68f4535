"""Start vectors and matrices whose Krylov space closes early or hides what is wanted: breakdown, restart, and what is then promised."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fastsharp import rng
from fastsharp.errors import NotConvergedWarning
from fastsharp.krylov import lanczos
from fastsharp.krylov.tridiagonal import Tridiagonal, breakdown_threshold
from fastsharp.operator import DenseOperator
from fastsharp.results import Eigenpairs
from tests.krylov.checks import assert_sound, eps_of, unit
from tests.oracles.matrices import Case, DctSpectrum, family, orthogonal

dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("fp32", "fp64"))
N = 200


def rotated(values: np.ndarray, dtype: torch.dtype) -> tuple[Case, torch.Tensor]:
    """Q diag(values) Q' and the eigenvectors as rows, in the order of `values`."""
    Q = orthogonal(values.size)
    A = torch.tensor((Q * values) @ Q.T, dtype=dtype).double().numpy()
    A = (A + A.T) / 2
    return Case("rotated", A, np.linalg.eigvalsh(A)), torch.tensor(Q.T.copy(), dtype=dtype)


def solve(case: Case, dtype: torch.dtype, **arguments: object) -> Eigenpairs:
    return lanczos(DenseOperator(case.tensor(dtype)), **{"method": "lanczos", "tol": 1e-4, **arguments})  # type: ignore[arg-type]


OUTLIERS = np.r_[100.0, 60.0, 30.0, 10.0, 5.0, np.linspace(1.0, 0.0, N - 5)]


@dtypes
@pytest.mark.parametrize("rank", [0, 3, N - 1], ids=["top", "fourth", "bottom"])
def test_start_vector_that_is_an_eigenvector_hides_nothing(rank: int, dtype: torch.dtype) -> None:
    case, vectors = rotated(OUTLIERS, dtype)
    result = solve(case, dtype, v0=vectors[rank])
    assert bool(result.converged.all())
    assert_sound(result, case, dtype, 1e-4)
    assert np.abs(result.eigenvalues.numpy() - OUTLIERS[:5]).max() <= float(result.residuals.max()) + 2 * unit(case, dtype)


@dtypes
@pytest.mark.parametrize("hidden", [1, 3])
def test_start_vector_orthogonal_to_the_top_hides_nothing(hidden: int, dtype: torch.dtype) -> None:
    """Also the ill-behaved case: v0 lies in the span of a few other eigenvectors, an invariant space."""
    case, vectors = rotated(OUTLIERS, dtype)
    for v0 in (vectors[hidden:].sum(0), vectors[hidden : hidden + 4].sum(0), 1e-30 * vectors[hidden:].sum(0)):
        result = solve(case, dtype, v0=v0)
        assert bool(result.converged.all())
        assert np.abs(result.eigenvalues.numpy() - OUTLIERS[:5]).max() <= float(result.residuals.max()) + 2 * unit(case, dtype)


def test_a_start_vector_without_any_trace_of_the_top_still_finds_it() -> None:
    """Diagonal, so that no rounding ever mixes the top in: only the random part that `lanczos` adds does."""
    v0 = torch.ones(N, dtype=torch.float64)
    v0[0] = 0.0
    result = lanczos(DenseOperator(torch.diag(torch.from_numpy(OUTLIERS))), v0=v0, method="lanczos", tol=1e-6)
    assert np.abs(result.eigenvalues.numpy() - OUTLIERS[:5]).max() <= 1e-6 * 100


def test_the_recurrence_restarts_beside_an_exactly_invariant_start() -> None:
    """Without the random part of v0: e_1 of a diagonal matrix closes the space at once, the next block finds the rest."""
    d = torch.tensor([3.0, 7.0, 5.0, 1.0, 2.0], dtype=torch.float64)
    g = rng.generator(0)
    start = torch.zeros(5, dtype=torch.float64)
    start[0] = 1.0
    state = Tridiagonal(DenseOperator(torch.diag(d)), start, lambda: rng.normal(5, g, torch.float64), 5)
    while not state.exhausted:
        state.step()
    assert [b.start for b in state.blocks] == [0, 1] and state.breakdowns == 1
    assert np.abs(np.sort(state.ritz()[0].numpy()) - [1, 2, 3, 5, 7]).max() <= 10 * 5 * eps_of(torch.float64) * 7


@dtypes
@pytest.mark.parametrize("name", ["zero_n", "identity", "c_identity", "rank1_rotated", "rank3_rotated"])
def test_D6_low_rank_identity_and_zero_break_down_cleanly(name: str, dtype: torch.dtype) -> None:
    """Relative breakdown test and random restart: right values with their copies from the restarts, no NaN, few products."""
    case = family(name.removesuffix("_n"), N, dtype)
    result = solve(case, dtype)
    truth = np.sort(case.exact)[::-1]
    assert bool(result.converged.all()) and result.n_matvec <= 12
    assert result.settings["restarts"] >= 1
    assert_sound(result, case, dtype, 1e-4)
    assert np.abs(result.eigenvalues.numpy() - truth[:5]).max() <= 10 * unit(case, dtype)


@dtypes
@pytest.mark.parametrize("method", ["lanczos", "dense"])
@pytest.mark.parametrize("n", [1, 5, 64])
def test_C3_zero_hessian_gives_exact_zeros_converged(n: int, method: str, dtype: torch.dtype) -> None:
    result = lanczos(DenseOperator(torch.zeros(n, n, dtype=dtype)), k=1 if n == 1 else 3, method=method)
    assert torch.equal(result.eigenvalues, torch.zeros_like(result.eigenvalues))
    assert torch.equal(result.residuals, torch.zeros_like(result.residuals))
    assert bool(result.converged.all()) and bool(torch.isfinite(result.eigenvectors).all())


@dtypes
def test_plus_minus_pairs_are_both_found_and_neither_twice(dtype: torch.dtype) -> None:
    """LM on +-3: both, whichever first; LA and SA take one each; BE takes both, the larger first."""
    case = family("plus_minus_rotated", N, dtype)
    room = 10 * unit(case, dtype)
    for which, want in (("LM", [-3.0, 3.0]), ("BE", [3.0, -3.0]), ("LA", [3.0]), ("SA", [-3.0])):
        result = solve(case, dtype, k=len(want), which=which)
        values = result.eigenvalues.sort().values if which == "LM" else result.eigenvalues
        assert bool(result.converged.all())
        errors = (values - torch.tensor(want, dtype=torch.float64)).abs()
        assert bool((errors <= result.error_bounds.max() + room).all()), which


@dtypes
def test_a_double_eigenvalue_is_listed_at_most_twice_and_never_with_a_wrong_value(dtype: torch.dtype) -> None:
    case = family("double_top_rotated", N, dtype)
    for k in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            result = solve(case, dtype, k=k)
        assert_sound(result, case, dtype, 1e-4)
        assert int((result.eigenvalues > 1.5).sum()) <= 2


def test_breakdown_threshold_spares_an_outlier_run_of_a_hundred_million_parameters() -> None:
    """fp32: a Hessian's local beta may be 600 times below its top value, and 10 sqrt(n) eps ||T|| would cut there."""
    eps = eps_of(torch.float32)
    healthy_beta = 60.0 / 600.0
    assert breakdown_threshold(100_000_000, eps, 60.0) < healthy_beta / 5 < 10 * math.sqrt(1e8) * eps * 60.0
    assert breakdown_threshold(100_000_000, eps, 60.0) == breakdown_threshold(256, eps, 60.0)
    assert breakdown_threshold(4, eps, 1.0) == 20 * eps


@dtypes
def test_an_outlier_run_is_not_cut_and_needs_no_restart(dtype: torch.dtype) -> None:
    """Top value 600 times the bulk's local beta: twelve pairs from one Krylov space."""
    values = np.r_[np.geomspace(600.0, 30.0, 12), np.random.default_rng(0).random(4000)]
    result = lanczos(DctSpectrum(values, dtype).operator, k=12, tol=1e-4, check="off")
    assert bool(result.converged.all()) and result.settings["restarts"] == 0
    assert np.abs(result.eigenvalues.numpy() / values[:12] - 1).max() <= 1e-4
