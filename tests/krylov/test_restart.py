"""Thick restarts: the shrunken basis is a Krylov basis again, results stay sound, and the stop rule keeps what it knew.

Oracles: float64 matrices with known eigenpairs, and the run that never restarts.
"""

from __future__ import annotations

import signal
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastsharp import rng
from fastsharp.errors import InputError, Interrupted, NotConvergedWarning
from fastsharp.krylov import lanczos, plan, restart
from fastsharp.krylov.basis import Basis, HalfRows, HostRows, Rows
from fastsharp.krylov.stopping import select
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import DenseOperator
from fastsharp.results import Eigenpairs
from tests.krylov.checks import assert_sound, eps_of, orthogonality_ratio, unit
from tests.oracles.matrices import Case, DctSpectrum, families, family, outlier_spectrum, power_law_spectrum

F64 = torch.float64
DTYPES = (torch.float32, torch.float64)
TOL = 1e-4
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp64"))


@pytest.fixture(autouse=True)
def ration_small_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget counts for tiny matrices too."""
    monkeypatch.setattr(plan, "UNRATIONED", 0)


def budget(n: int, dtype: torch.dtype, k: int, rows: int) -> int:
    """Bytes that leave room for `rows` basis rows of a run that wants k pairs."""
    return (rows + 2 * k) * (-(-n // 16) * 16) * (torch.finfo(dtype).bits // 8)


def solve(case: Case, dtype: torch.dtype, rows: int | None, **arguments: Any) -> Eigenpairs:
    n, k = case.A.shape[0], arguments.pop("k", 5)
    memory = None if rows is None else budget(n, dtype, k, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        options = {"method": "lanczos", "tol": TOL, "memory": memory, **arguments}
        return lanczos(DenseOperator(case.tensor(dtype)), k=k, **options)


def run(case: Case, basis: Basis, kept: int, steps: int, which: str = "LA") -> Tridiagonal:
    n = case.A.shape[0]
    g = rng.generator(0)
    draw = lambda: rng.normal(n, g, basis.dtype)  # noqa: E731
    operator = DenseOperator(case.tensor(basis.dtype))
    state = Tridiagonal(operator, draw(), draw, basis, lambda theta: select(theta, which, kept))
    for _ in range(steps):
        state.step()
    return state


@dtypes
def test_results_of_restarted_runs_are_sound_on_every_family(dtype: torch.dtype) -> None:
    """0 ghosts, 0 falsely converged, true residuals and bounds, orthonormal vectors; families with breakdowns included."""
    worst, restarts = np.zeros(2), 0
    for case in families(200, dtype):
        for rows in (13, 24):
            result = solve(case, dtype, rows)
            restarts += result.settings["thick_restarts"]
            try:
                worst = np.maximum(worst, assert_sound(result, case, dtype, TOL))
            except AssertionError as error:
                raise AssertionError(f"{case.name}, {rows} rows: {error}") from error
    print(f"worst ratios: residual {worst[0]:.3g}, orthogonality {worst[1]:.3g}; {restarts} restarts")  # shown by pytest -rP
    assert worst[0] <= 10 and worst[1] <= 10 and restarts > 100


@dtypes
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_values_are_those_of_the_run_that_never_restarts(which: str, dtype: torch.dtype) -> None:
    for name in ("even_rotated", "outliers_rotated", "plus_minus_rotated", "random"):
        case = family(name, 200, dtype)
        whole, restarted = (solve(case, dtype, rows, which=which) for rows in (None, 20))
        assert restarted.settings["thick_restarts"] > 0, name
        assert restarted.settings["plan"]["rows"] == 20 and restarted.settings["plan"]["kept"] == 10
        both = (whole.converged & restarted.converged).numpy()
        assert both.all() or name == "even_rotated", name
        a, b = (r.eigenvalues.abs() if which == "LM" else r.eigenvalues for r in (whole, restarted))  # x and -x may change places
        apart = np.abs(a.numpy() - b.numpy())
        allowed = (whole.error_bounds + restarted.error_bounds).numpy() + unit(case, dtype)
        assert np.all(apart[both] <= allowed[both]), name


@dtypes
def test_ritz_pairs_have_the_residuals_that_T_predicts_right_after_a_restart_and_later(dtype: torch.dtype) -> None:
    """A V' = V' T + r e_m' with the arrowhead: ||A x - theta x|| for every Ritz pair, in float64 from the matrix."""
    for name in ("outliers_rotated", "random", "rank3_rotated", "double_top_rotated"):
        try:
            case = family(name, 60, dtype)
        except (KeyError, StopIteration):
            continue
        for steps in (15, 16, 17, 22, 31):
            state = run(case, Rows(60, dtype, torch.device("cpu"), 16), 8, steps)
            theta, residuals = state.ritz()
            X = state.combine(state.coefficients(torch.arange(theta.numel()))).double().numpy()
            scaled = case.A * 2.0 ** -(state.shift or 0)
            true = np.linalg.norm(X @ scaled - theta.numpy()[:, None] * X, axis=1)
            assert np.abs(true - residuals.numpy()).max() <= 10 * 60 * eps_of(dtype) * state.norm, (name, steps)
            assert orthogonality_ratio(state.V) <= 10


