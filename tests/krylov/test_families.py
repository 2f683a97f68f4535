"""The solver on matrices built to break it: every family, float32 and float64, n = 1 ... 200, Krylov budgets 1 ... n.

Oracles: LAPACK on the float64 matrix, residuals recomputed in float64 from the matrix; neither passes through fastsharp.
Tolerances are multiples of n eps ||A|| (LAPACK's ratio tests; its own gate is 60, ours is 10).
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import torch

from fastsharp import rng
from fastsharp.errors import NonFiniteError, NotConvergedWarning, NotSymmetricError
from fastsharp.krylov import lanczos
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import CallableOperator, DenseOperator
from fastsharp.results import Eigenpairs
from tests.krylov.checks import assert_no_ghosts, assert_sound, eps_of, orthogonality_ratio, unit, wanted
from tests.oracles.matrices import Case, families, family, orthogonal, scaled_families

DTYPES = (torch.float32, torch.float64)
SIZES = (1, 2, 3, 5, 20, 200)
TOL = 1e-4
SIMPLE = ("even_rotated", "outliers_rotated", "plus_minus_rotated", "random", "mikota_squares", "geometric_rotated")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))


@cache
def cases(n: int, dtype: torch.dtype) -> tuple[Case, ...]:
    return tuple(families(n, dtype))


def matrix(case: Case, dtype: torch.dtype) -> DenseOperator:
    return DenseOperator(case.tensor(dtype))


def solve(case: Case, dtype: torch.dtype, **arguments: object) -> Eigenpairs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return lanczos(matrix(case, dtype), **{"method": "lanczos", "tol": TOL, **arguments})  # type: ignore[arg-type]


def run(case: Case, dtype: torch.dtype, steps: int) -> Tridiagonal:
    g = rng.generator(0)
    n = case.A.shape[0]
    state = Tridiagonal(matrix(case, dtype), rng.normal(n, g, dtype), lambda: rng.normal(n, g, dtype), steps)
    while state.size < steps:
        state.step()
    return state


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_D5_recurrence_to_the_full_space_is_orthonormal_and_has_no_ghosts(n: int, dtype: torch.dtype) -> None:
    """m = n steps: max|VV' - I| <= 10 n eps, T's eigenvalues are A's with their multiplicities, each once."""
    for case in cases(n, dtype):
        state = run(case, dtype, case.A.shape[0])
        theta = state.ritz()[0] * 2.0 ** (state.shift or 0)
        error = np.abs(np.sort(theta.numpy()) - case.exact).max()
        assert orthogonality_ratio(state.V) <= 10, case.name
        assert error <= 10 * unit(case, dtype), (case.name, error / unit(case, dtype))


@dtypes
def test_recurrence_holds_A_V_equals_V_T_plus_the_residual_row(dtype: torch.dtype) -> None:
    """A V' = V' T + beta_m v_{m+1} e_m', block by block, with the coefficients that were stored."""
    for case in cases(20, dtype):
        state = run(case, dtype, 12)
        V = state.V.double().numpy()
        for block in state.blocks:
            m = len(block.alpha)
            T = np.diag(block.alpha) + np.diag(block.beta[:-1], 1) + np.diag(block.beta[:-1], -1)
            R = V[block.start : block.start + m] @ case.A * 2.0 ** -(state.shift or 0) - T @ V[block.start : block.start + m]
            assert np.abs(R[:-1]).max(initial=0.0) <= 10 * unit(case, dtype), case.name
            assert abs(np.linalg.norm(R[-1]) - block.beta[-1]) <= 10 * unit(case, dtype), case.name


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_every_result_is_sound_at_every_budget(n: int, dtype: torch.dtype) -> None:
    """0 ghosts, 0 falsely converged, residuals and bounds true, vectors orthonormal, in what any budget returns."""
    worst = np.zeros(2)
    for case in cases(n, dtype):
        size = case.A.shape[0]
        for m in sorted({m for m in (1, 2, 20, 60, 100, size) if m <= size}):
            result = solve(case, dtype, k=min(5, m), max_iter=m)
            assert result.n_matvec <= m, case.name
            try:
                worst = np.maximum(worst, assert_sound(result, case, dtype, TOL))
            except AssertionError as error:
                raise AssertionError(f"{case.name}, n = {size}, m = {m}: {error}") from error
    print(f"worst ratios: residual {worst[0]:.3g}, orthogonality {worst[1]:.3g}")  # shown by pytest -rP
    assert worst[0] <= 10 and worst[1] <= 10


