"""The model of a warm run: exact where vectors were multiplied, a bound where the rest rose by no more than what is allowed."""

from __future__ import annotations

import pytest
import torch

from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.recycling import Recycled
from fastsharp.operator import CallableOperator, DenseOperator

N, M = 60, 6


def nearby(seed: int, size: float) -> tuple[Recycled, torch.Tensor, torch.Tensor]:
    """A run on A = A0 + a symmetric change of norm `size`; A, and the first vector."""
    g = torch.Generator().manual_seed(seed)
    X = torch.linalg.qr(torch.randn(N, M, generator=g, dtype=torch.float64))[0].T
    values = tuple(torch.linspace(9.0, 2.0, M).tolist())
    A0 = 2.0 * torch.eye(N, dtype=torch.float64) + X.T @ torch.diag(torch.tensor(values, dtype=torch.float64) - 2.0) @ X
    E = torch.randn(N, N, generator=g, dtype=torch.float64)
    E = E + E.T
    A = A0 + size / torch.linalg.matrix_norm(E, 2) * E
    return Recycled(DenseOperator(A), X, values), A, X[0]


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_true_value_lies_between_the_ritz_value_and_the_model_with_the_norm_of_the_change_as_rise(seed: int, size: float) -> None:
    run, A, v = nearby(seed, size)
    exact = torch.linalg.eigvalsh(A).flip(0)
    for _ in range(5):
        run.step(v)
        theta, residuals, S = run.ritz(2)
        j = len(theta)
        assert bool((theta <= exact[:j] + 1e-12).all())
        assert bool((theta + run.above(theta, size) >= exact[:j] - 1e-12).all())
        X = S @ run.V
        assert torch.allclose((A @ X.T - X.T * theta).norm(dim=0), residuals, atol=1e-10)
        following = run.outside(0)
        assert following is not None and float((run.V @ following).abs().max()) < 1e-12
        v = following


def test_one_product_finds_a_turn_among_old_vectors_to_first_order() -> None:
    """(x_1, x_2) coupled by e: after a product of x_1 alone the model's vector is right to O(e^2)."""
    run, _, v = nearby(0, 0.0)
    X, e = run.X, 1e-3
    A = run.operator.apply(torch.eye(N, dtype=torch.float64)) + e * (torch.outer(X[0], X[1]) + torch.outer(X[1], X[0]))
    run = Recycled(DenseOperator(A), X, tuple(run.values.tolist()))
    run.step(v)
    theta, _, _ = run.ritz(1)
    assert float(theta + run.above(theta, 0.0)) == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]), abs=1e-9)
    assert float((run.outside(0) @ X[1]).abs()) == pytest.approx(1.0, abs=1e-6)


def test_bad_products() -> None:
    run, A, v = nearby(0, 0.1)
    bad = Recycled(CallableOperator(lambda x: x * float("nan"), N, torch.float64), run.X, tuple(run.values.tolist()))
    with pytest.raises(NonFiniteError):
        bad.step(v)
    skew = A + torch.triu(torch.ones(N, N, dtype=torch.float64))
    bad = Recycled(CallableOperator(lambda x: skew @ x, N, torch.float64), run.X, run.X.new_ones(M).tolist())
    bad.step(v)
    with pytest.raises(NotSymmetricError):
        for _ in range(3):
            bad.step(bad.outside(0))
