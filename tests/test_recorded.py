"""Products through a log: the bits of an uninterrupted run from every cut of the file, and no run continued from a log of another."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsharp
from fastsharp.errors import DataFormatError, LogError, ResumeMismatchError, StaleOperatorError
from fastsharp.krylov.lanczos import lanczos
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator, SymmetricOperator
from fastsharp.recorded import RecordedOperator
from fastsharp.store import Log
from tests.cases import net
from tests.oracles.matrices import family
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")
N, K = 100, 3
A = family("random", N, torch.float32).tensor(torch.float32)
RUN, MACHINE = {"call": "lanczos", "k": K, "tol": 1e-3}, {"torch": "2.0", "threads": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


def matrix(A: torch.Tensor = A) -> CountingOperator:
    return CountingOperator(CallableOperator(lambda v: A @ v, N, A.dtype))


def solve(
    path: Path | None,
    operator: SymmetricOperator | None = None,
    *,
    run: dict[str, Any] = RUN,
    machine: dict[str, Any] = MACHINE,
    may_change: tuple[str, ...] = (),
    **options: Any,
) -> fastsharp.Eigenpairs:
    """lanczos through a log, as one run; without a log for None."""
    operator = operator or matrix()
    options = {"k": K, "seed": 1, "tol": run["tol"], **options}
    if path is None:
        return lanczos(operator, **options)
    with Log(path) as log:
        logged = RecordedOperator(operator, log, run, machine, may_change)
        result = lanczos(logged, **options)
        logged.finish()
        return result


def same(a: fastsharp.Eigenpairs, b: fastsharp.Eigenpairs) -> bool:
    """Bit for bit."""
    names = ("eigenvalues", "eigenvectors", "residuals", "error_bounds", "converged")
    counts = (a.n_matvec, a.n_verify, a.settings) == (b.n_matvec, b.n_verify, b.settings)
    return counts and all(getattr(a, name).numpy().tobytes() == getattr(b, name).numpy().tobytes() for name in names)


def heads(path: Path) -> list[dict[str, Any]]:
    with Log(path) as log:
        return [head for head, _ in iter(log.read, None)]


def record_ends(path: Path) -> list[int]:
    ends = []
    with Log(path) as log:
        while log.read() is not None:
            ends.append(log.place[0])
    return ends


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"method": "dense"}, {"which": "BE"}, {"v0": torch.ones(N)}, {"verify": False}], ids=lambda o: "-".join(o)
)
def test_a_log_changes_no_bit_and_a_finished_one_costs_one_product(path: Path, options: dict[str, Any]) -> None:
    want = solve(None, **options)
    first = matrix()
    assert same(solve(path, first, **options), want)
    again = matrix()
    result = solve(path, again, **options)
    assert same(result, want) and again.count == 1
    assert f"{first.count} of {first.count} products came from the log {path}" in result.notes[0]
    assert "bit for bit" in result.notes[0]
    kinds = [head["kind"] for head in heads(path)]
    assert kinds[0] == "run" and kinds[-1] == "end" and set(kinds[1:-1]) == {"product"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_50_of_50_cut_logs_are_continued_to_the_same_bits(path: Path, dtype: torch.dtype) -> None:
    """Half of the cuts between records, half inside one; the continued log is that of an uninterrupted run, byte for byte."""
    matrix_ = A.to(dtype)
    want = solve(None, matrix(matrix_))
    solve(path, matrix(matrix_))
    whole, ends = path.read_bytes(), record_ends(path)
    g = random.Random(3)
    for i in range(25):
        cut = g.choice(ends) if i % 2 else g.randrange(len(whole))
        path.write_bytes(whole[:cut])
        operator = matrix(matrix_)
        assert same(solve(path, operator), want)
        assert path.read_bytes() == whole
        there = sum(end <= cut for end in ends[1:])  # records of products before the cut
        assert operator.count <= want.n_matvec + want.n_verify + 4 - max(there - 2, 0) + 1


def test_a_damaged_record_is_computed_again(path: Path) -> None:
    want = solve(path)
    whole, ends = path.read_bytes(), record_ends(path)
    for number in (0, 1, 2, len(ends) // 2, len(ends) - 1):
        damaged = bytearray(whole)
        damaged[ends[number] - 3] ^= 16
        path.write_bytes(damaged)
        result = solve(path)
        assert same(result, want) and path.read_bytes() == whole
        assert any("no whole record" in note for note in result.notes) or number == len(ends) - 1  # the mark of the end: seen after it


def test_an_interrupted_run_goes_on(path: Path) -> None:
    want = solve(None)
    with pytest.raises(KeyboardInterrupt):

        def stop(step: int, *_: Any) -> None:
            if step == 7:
                raise KeyboardInterrupt

        solve(path, on_step=stop)
    operator = matrix()
    assert same(solve(path, operator), want)
    assert operator.count == 1 + want.n_matvec + want.n_verify - 7


def test_other_threads_give_the_same_bits(path: Path) -> None:
    """Rows long enough for torch to use its threads; the log says what differs."""
    n, d = 70_000, torch.linspace(0, 1, 70_000)
    d[::10_000] += torch.arange(7.0)
    operator = CallableOperator(lambda v: d * v, n)
    want = solve(path, operator, machine={"threads": 1})
    torch.set_num_threads(2)
    result = solve(path, operator, machine={"threads": 2})
    assert same(result, want)
    assert "since the log was begun: threads was 1, is 2" in result.notes


def test_blocks_with_strides_and_columns_pass_through_the_log(path: Path) -> None:
    V = torch.randn(3, N + 5)[:, :N]
    out, want = (torch.full((3, N + 2), float("nan")) for _ in range(2))  # alike: strides change the bits of a matrix product
    DenseOperator(A).apply(V, want[:, :N])
    for _ in range(2):
        with Log(path) as log:
            logged = RecordedOperator(DenseOperator(A), log, RUN, MACHINE)
            logged.apply(V, out[:, :N])
            assert torch.equal(out[:, :N], want[:, :N]) and bool(out[:, N:].isnan().all())
            assert torch.equal(logged @ V.T, DenseOperator(A) @ V.T)


def test_what_the_matrix_says_passes_through(path: Path) -> None:
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    with Log(path) as log:
        logged = RecordedOperator(H, log, RUN, MACHINE)
        assert (logged.notes, logged.settings, logged.provenance) == (H.notes, H.settings, H.provenance)
        assert logged.layout is H.layout
        n.model[0].bias.data.add_(1)
        with pytest.raises(StaleOperatorError):
            logged.check_unchanged()


# --- the log of another run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({**RUN, "k": 4}, ("k was 3, is 4",)),
        ({**RUN, "tol": 1e-2, "call": "trace"}, ("call was lanczos, is trace", "tol was 0.001, is 0.01")),
        ({**RUN, "data_hash": "ab"}, ("data_hash was not there, is ab",)),
        ({"call": "lanczos", "tol": 1e-3}, ("k was 3, is not there",)),
    ],
    ids=["value", "two", "more", "fewer"],
)
def test_what_differs_is_named_and_the_log_is_left_alone(path: Path, run: dict[str, Any], words: tuple[str, ...]) -> None:
    solve(path)
    whole = path.read_bytes()[:-5]
    path.write_bytes(whole)
    operator = matrix()
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path, operator, run=run)
    check_message(caught.value, str(path), *words)
    assert operator.count == 0 and path.read_bytes() == whole


def test_a_vector_that_is_not_the_recorded_one_is_refused_with_the_reasons_known(path: Path) -> None:
    solve(path)
    whole = path.read_bytes()
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path, seed=2)  # as if the fingerprint had not seen it
    check_message(caught.value, str(path), "product 1 is not the recorded one", "start vector")
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path, seed=2, machine={"torch": "2.1", "threads": 1})
    check_message(caught.value, "torch was 2.0, is 2.1")
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path, tol=1e-6)  # the same vectors, until the recorded run verified its pairs
    check_message(caught.value, "not the recorded one")
    assert path.read_bytes() == whole


def test_a_run_that_wants_more_than_a_finished_one_is_refused(path: Path) -> None:
    solve(path, verify=False)
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path)
    check_message(caught.value, "ended before product")


@pytest.mark.parametrize("change", [2e-2, float("inf")])
def test_another_matrix_is_refused_by_one_product(path: Path, change: float) -> None:
    solve(path)
    whole = path.read_bytes()
    other = matrix(A + change * torch.eye(N))
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path, other)
    check_message(caught.value, str(path), "computed again", "loss")
    assert other.count == 1 and path.read_bytes() == whole


def test_rounding_of_the_product_is_allowed_and_said(path: Path) -> None:
    """A relative change of 4 eps passes; one of 1e-4 does where another machine explains it, not otherwise."""
    want = solve(path)
    result = solve(path, matrix(A * (1 + 2**-21)))
    assert same(result, want) and re.search(r"agrees to [345](\.\d)?e-07 of its norm", result.notes[0])
    with pytest.raises(ResumeMismatchError):
        solve(path, matrix(A * (1 + 1e-4)))
    assert "agrees to 0.0001" in solve(path, matrix(A * (1 + 1e-4)), machine={"torch": "2.1", "threads": 1}).notes[0]


def test_logs_of_others_are_refused(path: Path) -> None:
    with Log(path) as log:
        log.append({"kind": "something else"})
    with pytest.raises(ResumeMismatchError) as caught:
        solve(path)
    check_message(caught.value, "does not begin with the record of a run")
    path.write_bytes(b"not a log at all, but long enough")
    with pytest.raises(DataFormatError):
        solve(path)
    with Log(path.with_suffix(".used")), pytest.raises(LogError, match="in use"):
        solve(path.with_suffix(".used"))
