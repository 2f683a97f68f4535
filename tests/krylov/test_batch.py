"""Lockstep Lanczos is p separate runs: same tridiagonal matrices, own breakdowns, one block product a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.batch import Batch
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator
from tests.krylov.checks import eps_of
from tests.oracles.matrices import family

F64 = torch.float64
CASE = family("outliers_rotated", 90, F64)


def starts(p: int, n: int, dtype: torch.dtype = F64, seed: int = 0) -> torch.Tensor:
    return torch.randn(p, n, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def by_rows(A: torch.Tensor) -> CallableOperator:
    """Products one vector at a time: the same bits however many vectors go together."""
    return CallableOperator(lambda v: A @ v, A.shape[0], A.dtype)


def run(batch: Batch) -> Batch:
    while batch.live and batch.size < batch.steps:
        batch.step()
    return batch


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_each_probe_is_bitwise_a_run_of_its_own(dtype: torch.dtype) -> None:
    Z, A = starts(3, 90, dtype), CASE.tensor(dtype)
    together = run(Batch(by_rows(A), Z, 45))
    for z, block in zip(Z, together.blocks, strict=True):
        alone = run(Batch(by_rows(A), z[None], 45)).blocks[0]
        assert (block.alpha, block.beta) == (alone.alpha, alone.beta)


def test_a_probe_has_the_tridiagonal_matrix_of_the_eigensolver() -> None:
    """Up to rounding, in the steps before errors grow: m eps ||A|| for a few."""
    Z = starts(2, 90)
    batch = run(Batch(by_rows(CASE.tensor(F64)), Z, 8))
    for z, block in zip(Z, batch.blocks, strict=True):
        single = Tridiagonal(by_rows(CASE.tensor(F64)), z, z.clone, 8)
        for _ in range(8):
            single.step()
        tolerance = 100 * 90 * eps_of(F64) * CASE.norm
        assert np.allclose(block.alpha, single.blocks[0].alpha, rtol=0, atol=tolerance)
        assert np.allclose(block.beta, single.blocks[0].beta, rtol=0, atol=tolerance)


def test_products_come_in_blocks_of_the_live_probes() -> None:
    sizes: list[int] = []

    class Sized(DenseOperator.__base__):  # type: ignore[misc, name-defined]
        def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
            sizes.append(V.shape[0])
            torch.matmul(V, A, out=out)

    A = torch.diag(torch.cat([torch.tensor([3.0, 2.0, -1.0], dtype=F64), torch.zeros(37, dtype=F64)]))
    Z = starts(3, 40)
    Z[1, 1:] = 0.0  # an eigenvector: finished after one step
    Z[2, 2:] = 0.0  # two of them
    batch = run(Batch(Sized(40, F64, torch.device("cpu")), Z, 20))
    assert sizes == [3, 2, 1, 1] and batch.n_matvec == 7 and batch.live == 0
    assert [len(block.alpha) for block in batch.blocks] == [4, 1, 2]
    values = [block.solve()[0] for block in batch.blocks]
    for got, want in zip(values, ([-1.0, 0.0, 2.0, 3.0], [3.0], [2.0, 3.0]), strict=True):
        assert np.allclose(got, want, atol=1e-12)


def test_the_others_go_on_bitwise_when_a_probe_finishes() -> None:
    A = CASE.tensor(F64)
    Z = starts(4, 90)
    Z[0] = Z[2] = torch.linalg.eigh(A)[1][:, -1]
    batch = run(Batch(by_rows(A), Z, 70))  # beyond the first storage of 32 rows
    assert [len(b.alpha) for b in batch.blocks] == [1, 70, 1, 70]
    for i in (1, 3):
        alone = run(Batch(by_rows(A), Z[i : i + 1], 70)).blocks[0]
        assert (batch.blocks[i].alpha, batch.blocks[i].beta) == (alone.alpha, alone.beta)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_bases_stay_orthonormal(dtype: torch.dtype) -> None:
    batch = run(Batch(DenseOperator(CASE.tensor(dtype)), starts(2, 90, dtype), 90))
    for V in batch._V[:, :, :90].double():
        assert float((V @ V.T - torch.eye(len(V), dtype=F64)).abs().max()) <= 10 * 90 * eps_of(dtype)


@pytest.mark.parametrize("p", [-90, -20, 7, 90])
def test_powers_of_two_change_no_bit(p: int) -> None:
    A, Z = CASE.tensor(torch.float32), starts(2, 90, torch.float32)
    plain, scaled = (run(Batch(DenseOperator(M), Z, 30)) for M in (A, A * 2.0**p))
    for a, b in zip(plain.blocks, scaled.blocks, strict=True):
        e = (scaled.shift or 0) - (plain.shift or 0) - p
        assert [x * 2.0**-e for x in a.alpha] == b.alpha and [x * 2.0**-e for x in a.beta] == b.beta


def test_nan_names_the_product() -> None:
    A = CASE.tensor(F64)
    counted = CountingOperator(CallableOperator(lambda v: A @ v * (float("nan") if counted.count > 6 else 1.0), 90, F64))
    with pytest.raises(NonFiniteError, match="number 8"):
        run(Batch(counted, starts(2, 90), 20))
    with pytest.raises(NonFiniteError, match="largest entry"):
        run(Batch(CallableOperator(lambda v: v * float("inf"), 90, F64), starts(2, 90), 20))


def test_a_matrix_that_is_not_symmetric_is_seen() -> None:
    A = CASE.tensor(F64) + 0.1 * torch.triu(torch.ones(90, 90, dtype=F64), 1)
    with pytest.raises(NotSymmetricError, match="where a symmetric A gives rounding"):
        run(Batch(by_rows(A), starts(2, 90), 20))