@dtypes
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_converged_values_of_simple_spectra_are_the_wanted_ones(which: str, dtype: torch.dtype) -> None:
    """Index and value against LAPACK; the error of a Rayleigh quotient is at most the residual.

    Values so small that the rounding floor decided about them, not tol, carry no such promise and are left out.
    """
    compared = 0
    for name in SIMPLE:
        case = family(name, 200, dtype)
        result = solve(case, dtype, which=which)
        assert bool(result.converged.all()), name
        values, truth = result.eigenvalues.numpy(), wanted(case.exact, which, 5)
        if which == "LM":  # +theta and -theta tie
            values, truth = np.abs(values), np.abs(truth)
        certain = TOL * np.abs(truth) >= 32 * eps_of(dtype) * case.norm
        compared += int(certain.sum())
        errors = np.abs(values - truth)
        assert np.all((errors <= result.residuals.numpy() + unit(case, dtype))[certain]), (name, values, truth)
    assert compared >= 15


@dtypes
def test_eigenvalues_for_k_begin_those_for_k_plus_1(dtype: torch.dtype) -> None:
    for name in SIMPLE:
        case = family(name, 200, dtype)
        few, more = (solve(case, dtype, k=k) for k in (4, 5))
        difference = (few.eigenvalues - more.eigenvalues[:4]).abs()
        assert bool((difference <= few.error_bounds + more.error_bounds[:4] + unit(case, dtype)).all()), name


@dtypes
def test_shift_mirror_and_similarity_act_on_eigenvalues_as_on_the_matrix(dtype: torch.dtype) -> None:
    """A + cI, -A, P'AP and Q'AQ: compared within the two residuals, plus the rounding of the transformed matrix."""
    for name in SIMPLE:
        case = family(name, 200, dtype)
        n, base = 200, solve(case, dtype)
        Q = orthogonal(n, seed=11)
        order = np.random.default_rng(2).permutation(n)
        rotated = Q.T @ case.A @ Q
        variants = {
            "shift": (case.A + case.norm * np.eye(n), "LA", lambda v, c=case: v - c.norm),
            "mirror": (-case.A, "SA", lambda v: -v.flip(0)),
            "permutation": (case.A[np.ix_(order, order)], "LA", lambda v: v),
            "similarity": ((rotated + rotated.T) / 2, "LA", lambda v: v),
        }
        for label, (A, which, back) in variants.items():
            other = solve(Case(name, A, case.exact), dtype, which=which)
            bound = other.residuals.flip(0) if label == "mirror" else other.residuals
            difference = (back(other.eigenvalues) - base.eigenvalues).abs()
            assert bool((difference <= base.residuals + bound + 2 * unit(case, dtype)).all()), (name, label, difference)


@dtypes
@pytest.mark.parametrize("power", [-80, -20, 1, 20, 80])
def test_C6_scale_by_a_power_of_two_is_bitwise_equivariant(power: int, dtype: torch.dtype) -> None:
    for name in SIMPLE:
        case = family(name, 60, dtype)
        base, scaled = solve(case, dtype), solve(Case(name, np.ldexp(case.A, power), np.ldexp(case.exact, power)), dtype)
        assert torch.equal(scaled.eigenvalues, base.eigenvalues * 2.0**power), name
        assert torch.equal(scaled.residuals, base.residuals * 2.0**power), name
        assert torch.equal(scaled.eigenvectors, base.eigenvectors), name
        assert scaled.n_matvec == base.n_matvec, name


@dtypes
def test_C6_scale_by_any_factor_moves_relative_values_by_rounding(dtype: torch.dtype) -> None:
    case = family("outliers_rotated", 200, dtype)
    base = solve(case, dtype)
    for factor in (1e-12, 1e12):
        A = torch.from_numpy(case.A * factor).to(dtype).double().numpy()
        other = solve(Case("scaled", A, case.exact * factor), dtype)
        assert (
            float((other.eigenvalues / factor - base.eigenvalues).abs().max())
            <= float(base.error_bounds.max()) + 10 * eps_of(dtype) * case.norm
        )


@dtypes
def test_P8_results_stay_finite_and_sound_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    for case in scaled_families(200, dtype):
        result = solve(case, dtype)
        assert bool(result.converged.all()), case.name
        assert_sound(result, case, dtype, TOL)
        assert_sound(solve(case, dtype, method="dense"), case, dtype, TOL)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_bad_entry_raises(value: float, dtype: torch.dtype) -> None:
    A = family("random", 80, dtype).tensor(dtype)
    A[3, 5] = A[5, 3] = value
    with pytest.raises(NonFiniteError, match=r"entry \(3, 5\)"):
        lanczos(DenseOperator(A))
    for arguments in ({"check": "auto"}, {"check": "off"}, {"method": "dense"}):
        with pytest.raises(NonFiniteError, match="NaN or Inf"):
            lanczos(CallableOperator(lambda v: A @ v, 80, dtype), **arguments)  # type: ignore[arg-type]


