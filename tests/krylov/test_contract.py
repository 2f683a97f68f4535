"""What a call of `lanczos` promises besides eigenvalues: arguments, budgets, product accounting, records, and no side effects."""

from __future__ import annotations

import random
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fastsharp import rng
from fastsharp.errors import (
    ArgumentTypeError,
    DtypeError,
    InputError,
    NondeterministicOperatorError,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    ShapeError,
    StaleOperatorError,
)
from fastsharp.krylov import lanczos
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator, SymmetricOperator
from tests.krylov.checks import assert_sound, true_residuals, unit, wanted
from tests.oracles.matrices import family

F64 = torch.float64
CASE = family("outliers_rotated", 200, F64)


def operator(n: int = 200, name: str = "outliers_rotated", dtype: torch.dtype = F64) -> DenseOperator:
    return DenseOperator(family(name, n, dtype).tensor(dtype))


def product_operator() -> CountingOperator:
    A = CASE.tensor(F64)
    return CountingOperator(CallableOperator(lambda v: A @ v, 200, F64))


@pytest.mark.parametrize("method", ["auto", "lanczos", "dense"])
def test_D1_k_above_n_raises_and_names_both(method: str) -> None:
    with pytest.raises(InputError, match=r"k = 30 .* n = 18"):
        lanczos(operator(18), k=30, method=method)


@pytest.mark.parametrize(("n", "method"), [(1, "auto"), (18, "auto"), (18, "dense"), (18, "lanczos"), (80, "lanczos")])
def test_D2_k_equal_to_n_gives_the_whole_spectrum(n: int, method: str) -> None:
    case = family("outliers_rotated", n, F64)
    result = lanczos(DenseOperator(case.tensor(F64)), k=n, method=method)
    assert bool(result.converged.all()) and result.n_matvec == n
    assert np.abs(result.eigenvalues.numpy() - case.exact[::-1]).max() <= 10 * unit(case, F64)
    assert_sound(result, case, F64, 1e-3)


@pytest.mark.parametrize("k", [0, -3])
def test_D3_k_below_one_raises(k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}"):
        lanczos(operator(), k=k)


