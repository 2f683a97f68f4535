"""`resume=` of density, trace, frobenius, logdet, trace_function and spectrum: a log cut anywhere gives the bits of an uninterrupted run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsharp
from fastsharp.errors import NotSymmetricError, ResumeMismatchError
from fastsharp.operator import CallableOperator

pytestmark = pytest.mark.usefixtures("one_thread")
N = 90


class Killed(Exception):
    """Ends a run from inside a product."""


def operator(last: int | None = None) -> CallableOperator:
    """A full matrix with five outliers; product number `last` raises."""
    g = torch.Generator().manual_seed(3)
    d, u = torch.rand(N, generator=g, dtype=torch.float64), torch.randn(N, generator=g, dtype=torch.float64) / N**0.5
    d[:5] = torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])
    count = 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == last:
            raise Killed
        return d * v + (u @ v) * u

    return CallableOperator(product, N, torch.float64)


def soft(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + x.abs())


CALLS: dict[str, Callable[..., Any]] = {
    "density": lambda A, **k: fastsharp.density(A, probes=3, steps=12, **k),
    "trace": lambda A, **k: fastsharp.trace(A, rtol=0.005, **k),
    "frobenius": lambda A, **k: fastsharp.frobenius(A, rtol=0.1, **k),
    "logdet": lambda A, **k: fastsharp.logdet(A, shift=1.0, rtol=0.1, **k),
    "trace_function": lambda A, **k: fastsharp.trace_function(A, f=soft, rtol=0.1, **k),
    "spectrum": lambda A, **k: fastsharp.spectrum(A, k=2, steps=20, rtol=0.1, **k),
}


def bits(result: Any) -> tuple[Any, ...]:
    """Every number of a result."""
    if isinstance(result, fastsharp.Density):
        tensors = (result.nodes, result.weights, result.widths, result.edges, result.lower, result.upper)
        return (*(t.numpy().tobytes() for t in tensors), result.w1_bound, result.n_matvec)
    if isinstance(result, fastsharp.Estimate):
        return (result.value, result.stderr, result.interval, result.samples, result.n_matvec)
    pairs = result.eigenpairs
    tensors = (pairs.eigenvalues, pairs.eigenvectors, pairs.residuals, pairs.error_bounds)
    return (*(t.numpy().tobytes() for t in tensors), bits(result.density), bits(result.trace), bits(result.frobenius))


@pytest.mark.parametrize("name", CALLS)
def test_a_run_that_was_ended_and_whose_log_was_cut_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    call, path = CALLS[name], tmp_path / "run.log"
    want = bits(call(operator()))
    for last in (9, 17, 30):
        with pytest.raises(Killed):
            call(operator(last), resume=path)
        assert path.stat().st_size > 500
        resumed = call(operator(), resume=path)
        assert bits(resumed) == want
        whole = path.read_bytes()
        for cut in range(len(whole) // 7, len(whole), len(whole) // 4):
            path.write_bytes(whole[:cut])
            assert bits(call(operator(), resume=path)) == want
            assert path.read_bytes() == whole
        path.unlink()


def test_a_log_belongs_to_one_call_and_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    fastsharp.density(operator(), steps=6, resume=path)
    with pytest.raises(ResumeMismatchError, match="seed was 0, is 1"):
        fastsharp.density(operator(), steps=6, seed=1, resume=path)
    with pytest.raises(ResumeMismatchError, match="call was density, is trace"):
        fastsharp.trace(operator(), resume=path)
    longer = fastsharp.density(operator(), steps=9, resume=path)
    assert bits(longer) == bits(fastsharp.density(operator(), steps=9))


def test_pairs_are_told_apart_by_their_vectors(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    a, b = (fastsharp.lanczos(operator(), k=2, seed=seed) for seed in (0, 1))
    fastsharp.trace(operator(), rtol=0.1, pairs=a, resume=path)
    with pytest.raises(ResumeMismatchError, match="pairs was tensor"):
        fastsharp.trace(operator(), rtol=0.1, pairs=b, resume=path)


@pytest.mark.parametrize("name", CALLS)
def test_messages_of_the_symmetry_probe_begin_with_the_call(name: str) -> None:
    A = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotSymmetricError, match=f"^{name}: "):
        CALLS[name](CallableOperator(lambda v: A @ v, N, torch.float64))