@dtypes
def test_non_finite_product_in_mid_run_is_named_and_keeps_the_pairs_so_far(dtype: torch.dtype) -> None:
    A = family("random", 80, dtype).tensor(dtype)
    calls = 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return A @ v if calls < 7 else torch.full_like(v, float("nan"))

    with pytest.raises(NonFiniteError, match="product 7 of the operator contains NaN") as caught:
        lanczos(CallableOperator(product, 80, dtype), check="off")
    assert len(caught.value.partial) == 5 and caught.value.partial.n_matvec == 7  # type: ignore[attr-defined]


@dtypes
@pytest.mark.parametrize("n", [2, 20, 200])
def test_D7_a_matrix_that_is_not_symmetric_by_1e_3_raises(n: int, dtype: torch.dtype) -> None:
    A = family("random", n, dtype).tensor(dtype)
    A[0, 1] += 1e-3 * float(A.abs().max()) * (n**0.5)  # 1e-3 of ||A||, up to a constant
    with pytest.raises(NotSymmetricError):
        lanczos(DenseOperator(A))
    for method in ("lanczos", "dense"):
        with pytest.raises(NotSymmetricError):
            lanczos(CallableOperator(lambda v: A @ v, n, dtype), k=min(n, 5), method=method)


@dtypes
def test_D7_the_recurrence_itself_sees_an_antisymmetric_part(dtype: torch.dtype) -> None:
    """Without probes, v_i'A v_j for i <= j - 2 betrays it: a dense antisymmetric part of 1 % of ||A||."""
    A = family("even_rotated", 200, dtype).tensor(dtype)
    N = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 200))).to(dtype)
    A += 1e-2 * (N - N.T) / float(torch.linalg.matrix_norm(N - N.T, ord=2)) * float(torch.linalg.matrix_norm(A, ord=2))
    with pytest.raises(NotSymmetricError, match="at product"):
        lanczos(CallableOperator(lambda v: A @ v, 200, dtype), check="off", max_iter=200, tol=1e-8)


def test_symmetry_probes_raise_no_false_alarm_on_symmetric_float32_products() -> None:
    """20 seeds, large and cancelling matrices: rank one of ones, alternating signs, graded, random, n up to 1,500."""
    n = 1500
    g = torch.Generator().manual_seed(0)
    R = torch.randn(n, n, generator=g)
    B = torch.randn(40, n, generator=g)
    ones = torch.ones(n)
    symmetric = (R + R.T) / 2
    grades = torch.logspace(-6, 0, n)
    products = {
        "random": lambda v: symmetric @ v,
        "ones": lambda v: ones * (ones @ v),
        "gram": lambda v: B.T @ (B @ v),
        "graded": lambda v: grades * (symmetric @ (grades * v)),
    }
    from fastsharp.krylov.symmetry import probe

    for product in products.values():
        for seed in range(20):
            probe(CallableOperator(product, n), seed, "test")


@dtypes
def test_ghost_check_goes_red_without_reorthogonalisation(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: with `ops.update` doing nothing (and the symmetry watch off) the same checks must fail."""
    from fastsharp import ops

    monkeypatch.setattr(ops, "update", lambda V, w, c, *, out: out.copy_(w.double().square().sum()[None]))
    monkeypatch.setattr(Tridiagonal, "_watch_symmetry", lambda self, c: None)
    case = family("outliers_rotated", 200, dtype)
    state = run(case, dtype, 150)
    assert orthogonality_ratio(state.V) > 10
    with pytest.raises(AssertionError, match="more Ritz values"):
        assert_no_ghosts(state.ritz()[0], case.exact, 10 * unit(case, dtype))


@dtypes
def test_lost_orthogonality_raises_rather_than_returning_ghosts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The symmetry watch is a second line: c_i grows as orthogonality goes, long before a ghost appears."""
    from fastsharp import ops

    monkeypatch.setattr(ops, "update", lambda V, w, c, *, out: out.copy_(w.double().square().sum()[None]))
    with pytest.raises(NotSymmetricError):
        run(family("outliers_rotated", 200, dtype), dtype, 150)