@pytest.mark.parametrize("k", [2.5, 2.0, "2", True, None, torch.tensor(2)])
def test_D4_k_that_is_no_int_raises_a_type_error(k: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="k is") as caught:
        lanczos(operator(), k=k)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"which": "top"}, InputError, "which is 'top'"),
        ({"criterion": "both"}, InputError, "criterion is 'both'"),
        ({"method": "qr"}, InputError, "method is 'qr'"),
        ({"check": "maybe"}, InputError, "check is 'maybe'"),
        ({"tol": 0.0}, InputError, "tol is 0.0"),
        ({"tol": float("nan")}, InputError, "tol is nan"),
        ({"tol": float("inf")}, InputError, "tol is inf"),
        ({"tol": "1e-3"}, ArgumentTypeError, "tol is a str"),
        ({"max_iter": 4}, InputError, "max_iter = 4 products cannot give k = 5"),
        ({"max_iter": 1e3}, ArgumentTypeError, "max_iter is 1000.0"),
        ({"seed": 2**63}, InputError, "64-bit"),
        ({"seed": 0.5}, ArgumentTypeError, "seed is 0.5"),
        ({"v0": [1.0] * 200}, ArgumentTypeError, "v0 is a list"),
        ({"v0": torch.ones(199, dtype=F64)}, ShapeError, r"v0 has shape \(199,\)"),
        ({"v0": torch.ones(200, 1, dtype=F64)}, ShapeError, r"v0 has shape \(200, 1\)"),
        ({"v0": torch.ones(200)}, DtypeError, "v0 is torch.float32"),
        ({"v0": torch.zeros(200, dtype=F64)}, InputError, "zero vector"),
        ({"v0": torch.full((200,), float("nan"), dtype=F64)}, NonFiniteError, "v0 contains NaN"),
    ],
)
def test_a_bad_argument_is_named_before_any_product(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    counted = product_operator()
    with pytest.raises(error, match=match):
        lanczos(counted, **arguments)
    assert counted.count == 0


def test_P10_not_converged_warns_at_the_callers_line_with_labelled_pairs() -> None:
    """The budget suffices for the outliers and not for the bulk."""
    with pytest.warns(NotConvergedWarning, match="Raise max_iter \\(now 8\\) or tol") as caught:
        result = lanczos(operator(), k=5, max_iter=8, tol=1e-4)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert caught[0].message.partial is result  # type: ignore[union-attr]
    assert result.n_matvec == 8 and result.converged.tolist() == [True, True, True, False, False]
    assert "3 of 5 pairs converged" in str(caught[0].message)
    assert bool((result.error_bounds >= result.residuals).all())  # an eigenvalue may hide in the gap that r^2 / gap trusts
    assert any("may be missing" in note for note in result.notes)
    assert_sound(result, CASE, F64, 1e-4)


def test_P10_strict_raises_with_the_same_pairs() -> None:
    with pytest.raises(NotConvergedError, match="3 of 5 pairs converged") as caught:
        lanczos(operator(), k=5, max_iter=8, tol=1e-4, strict=True)
    with pytest.warns(NotConvergedWarning):
        result = lanczos(operator(), k=5, max_iter=8, tol=1e-4)
    assert torch.equal(caught.value.partial.eigenvalues, result.eigenvalues)
    assert isinstance(caught.value, RuntimeError)


def test_a_list_that_has_not_settled_is_reported_although_every_pair_met_its_tolerance() -> None:
    with pytest.warns(NotConvergedWarning, match="may be missing"):
        result = lanczos(operator(), k=1, max_iter=3, tol=0.9)
    assert bool(result.converged.all())


def test_a_tolerance_below_the_precision_is_met_by_the_floor_and_says_so() -> None:
    result = lanczos(operator(dtype=torch.float32), k=3, tol=1e-12)
    assert bool(result.converged.all())
    assert any("rounding floor" in note for note in result.notes)


@pytest.mark.parametrize(("k", "n", "most"), [(5, 200, 200), (5, 2000, 300), (20, 2000, 400)])
def test_default_budget_is_the_smaller_of_n_and_the_larger_of_20_k_and_300(k: int, n: int, most: int) -> None:
    squares = torch.arange(1, n + 1, dtype=F64) ** 2
    result = lanczos(CallableOperator(lambda v: v * squares, n, F64), k=k)
    assert result.settings["max_iter"] == most and result.n_matvec <= most


# --- accounting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("check", "probes"), [("auto", 4), ("on", 4), ("off", 0)])
def test_every_product_is_accounted_for(check: str, probes: int, verify: bool) -> None:
    counted = product_operator()
    result = lanczos(counted, k=5, check=check, verify=verify)
    assert result.n_verify == (5 if verify else 0) and result.settings["probe_products"] == probes
    assert counted.count == result.n_matvec + result.n_verify + probes
    assert any("4 further products" in note for note in result.notes) == bool(probes)


def test_the_dense_path_takes_n_products_and_no_others() -> None:
    counted = product_operator()
    result = lanczos(counted, k=5, method="dense")
    assert counted.count == result.n_matvec == 200 and result.n_verify == 0 and result.verified
    assert result.settings["probe_products"] == 0
    assert_sound(result, CASE, F64, 1e-3)


@pytest.mark.parametrize(("n", "k", "method"), [(64, 5, "dense"), (65, 5, "lanczos"), (80, 40, "dense"), (81, 40, "lanczos")])
def test_auto_is_dense_up_to_n_64_or_2_k(n: int, k: int, method: str) -> None:
    assert lanczos(operator(n), k=k).settings["method"] == method


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_dense_and_lanczos_agree_in_index_and_order(which: str) -> None:
    """BE takes the odd one from the top."""
    case = family("random", 200, F64)
    for k in (1, 4, 5):
        a, b = (lanczos(DenseOperator(case.tensor(F64)), k=k, which=which, method=m, tol=1e-8) for m in ("dense", "lanczos"))
        assert bool(((a.eigenvalues - b.eigenvalues).abs() <= a.residuals + b.residuals + unit(case, F64)).all())
        assert np.abs(a.eigenvalues.numpy() - wanted(case.exact, which, k)).max() <= 10 * unit(case, F64)
        order = a.eigenvalues.abs() if which == "LM" else a.eigenvalues
        assert torch.equal(order, order.sort(descending=True).values)


def test_without_verification_the_residuals_are_the_recurrences_and_still_true() -> None:
    """beta_m |s_m| = ||A x - theta x|| up to rounding."""
    plain, verified = (lanczos(operator(), k=5, tol=1e-4, verify=v) for v in (False, True))
    assert not plain.verified and verified.verified and any("not verified" in note for note in plain.notes)
    assert float((plain.residuals - true_residuals(plain, CASE.A)).abs().max()) <= 10 * unit(CASE, F64)
    assert torch.equal(plain.eigenvectors, verified.eigenvectors)


# --- on_step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 2.0**-90])
def test_on_step_reports_every_product_the_wanted_values_and_an_expectation(factor: float) -> None:
    calls: list[tuple[int, tuple[float, ...], float]] = []
    A = CASE.tensor(F64) * factor
    result = lanczos(DenseOperator(A), k=3, verify=False, on_step=lambda *a: calls.append(a))
    steps, values, expected = zip(*calls, strict=True)
    assert steps == tuple(range(1, result.n_matvec + 1))
    assert [len(v) for v in values] == [min(3, j) for j in steps]
    assert all(list(v) == sorted(v, reverse=True) for v in values)
    assert values[-1] == tuple(result.eigenvalues.tolist())
    assert all(b[0] >= a[0] * (1 - 1e-12) for a, b in pairwise(values)), "the top Ritz value falls"
    assert expected[0] == result.settings["max_iter"]
    assert all(step <= e <= result.settings["max_iter"] for step, e in zip(steps, expected, strict=True))
    assert expected[-1] <= 1.5 * result.n_matvec


# --- records --------------------------------------------------------------------------------------------------------


class Recorded(SymmetricOperator):
    """2 I with a record of its own, and a matrix that may be declared stale."""

    notes = ("a note",)  # type: ignore[assignment]
    provenance = {"model": "none"}  # type: ignore[assignment]  # noqa: RUF012
    settings = {"reduction": "mean", "k": "the operator's"}  # type: ignore[assignment]  # noqa: RUF012
    layout = "a layout"
    checks = 0
    stale_at = -1

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(2 * V)

    def check_unchanged(self) -> None:
        self.checks += 1
        if self.checks == self.stale_at:
            raise StaleOperatorError("changed")


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_result_carries_the_operators_record_then_the_requests(method: str) -> None:
    result = lanczos(Recorded(70, F64, torch.device("cpu")), k=2, method=method, seed=3)
    assert result.layout == "a layout" and result.provenance == {"model": "none"} and result.notes[0] == "a note"
    assert next(iter(result.settings)) == "reduction" and result.settings["k"] == 2 and result.settings["seed"] == 3
    assert abs(result.settings["norm"] - 2.0) <= 4 * torch.finfo(F64).eps
    assert {"restarts", "breakdowns", "second_passes", "probe_products", "tol", "criterion"} <= set(result.settings)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_operator_that_changes_before_or_during_a_run_raises(at: int, method: str) -> None:
    moved = Recorded(70, F64, torch.device("cpu"))
    moved.stale_at = at
    with pytest.raises(StaleOperatorError):
        lanczos(moved, k=2, method=method)


def test_a_product_that_does_not_repeat_raises() -> None:
    g = torch.Generator().manual_seed(0)
    A = CASE.tensor(F64)
    with pytest.raises(NondeterministicOperatorError, match="two products with the same vector differ"):
        lanczos(CallableOperator(lambda v: A @ v + 1e-9 * torch.randn(200, generator=g, dtype=F64), 200, F64))


# --- repeatability and side effects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_P28_two_runs_are_bitwise_equal(method: str) -> None:
    a, b = (lanczos(operator(dtype=torch.float32), method=method, seed=5) for _ in range(2))
    for name in ("eigenvalues", "eigenvectors", "residuals", "error_bounds", "converged"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.n_matvec, a.notes, a.settings) == (b.n_matvec, b.notes, b.settings)


def test_seeds_and_start_vectors_reach_the_run() -> None:
    few = {"k": 1, "max_iter": 2, "verify": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        tops = {float(lanczos(operator(), **few, **a).eigenvalues[0]) for a in ({}, {"seed": 1}, {"v0": torch.ones(200, dtype=F64)})}
    assert len(tops) == 3


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_global_generators_and_arguments_are_left_as_they_were(method: str) -> None:
    v0, A = torch.ones(200, dtype=F64), CASE.tensor(F64)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    lanczos(DenseOperator(A), v0=v0, method=method, check="on")
    lanczos(operator(name="rank3_rotated"), method=method)  # restarts draw, too
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]
    assert torch.equal(v0, torch.ones(200, dtype=F64)) and torch.equal(A, CASE.tensor(F64))


def test_random_vectors_are_one_stream_for_every_dtype() -> None:
    a, b = (rng.normal(1000, rng.generator(3), dtype) for dtype in (torch.float32, F64))
    assert torch.equal(a.double(), b)
    g = rng.generator(3)
    assert torch.equal(rng.normal(1000, g, F64), b) and not torch.equal(rng.normal(1000, g, F64), b)
    assert abs(float(b.mean())) <= 5 / 1000**0.5 and abs(float(b.var()) - 1) <= 5 * (2 / 1000) ** 0.5


def test_random_vectors_longer_than_a_chunk_go_on_with_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_CHUNK", 64)
    g = rng.generator(1)
    parts = [torch.randn(64, generator=g), torch.randn(64, generator=g), torch.randn(22, generator=g)]
    assert torch.equal(rng.normal(150, rng.generator(1), torch.float32), torch.cat(parts))
