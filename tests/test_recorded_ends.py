"""Where a recorded run ends: runs that go on further or less far, a log that cannot grow, products that fail."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsharp.errors import LogStoppedWarning, NonFiniteError
from fastsharp.operator import CallableOperator
from fastsharp.store import Log
from tests.oracles.matrices import family
from tests.test_recorded import RUN, A, N, heads, matrix, same, solve

pytestmark = pytest.mark.usefixtures("one_thread")
EASY = family("outliers_rotated", N, torch.float32).tensor(torch.float32)  # ten steps


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


# --- how long a run goes on --------------------------------------------------------------------------------------------


def longer(tol: float) -> dict[str, Any]:
    return {"run": {**RUN, "tol": tol}, "may_change": ("tol",)}


def test_a_run_goes_on_where_the_recorded_one_ended(path: Path) -> None:
    """A smaller tol: the recorded products, then new ones; the pairs are those of a run without a log. Once more: all from the log."""
    first = solve(path, **longer(1e-1))
    want = solve(None, tol=1e-6)
    operator = matrix()
    result = solve(path, operator, **longer(1e-6))
    assert same(result, want) and want.n_matvec > first.n_matvec
    assert operator.count == 1 + want.n_matvec - first.n_matvec + want.n_verify
    assert "since the log was begun: tol was 0.1, is 1e-06" in result.notes
    operator = matrix()
    assert same(solve(path, operator, **longer(1e-6)), want) and operator.count == 1


def test_a_run_that_ends_earlier_does_not_cost_the_log_its_products(path: Path) -> None:
    solve(path, **longer(1e-6))
    whole = path.read_bytes()
    want = solve(None, tol=1e-1)
    operator = matrix()
    result = solve(path, operator, **longer(1e-1))
    assert same(result, want) and path.read_bytes() == whole
    assert operator.count == 1 + want.n_verify and any("did not ask for" in note for note in result.notes)


# --- a log that cannot grow ---------------------------------------------------------------------------------------------


def test_a_full_disk_at_any_record_costs_the_log_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write number i puts down nothing, or 9 bytes, and fails, as all later ones do; the log is whole up to there and is continued."""
    want = solve(None, matrix(EASY))
    solve(tmp_path / "whole.log", matrix(EASY))
    total = len(heads(tmp_path / "whole.log"))
    real = os.pwritev
    for at in range(1, total):
        path, count = tmp_path / f"{at}.log", 0
        with Log(path):
            pass  # the head of the file; without it there is no log at all, and an error before the first product

        def full(fd: int, parts: Any, offset: int, at: int = at) -> int:
            nonlocal count
            count += 1
            if count < at:
                return real(fd, parts, offset)
            if at % 2:
                real(fd, [b"".join(bytes(p) for p in parts)[:9]], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as m:
            m.setattr(os, "pwritev", full)
            with pytest.warns(LogStoppedWarning, match="No space left") as seen:
                result = solve(path, matrix(EASY))
        assert same(result, want) and len(seen) == 1 and count == at
        if at < total - 1:
            assert any(f"stopped growing after {at - 1} records" in note for note in result.notes)
        assert len(heads(path)) == at - 1
        assert same(solve(path, matrix(EASY)), want) and len(heads(path)) == total


def test_a_product_that_is_not_finite_is_not_logged(path: Path) -> None:
    """Bad memory, say: the next run starts from the last good product."""
    want = solve(None)
    calls = 0

    def once(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return A @ v * (float("nan") if calls == 9 else 1.0)

    with pytest.raises(NonFiniteError):
        solve(path, CallableOperator(once, N))
    operator = matrix()
    assert same(solve(path, operator), want) and operator.count == 1 + want.n_matvec + want.n_verify - 4


def test_what_the_operator_raises_ends_the_run_and_leaves_the_log(path: Path) -> None:
    want = solve(None)

    def failing(at: int) -> Callable[[torch.Tensor], torch.Tensor]:
        calls = 0

        def f(v: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == at:
                raise MemoryError("out of memory")
            return A @ v

        return f

    for _ in range(3):  # each gets 5 products further
        with pytest.raises(MemoryError):
            solve(path, CallableOperator(failing(9), N))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(solve(path), want)
