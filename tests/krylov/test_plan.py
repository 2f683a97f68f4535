"""The memory plan: which basis fits which budget, what is said about it, and that a run keeps to it."""

from __future__ import annotations

import json

import pytest
import torch

from fastsharp.errors import BasisMemoryError
from fastsharp.krylov import lanczos, plan
from fastsharp.krylov.basis import HalfRows, HostRows, Rows
from fastsharp.krylov.plan import Plan, make_plan
from fastsharp.krylov.request import check_arguments
from fastsharp.operator import DenseOperator
from tests.oracles.matrices import family

N, CPU, CUDA = 1_000_000, torch.device("cpu"), torch.device("cuda")
ROW = 4 * N


def planned(
    memory: int | None, *, k: int = 10, tol: float = 1e-3, device: torch.device = CPU, host: int | None = None, **request: object
) -> Plan:
    asked = check_arguments(N, k=k, which="LA", tol=tol, criterion=str(request.get("criterion", "residual")), max_iter=None, method="auto")
    return make_plan(N, request.get("dtype", torch.float32), device, asked, memory, host)  # type: ignore[arg-type]


def test_without_a_limit_every_row_is_kept() -> None:
    p = planned(None)
    assert (p.storage, p.place, p.rows, p.kept) == ("float32", "device", 301, 0)
    assert p.bytes == (301 + 20) * ROW and p.host_bytes == 0 and p.expected_products == 40


@pytest.mark.parametrize(
    ("rows", "arguments", "want"),
    [
        (301 + 20, {}, ("float32", "device", 301, 0)),
        (71 + 20, {}, ("float32", "device", 71, 35)),
        (50 + 20, {}, ("float16", "device", 94, 47)),
        (50 + 20, {"tol": 1e-4}, ("float32", "device", 50, 25)),
        (50 + 20, {"tol": 1e-4, "criterion": "value"}, ("float16", "device", 94, 47)),
        (30 + 20, {}, ("float32", "device", 30, 15)),
        (18 + 20, {}, ("float32", "device", 18, 13)),
    ],
)
def test_the_first_that_fits_is_taken(rows: int, arguments: dict[str, object], want: tuple[object, ...]) -> None:
    p = planned(rows * ROW, **arguments)  # type: ignore[arg-type]
    assert (p.storage, p.place, p.rows, p.kept) == want
    assert p.bytes <= rows * ROW
    assert not any("more than the budget" in note for note in p.notes())


def test_float64_runs_never_store_float16() -> None:
    assert planned(2 * 50 * ROW, dtype=torch.float64).storage == "float64"


def test_a_gpu_whose_memory_holds_no_restarted_basis_uses_the_host() -> None:
    p = planned((20 + 11) * ROW, device=CUDA, host=200 * ROW)
    assert (p.storage, p.place, p.rows) == ("float32", "host", 200)
    assert p.bytes <= 31 * ROW and p.host_bytes == 200 * ROW
    assert any("host memory" in note for note in p.notes())


def test_a_budget_below_the_least_takes_the_least_and_says_so() -> None:
    p = planned(5 * ROW)
    assert (p.rows, p.kept) == (18, 13)
    assert any("more than the budget of 19.1 MiB" in note for note in p.notes())


def test_less_memory_than_the_least_basis_needs_is_an_error_that_says_what_would_do() -> None:
    with pytest.raises(BasisMemoryError, match=r"(?s)k = 10 pairs of n = 1,000,000 need 145 MiB .*but 19.1 MiB are free.*params="):
        planned(5 * ROW, host=5 * ROW)


def test_small_bases_are_not_rationed() -> None:
    asked = check_arguments(1000, k=3, which="LA", tol=1e-3, criterion="residual", max_iter=None, method="lanczos")
    p = make_plan(1000, torch.float32, CPU, asked, 0)
    assert p.rows == 301 and p.kept == 0


def test_the_plan_is_plain_data_and_its_text_gives_rows_bytes_and_products() -> None:
    p = planned((50 + 20) * ROW)
    assert json.loads(json.dumps(p.record())) == p.record()
    assert str(p) == "basis: 94 rows of float16 on the device, 47 kept when full; 267 MiB on the device; about 40 products expected"


def test_the_planned_basis_is_the_one_that_is_made() -> None:
    kinds = [type(planned(m).basis(100, torch.float32, CPU)) for m in (None, 70 * ROW, 50 * ROW)]
    assert kinds == [Rows, HalfRows, Rows]
    assert type(Plan("float32", "host", 9, 0, 0, 0, 0, 1).basis(100, torch.float32, CPU)) is HostRows


def test_a_run_records_its_plan_and_tells_it_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "UNRATIONED", 0)
    case, heard = family("outliers_rotated", 200, torch.float32), []
    result = lanczos(
        DenseOperator(case.tensor(torch.float32)),
        k=3,
        method="lanczos",
        memory=(20 + 6) * 208 * 4,
        on_plan=lambda p: heard.append(("plan", p.rows)),
        on_step=lambda step, values, expected: heard.append(("step", step)),
    )
    assert heard[:2] == [("plan", 20), ("step", 1)]
    assert result.settings["plan"]["rows"] == 20 and result.settings["plan"]["budget"] == 26 * 208 * 4
