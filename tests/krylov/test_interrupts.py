"""A run that ends early keeps what it has: Ctrl-C anywhere, and any exception, leaves valid pairs in `.partial`."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from fastsharp import ops
from fastsharp.errors import InputError, Interrupted, NotSymmetricError, StaleOperatorError
from fastsharp.krylov import lanczos, tridiagonal
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import CallableOperator
from fastsharp.results import Eigenpairs
from tests.krylov.checks import assert_sound
from tests.oracles.matrices import Case, family

N, K, TOL = 40, 3, 1e-6
CASE = family("outliers_rotated", N, torch.float64)
RANK3 = family("rank3_rotated", N, torch.float64)  # breaks down after four steps, so that restarts are met too


class RaisingAt:
    """v -> A v, raising `error` at product `at` (from 1)."""

    def __init__(self, case: Case, at: int, error: BaseException) -> None:
        self.A, self.at, self.error, self.calls = case.tensor(torch.float64), at, error, 0

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.A @ v


def run(case: Case, at: int = -1, error: BaseException | None = None, **arguments: Any) -> Eigenpairs:
    product = RaisingAt(case, at, error or KeyboardInterrupt())
    return lanczos(CallableOperator(product, N, torch.float64), **{"k": K, "tol": TOL, "method": "lanczos", "check": "off", **arguments})


def assert_partial(partial: Eigenpairs | None, case: Case, steps: int) -> None:
    """min(k, steps) pairs of the run so far, unverified and true; None before the first step."""
    if steps == 0:
        assert partial is None
        return
    assert partial is not None
    assert len(partial) == min(K, steps)
    assert not partial.verified and partial.n_verify == 0
    assert any("not verified" in note for note in partial.notes) and any("may be missing" in note for note in partial.notes)
    assert_sound(partial, case, torch.float64, TOL)


@pytest.mark.parametrize("case", [CASE, RANK3], ids=["outliers", "rank3"])
def test_ctrl_c_in_any_product_keeps_the_pairs_so_far(case: Case) -> None:
    """Every product of the run, those of the verification included."""
    whole = run(case)
    for at in range(1, whole.n_matvec + whole.n_verify + 1):
        with pytest.raises(Interrupted, match="FS401") as caught:
            run(case, at)
        assert isinstance(caught.value, KeyboardInterrupt) and not isinstance(caught.value, Exception)
        assert_partial(caught.value.partial, case, min(at - 1, whole.n_matvec))
        if at > whole.n_matvec:
            assert caught.value.partial is not None
            assert torch.allclose(caught.value.partial.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("arguments", "products"), [({"check": "on"}, 4), ({"method": "dense"}, N)])
def test_ctrl_c_before_the_first_step_has_no_pairs(arguments: dict[str, str], products: int) -> None:
    for at in (1, products):
        with pytest.raises(Interrupted) as caught:
            run(CASE, at, **arguments)
        assert caught.value.partial is None
        with pytest.raises(ZeroDivisionError) as error:
            run(CASE, at, ZeroDivisionError(), **arguments)
        assert error.value.partial is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["alpha", "dots", "update"])
def test_ctrl_c_inside_a_kernel_keeps_the_pairs_so_far(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector that is being orthogonalised is half written then."""
    kernel, calls, at = getattr(ops, name), 0, 0

    def interrupted(*arguments: Any, out: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        kernel(*arguments, out=out)
        if calls == at:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(ops, name, interrupted)
    whole = run(CASE)
    assert whole.settings["second_passes"] == 0  # so that call `at` belongs to step `at`
    for at in range(1, whole.n_matvec + 1):
        calls = 0
        with pytest.raises(Interrupted) as caught:
            run(CASE)
        assert_partial(caught.value.partial, CASE, at - 1)


def test_ctrl_c_at_any_line_of_the_recurrence_leaves_a_whole_partial_result() -> None:
    """A KeyboardInterrupt from a trace function at each line that `tridiagonal` executes, restarts included."""
    methods = {f.__code__ for f in (Tridiagonal.step, Tridiagonal._pass, Tridiagonal._restart, Tridiagonal._rescale)}
    lines = _count_lines(methods)
    assert lines > 100
    seen = set()
    for at in range(1, lines + 1):
        with pytest.raises(Interrupted) as caught, _Trace(methods, at):
            run(RANK3)
        partial = caught.value.partial
        steps = 0 if partial is None else len(partial)
        assert_partial(partial, RANK3, steps)
        if partial is not None:
            assert steps in (min(K, partial.n_matvec), min(K, partial.n_matvec - 1))
        seen.add(steps)
    assert seen == {0, 1, 2, 3}


def test_ctrl_c_between_the_two_appends_of_a_step_drops_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta is there and alpha is not."""

    class Appending(list[float]):
        def append(self, x: float) -> None:
            if len(self) == 5:
                raise KeyboardInterrupt
            super().append(x)

    class Block(tridiagonal.Block):
        def __init__(self, start: int) -> None:
            super().__init__(start, alpha=Appending())

    monkeypatch.setattr(tridiagonal, "Block", Block)
    with pytest.raises(Interrupted) as caught:
        run(CASE)
    assert_partial(caught.value.partial, CASE, 5)


def test_a_second_ctrl_c_passes_through_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(*_: Any, **__: Any) -> Eigenpairs:
        raise KeyboardInterrupt("second")

    monkeypatch.setattr(sys.modules["fastsharp.krylov.lanczos"], "pairs", pairs)  # the package exports the function of that name
    with pytest.raises(KeyboardInterrupt, match="second") as caught:
        run(CASE, 4)
    assert not isinstance(caught.value, Interrupted)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_what_on_step_raises_ends_the_run_and_carries_the_pairs(error: BaseException) -> None:
    def on_step(step: int, values: tuple[float, ...], expected: float) -> None:
        if step == 6:
            raise error

    with pytest.raises((ZeroDivisionError, Interrupted)) as caught:
        run(CASE, on_step=on_step)
    assert_partial(caught.value.partial, CASE, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("at", [1, 2, 5])
def test_any_exception_of_the_operator_is_the_same_object_with_partial(at: int) -> None:
    error = MemoryError("CUDA out of memory")
    with pytest.raises(MemoryError) as caught:
        run(CASE, at, error)
    assert caught.value is error
    assert_partial(error.partial, CASE, at - 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [NotSymmetricError("moved"), StaleOperatorError("moved")])
def test_pairs_of_a_matrix_that_is_not_one_are_not_handed_out(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run(CASE, 5, error)
    assert not hasattr(caught.value, "partial")


def test_an_exception_that_takes_no_attributes_is_raised_as_it_is() -> None:
    class Slotted(Exception):
        @property
        def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
            raise InputError("no attributes here")

    with pytest.raises(Slotted):
        run(CASE, 3, Slotted())


class _Trace:
    """Raises KeyboardInterrupt at the `at`-th line executed in the given code objects (never for at = 0)."""

    def __init__(self, codes: set[CodeType], at: int) -> None:
        self.codes, self.at, self.lines, self.before = codes, at, 0, sys.gettrace()

    def __enter__(self) -> _Trace:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code in self.codes else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._line


def _count_lines(codes: set[CodeType]) -> int:
    with _Trace(codes, 0) as trace:
        run(RANK3)
    return trace.lines
