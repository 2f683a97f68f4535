"""Conjugate gradients for several right-hand sides against a dense solve in float64."""

from __future__ import annotations

import pytest
import torch

from fastsharp.errors import InputError, NotSymmetricError
from fastsharp.krylov.solve import solve
from fastsharp.operator import CountingOperator, DenseOperator


def matrix(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)).double()).Q
    A = Q * values.double() @ Q.T
    return ((A + A.T) / 2).to(dtype)


SPECTRA = {
    "even": torch.linspace(0, 1, 60),
    "outliers over a null space": torch.cat([torch.zeros(50), torch.tensor([1.0, 3.0, 40.0])]),
    "power law": torch.arange(1, 81).double() ** -1.5,
    "zero": torch.zeros(7),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_solutions_meet_their_tolerance(name: str, dtype: torch.dtype) -> None:
    A = matrix(SPECTRA[name], dtype)
    c = 1e-3 * max(float(SPECTRA[name].max()), 1.0)
    B = torch.randn(5, len(A), generator=torch.Generator().manual_seed(1)).to(dtype)
    B[3] = 0
    counted = CountingOperator(DenseOperator(A))
    rtol = 1e-8 if dtype == torch.float64 else 1e-4
    found = solve(counted, B, c, rtol=rtol)
    exact = torch.linalg.solve(A.double() + c * torch.eye(len(A)).double(), B.double().T).T
    true = ((B.double() - found.X.double() @ (A.double() + c * torch.eye(len(A)).double())).norm(dim=1)) / B.double().norm(dim=1).clamp_min(
        1e-300
    )
    room = 16 * len(A) * torch.finfo(dtype).eps * (float(A.norm()) + c) / c  # of a residual of a solution of this size
    assert (true <= rtol + room).all()
    assert (found.residuals <= rtol + room).all()
    assert not found.X[3].any() and found.residuals[3] == 0
    assert (found.X.double() - exact).norm() <= (rtol + room) * B.double().norm() / c
    assert found.n_matvec == counted.count


def test_rows_that_are_done_cost_nothing_more() -> None:
    A = matrix(SPECTRA["power law"], torch.float64)
    values, vectors = torch.linalg.eigh(A)
    counted = CountingOperator(DenseOperator(A))
    easy = vectors[:, -1][None]  # an eigenvector: one step
    hard = torch.randn(1, len(A), generator=torch.Generator().manual_seed(2)).double()
    together = solve(counted, torch.cat([easy.expand(7, -1), hard]), 1e-3, rtol=1e-6)
    alone = solve(counted, hard, 1e-3, rtol=1e-6)
    assert together.n_matvec <= alone.n_matvec + 7 * 3
    assert float(values[-1]) > 0


def test_a_row_short_of_steps_says_so() -> None:
    found = solve(DenseOperator(matrix(SPECTRA["power law"], torch.float64)), torch.ones(1, 80).double(), 1e-6, rtol=1e-10, max_iter=5)
    assert float(found.residuals[0]) > 1e-10


def test_bad_input() -> None:
    A = DenseOperator(matrix(torch.linspace(-1, 1, 20), torch.float64))
    B = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(NotSymmetricError, match="not positive semidefinite"):
        solve(A, B, 1e-3)
    for shift in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="shift"):
            solve(A, B, shift)
