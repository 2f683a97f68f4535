"""Warm runs on matrices with known spectra: few products, bounds that hold, newcomers seen at the check."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from fastsharp import rng
from fastsharp.errors import Interrupted, NonFiniteError, NotConvergedWarning, ShapeError
from fastsharp.krylov.request import Request, check_arguments
from fastsharp.krylov.tracking import Carried, follow
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator
from tests.oracles.matrices import DctSpectrum, family, orthogonal, outlier_spectrum, power_law_spectrum

N = 4096
SPECTRA = {"outliers": outlier_spectrum(N), "power law": power_law_spectrum(N)}


def request(n: int, k: int = 1, tol: float = 1e-2, criterion: str = "value", max_iter: int | None = None) -> Request:
    return check_arguments(n, k=k, which="LA", tol=tol, criterion=criterion, max_iter=max_iter, method="lanczos")


def turned(D: DctSpectrum, angle: float, g: torch.Generator) -> Carried:
    """The four top pairs, the first turned towards a random direction orthogonal to all of them."""
    X = torch.stack([D.eigenvector(i) for i in range(4)])
    z = rng.normal(D.n, g, X.dtype)
    z -= (X @ z) @ X
    X[0] = math.cos(angle) * X[0] + math.sin(angle) * z / z.norm()
    return Carried(X, tuple(D.eigenvalues[:4].tolist()), 0)


@pytest.mark.parametrize("name", SPECTRA)
def test_products_after_a_turn_of_the_top_vector(name: str) -> None:
    """At most 2 up to 0.1 rad for all of 100 seeds, fewer than a cold start up to 0.6 rad; no value off by more than its bound."""
    D = DctSpectrum(SPECTRA[name], torch.float32)
    cold = [follow(D.operator, request(N), None, rng.generator(s)).pairs.n_matvec for s in range(20)]
    for angle, seeds, most in ((0.02, 20, 2), (0.1, 100, 2), (0.3, 20, min(cold) - 1), (0.6, 40, min(cold) - 1)):
        for seed in range(seeds):
            g = rng.generator(1000 + seed)
            counted = CountingOperator(D.operator)
            step = follow(counted, request(N), turned(D, angle, g), g)
            assert counted.count == step.pairs.n_matvec <= most, (angle, seed)
            assert step.start == "warm"
            assert abs(float(step.pairs.eigenvalues[0]) - D.eigenvalues[0]) <= float(step.pairs.error_bounds[0])
    assert statistics.median(cold) >= 8


def test_residuals_are_those_of_the_stated_pairs() -> None:
    case = family("outliers_rotated", 120, torch.float64)
    A = DenseOperator(case.tensor(torch.float64))
    step = follow(A, request(120, k=3, tol=1e-6, criterion="residual"), None, rng.generator(0))
    for _ in range(2):
        X = step.pairs.eigenvectors
        true = (A.apply(X) - step.pairs.eigenvalues[:, None] * X).norm(dim=1)
        assert torch.allclose(true, step.pairs.residuals, rtol=1e-6, atol=1e-10)
        assert step.pairs.verified and step.pairs.n_verify == 0 and bool(step.pairs.converged.all())
        assert np.allclose(step.pairs.eigenvalues, np.sort(case.exact)[::-1][:3], rtol=1e-6)
        step = follow(A, request(120, k=3, tol=1e-6, criterion="residual"), step.carried, rng.generator(1))


def test_a_rotation_among_the_tracked_pairs_and_their_neighbours() -> None:
    """A slow random similarity: the value stays within its bound at every call."""
    n = 300
    spectrum = np.r_[10.0, 8.0, 5.0, 4.0, np.linspace(1, -0.5, n - 4)]
    g = np.random.default_rng(0)
    Q, carried, generator = orthogonal(n), None, rng.generator(0)
    for _ in range(30):
        skew = g.standard_normal((n, n)) * 0.05 / math.sqrt(n)
        Q, _ = np.linalg.qr(Q + (skew - skew.T) @ Q)
        A = torch.tensor((Q * spectrum) @ Q.T)
        step = follow(DenseOperator((A + A.T) / 2), request(n), carried, generator)
        carried = step.carried
        assert abs(float(step.pairs.eigenvalues[0]) - 10.0) <= float(step.pairs.error_bounds[0])


def test_a_newcomer_orthogonal_to_all_tracked_vectors_is_seen_at_the_check() -> None:
    """Eigenvalue 2 of the basis vector e_60 becomes 20, above the tracked 10, right after the first call."""
    n, every = 200, 10
    d = torch.cat([torch.tensor([10.0, 7.0, 5.0, 4.0]), torch.linspace(1.0, 0.0, n - 4)]).double()
    for seed in range(20):
        generator = rng.generator(seed)
        carried = follow(DenseOperator(torch.diag(d)), request(n), None, generator).carried
        e = d.clone()
        e[60] = 20.0
        A = DenseOperator(torch.diag(e))
        found = []
        for _ in range(every):
            step = follow(A, request(n), carried, generator, newcomers_every=every)
            carried = step.carried
            found.append(float(step.pairs.eigenvalues[0]))
        assert step.start == "check" and found[-1] == pytest.approx(20.0, rel=1e-3)


def test_a_failed_warm_test_goes_on_to_the_cold_rule() -> None:
    """Carried pairs of another matrix altogether."""
    n = 150
    A, B = (DenseOperator(torch.tensor((orthogonal(n, s) * np.linspace(-1, 5, n)) @ orthogonal(n, s).T)) for s in (1, 2))
    carried = follow(A, request(n), None, rng.generator(0)).carried
    step = follow(B, request(n), carried, rng.generator(1))
    assert float(step.pairs.eigenvalues[0]) == pytest.approx(5.0, rel=1e-2)


@pytest.mark.parametrize("A", [torch.zeros(70, 70), torch.eye(70), -torch.eye(70), 1e30 * torch.eye(70), torch.ones(1, 1), torch.eye(2)])
def test_degenerate_matrices(A: torch.Tensor) -> None:
    generator, carried = rng.generator(0), None
    for _ in range(3):
        step = follow(DenseOperator(A), request(len(A)), carried, generator)
        carried = step.carried
        assert float(step.pairs.eigenvalues[0]) == pytest.approx(float(A[0, 0]), rel=1e-5)


def test_bad_operators_and_interrupts() -> None:
    case = family("outliers_rotated", 120, torch.float64)
    A = case.tensor(torch.float64)
    carried = follow(DenseOperator(A), request(120), None, rng.generator(0)).carried
    with pytest.raises(ShapeError, match="n = 60"):
        follow(DenseOperator(torch.eye(60, dtype=torch.float64)), request(60), carried, rng.generator(0))
    with pytest.raises(NonFiniteError):
        follow(CallableOperator(lambda v: v * math.nan, 120, torch.float64), request(120), carried, rng.generator(0))
    calls = []

    def product(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return A @ v

    with pytest.raises(Interrupted) as caught:
        follow(CallableOperator(product, 120, torch.float64), request(120, tol=1e-9), None, rng.generator(0))
    assert caught.value.partial is not None and caught.value.partial.n_matvec == 2
    with pytest.warns(NotConvergedWarning):
        follow(DenseOperator(A), request(120, tol=1e-9, max_iter=3), None, rng.generator(0))


def moved(spectrum: list[float], angle: float, seed: int, n: int = 200) -> torch.Tensor:
    """A matrix with these top values over a bulk in [-0.5, 1], its vectors turned by about `angle` from those of angle 0."""
    g = torch.Generator().manual_seed(seed)
    skew = torch.randn(n, n, generator=g, dtype=torch.float64)
    turn = torch.linalg.matrix_exp(angle * (skew - skew.T) / math.sqrt(2 * n))
    Q = torch.tensor(orthogonal(n)) @ turn
    values = torch.cat([torch.tensor(spectrum, dtype=torch.float64), torch.linspace(1.0, -0.5, n - len(spectrum), dtype=torch.float64)])
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


FOUR = [10.0, 8.0, 5.0, 4.0]
PATHS = {  # the top values call by call
    "crossing": [[10.0 - 0.5 * t, 6.0 + 0.5 * t, 5.0, 4.0] for t in range(9)],
    "jump up": [FOUR] * 3 + [[30.0, 8.0, 5.0, 4.0]] * 3,
    "jump down": [FOUR] * 3 + [[1.5, 8.0, 5.0, 4.0]] * 3,
    "negative end dominates": [[10.0 - 0.3 * t, 8.0, -30.0, -25.0] for t in range(6)],
    "double top": [[10.0, 10.0, 5.0, 4.0]] * 6,
    "all negative": [[-5.0, -6.0, -7.0, -8.0]] * 6,
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", PATHS)
def test_values_stay_within_their_bounds_along_paths(name: str, k: int) -> None:
    """The one-sided error never exceeds the bound for five seeds; with k = 2 copies of a double value count as found only by chance."""
    for seed in range(5):
        generator, carried = rng.generator(seed), None
        for t, spectrum in enumerate(PATHS[name]):
            A = moved(spectrum, 0.05 * t, 7) if name != "all negative" else moved(spectrum, 0.05 * t, 7) - 2.0 * torch.eye(200)
            step = follow(DenseOperator(A), request(200, k=k), carried, generator)
            carried = step.carried
            exact = torch.linalg.eigvalsh(A).flip(0)[: 1 if name == "double top" else k]
            error = exact - step.pairs.eigenvalues[: len(exact)]
            assert bool((error.abs() <= step.pairs.error_bounds[: len(exact)] + 1e-9).all()), (seed, t, step.start)


def test_a_sudden_jump_of_a_lower_pair_is_seen_at_the_check() -> None:
    """5 becomes 14 between two calls while the top pair stays: the products of a warm call may not show it, a check does."""
    for seed in range(10):
        generator, carried = rng.generator(seed), None
        for t, third in enumerate([5.0, 5.0, 14.0, 14.0, 14.0]):
            A = moved([10.0, 8.0, third, 4.0], 0.05 * t, 7)
            step = follow(DenseOperator(A), request(200), carried, generator, newcomers_every=4)
            carried = step.carried
        assert step.start == "check" and float(step.pairs.eigenvalues[0]) == pytest.approx(14.0, rel=1e-2)