def test_locked_pairs_lose_their_coupling_and_keep_their_place() -> None:
    case = family("outliers_rotated", 60, F64)
    state = run(case, Rows(60, F64, torch.device("cpu"), 24), 12, 60)
    coupling = state.blocks[-1].coupling
    assert 0.0 in coupling, "nothing was locked in 60 products"
    assert np.abs(np.array(state.blocks[-1].head).max() - case.exact.max()) <= unit(case, F64)


def test_start_component_is_what_the_epochs_say() -> None:
    """u'v_1 = u'v_{m+1} prod beta prod |lambda - head| / prod |lambda - theta|, over restarts: the theorem behind the stop rule."""
    n = 60
    case = family("random", n, F64)
    _, U = np.linalg.eigh(case.A)
    basis = Rows(n, F64, torch.device("cpu"), 12)
    state = run(case, basis, 6, 0)
    first = state._basis.vector(0).numpy().copy()
    compared = 0
    for _ in range(22):
        state.step()
        block = state.blocks[0]
        last = state._basis.vector(state.size).numpy()
        theta = state.ritz()[0].numpy()
        for i in range(n):
            if np.abs(case.exact[i] - theta).min() < 1e-3 * case.norm:
                continue  # the quotient cancels to rounding
            log = 0.0
            for epoch in (*block.past, block.epoch()):
                log += epoch.log_beta - np.log(np.abs(case.exact[i] - epoch.theta.numpy())).sum()
                log += np.log(np.abs(case.exact[i] - epoch.head.numpy())).sum()
            if any(np.abs(case.exact[i] - epoch.theta.numpy()).min() < 1e-3 * case.norm for epoch in block.past):
                continue
            assert abs(U[:, i] @ first) == pytest.approx(abs(U[:, i] @ last) * np.exp(log), rel=1e-4, abs=1e-9)
            compared += state.thick_restarts > 0
    assert state.thick_restarts >= 2 and compared > 100


@pytest.mark.parametrize(("spectrum", "most"), [(outlier_spectrum, 22), (power_law_spectrum, 50)])
def test_a_basis_of_k_plus_8_rows_costs_few_products_more(spectrum: Any, most: int) -> None:
    """Top 12 to 1e-4 at n = 32,768 with 20 rows in place of 40."""
    exact = DctSpectrum(spectrum(), torch.float32)
    restarts = 0
    for seed in range(10):
        result = lanczos(
            exact.operator, k=12, tol=1e-4, criterion="value", seed=seed, check="off", memory=budget(32768, torch.float32, 12, 20)
        )
        assert bool(result.converged.all()), seed
        assert (np.abs(result.eigenvalues.numpy() - exact.eigenvalues[:12]) <= 1e-4 * exact.eigenvalues[:12]).all(), seed
        assert result.n_matvec <= most and result.settings["plan"]["rows"] == 20
        restarts += result.settings["thick_restarts"]
    assert restarts > 0


def test_ctrl_c_during_a_restart_waits_for_its_end_and_keeps_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = family("outliers_rotated", 100, F64)
    compress, hits = Rows.compress, []

    def interrupted(self: Rows, S: torch.Tensor) -> None:
        half = self.n // 2
        hits.append(half)
        if len(hits) == 2:
            signal.raise_signal(signal.SIGINT)
        compress(self, S)

    monkeypatch.setattr(Rows, "compress", interrupted)
    with pytest.raises(Interrupted) as caught:
        solve(case, F64, 13, tol=1e-12)
    assert len(hits) == 2
    partial = caught.value.partial
    assert partial is not None and len(partial) == 5
    assert_sound(partial, case, F64, TOL)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_the_delay_the_same_ctrl_c_would_break_off_the_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above: it must matter."""
    import contextlib

    monkeypatch.setattr(restart, "_uninterrupted", contextlib.nullcontext)
    reached = []

    def interrupted(self: Rows, S: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append(S)

    monkeypatch.setattr(Rows, "compress", interrupted)
    with pytest.raises(Interrupted):
        solve(family("outliers_rotated", 100, F64), F64, 13, tol=1e-12)
    assert not reached


def test_a_full_basis_without_a_choice_is_a_clear_error() -> None:
    case = family("random", 60, F64)
    g = rng.generator(0)
    state = Tridiagonal(DenseOperator(case.tensor(F64)), rng.normal(60, g, F64), lambda: rng.normal(60, g, F64), 4)
    for _ in range(4):
        state.step()
    with pytest.raises(InputError, match="holds 5 rows and is full"):
        state.step()


@pytest.mark.parametrize("kind", ["half", "host"])
def test_every_kind_of_basis_can_be_restarted(kind: str) -> None:
    """Host rows to working precision, float16 rows to theirs: values within the square of the row's error over the gap."""
    case, cpu = family("outliers_rotated", 200, torch.float32), torch.device("cpu")
    basis: Basis = HalfRows(200, cpu, 24) if kind == "half" else HostRows(200, torch.float32, cpu, 24)
    state = run(case, basis, 12, 60)
    theta = np.sort(state.ritz()[0].numpy())[::-1][:3] * 2.0 ** (state.shift or 0)
    exact = np.sort(case.exact)[::-1][:3]
    error = np.abs(theta - exact).max() / case.norm
    assert state.thick_restarts > 0
    assert error <= (10 * 200 * eps_of(torch.float32) if kind == "host" else 4 * 2.0**-11)
