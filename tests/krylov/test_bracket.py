"""The interval for lambda_max from parts of the samples: covers as often as it says, narrows, and is exact on the whole."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, NotConvergedWarning
from fastsharp.krylov.bracket import bracket
from fastsharp.operator import CallableOperator, DenseOperator, SymmetricOperator
from fastsharp.quantiles import student as quantile
from tests.unchanged import refuses

N, D = 20_000, 40


@functools.cache
def rows() -> torch.Tensor:
    """sqrt(p (1 - p)) x of a logistic regression on heavy-tailed x, so that H = X'X / N; scale of a sample 1 + |t|, t Student of 5 degrees."""
    g = np.random.default_rng(0)
    X = g.standard_normal((N, D)) * np.arange(1, D + 1) ** -0.5 * (1 + np.abs(g.standard_t(5, (N, 1))))
    p = 1 / (1 + np.exp(-X @ g.standard_normal(D) / D**0.5))
    return torch.from_numpy(X * np.sqrt(p * (1 - p))[:, None])


def mean_of(indices: torch.Tensor) -> DenseOperator:
    Z = rows()[indices]
    return DenseOperator(Z.T @ Z / len(indices))


def truth() -> float:
    return float(np.linalg.eigvalsh((rows().T @ rows()).numpy() / N)[-1])


def test_covers_as_often_as_it_says_and_costs_less_than_the_whole():
    """120 draws at confidence 0.9, each stopped at its first narrow interval, for which the margins are not corrected."""
    runs = [bracket(mean_of, N, rtol=0.15, seed=seed) for seed in range(120)]
    assert sum(run.lower <= truth() <= run.upper for run in runs) >= 0.9 * len(runs)
    assert all(run.converged and (run.upper - run.lower) / 2 <= 0.15 * run.value for run in runs)
    assert all(lower <= upper for run in runs for _, lower, upper in run.history)
    widths = [[upper - lower for _, lower, upper in run.history] for run in runs]
    assert np.mean([w[0] for w in widths]) > 2 * np.mean([w[-1] for w in widths])
    assert np.mean([run.samples for run in runs]) <= N / 8
    whole = bracket(mean_of, N, start=N, seed=0)
    assert np.mean([run.n_products for run in runs]) <= 0.6 * whole.n_products


def test_the_upper_side_needs_no_margin_in_expectation():
    """Jensen: the mean of lambda_max over parts is above that of the whole, here beyond three standard errors of 100 parts."""
    g = torch.Generator().manual_seed(1)
    tops = [float(torch.linalg.eigvalsh(mean_of(torch.randperm(N, generator=g)[:128])._A)[-1]) for _ in range(100)]
    assert np.mean(tops) - 3 * np.std(tops) / 10 > truth()


def test_the_whole_is_exact():
    for start in (N, N // 2 + 1, 10 * N):
        run = bracket(mean_of, N, start=start, rtol=1e-3)
        assert run.samples == run.total == N and run.converged and any("all samples" in note for note in run.notes)
        assert run.lower <= truth() <= run.upper and run.upper - run.lower <= 2e-3 * truth()
    tight = bracket(mean_of, 2000, rtol=1e-6, start=256)
    assert [b for b, _, _ in tight.history] == [256, 512, 2000]


def test_products_are_counted_sample_by_sample():
    spent = [0]

    def counted(indices: torch.Tensor) -> SymmetricOperator:
        A = mean_of(indices)._A

        def matvec(v: torch.Tensor) -> torch.Tensor:
            spent[0] += len(indices)
            return A @ v

        return CallableOperator(matvec, D, torch.float64)

    run = bracket(counted, N, rtol=0.2)
    assert run.n_products == spent[0] and len(run.history) > 1


def test_parts_are_disjoint_random_and_nested():
    asked: list[torch.Tensor] = []

    def watched(indices: torch.Tensor) -> SymmetricOperator:
        assert bool((indices.diff() > 0).all())
        asked.append(indices)
        return mean_of(indices)

    run = bracket(watched, N, rtol=0.5, start=256, folds=4, seed=3)
    assert len(run.history) == 1
    A, B, S = (set(part.tolist()) for part in asked[:3])
    assert len(A) == len(B) == 128 and not A & B and S == A | B
    folds = [set(part.tolist()) for part in asked[3:]]
    assert len(folds) == 8 and set().union(*folds[:4]) == A and set().union(*folds[4:]) == B and sum(map(len, folds)) == 256
    again = bracket(mean_of, N, rtol=0.5, folds=4, seed=3)
    assert (run.lower, run.upper) == (again.lower, again.upper) != (bracket(mean_of, N, rtol=0.5, folds=4, seed=4).lower, again.upper)


def test_equal_samples_leave_no_width():
    """Every part is the same matrix, whose top value is known: nothing is left but the rounding bound."""
    A = torch.diag(torch.linspace(-3, 2, 80, dtype=torch.float64))
    run = bracket(lambda indices: DenseOperator(A), 1000, rtol=1e-3)
    assert run.samples == 256 and run.lower == pytest.approx(2, rel=1e-3) and run.upper == pytest.approx(2, rel=1e-3)


def test_one_sample_and_few():
    for size in (1, 2, 15, 31):
        run = bracket(mean_of, size, start=16)
        Z = rows()[:size]
        assert run.samples == size and float(run) == pytest.approx(float(torch.linalg.eigvalsh(Z.T @ Z / size)[-1]), rel=1e-6)


def test_quantiles_are_students():
    for dof, room in ((2, 1e-2), (3, 2e-3), (7, 1e-4), (15, 1e-5)):
        for p in (0.75, 0.9, 0.95, 0.975):
            assert quantile(p, dof) == pytest.approx(scipy.stats.t.ppf(p, dof), rel=room)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rtol": 0.0}, InputError, ("rtol is 0.0", "> 0")),
        ({"rtol": -0.1}, InputError, ("rtol is -0.1",)),
        ({"rtol": math.nan}, InputError, ("rtol is nan",)),
        ({"rtol": "10%"}, ArgumentTypeError, ("rtol is a str",)),
        ({"confidence": 1.0}, InputError, ("confidence is 1.0", "0.9")),
        ({"confidence": None}, ArgumentTypeError, ("confidence is a NoneType",)),
        ({"folds": 2}, InputError, ("folds is 2", "at least 3")),
        ({"folds": 2.5}, ArgumentTypeError, ("folds is 2.5",)),
        ({"start": 15}, InputError, ("start = 15", "16")),
        ({"start": True}, ArgumentTypeError, ("start is True",)),
        ({"size": 0}, InputError, ("0 samples",)),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(options, error, words):
    with refuses(error, *words):
        bracket(mean_of, **({"size": N} | options))


def test_ctrl_c_and_errors_carry_the_interval_so_far():
    for raised, caught in ((KeyboardInterrupt, Interrupted), (OSError, OSError)):
        for limit, there in ((100, False), (300, True)):

            def broken(indices: torch.Tensor, limit: int = limit, raised: type[BaseException] = raised) -> SymmetricOperator:
                if len(indices) > limit:
                    raise raised
                return mean_of(indices)

            with pytest.raises(caught) as seen:
                bracket(broken, N, rtol=1e-3)
            assert (seen.value.partial is not None) == there
            if there:
                assert seen.value.partial.samples == 256 and not seen.value.partial.converged


def test_a_top_value_of_zero_between_two_signs_is_said_not_to_be_known():
    """No relative width makes sense there."""
    A = torch.diag(torch.linspace(-3, 0, 80, dtype=torch.float64))

    def operator_of(indices: torch.Tensor) -> SymmetricOperator:
        return DenseOperator(A)

    with pytest.warns(NotConvergedWarning, match="close to zero"):
        run = bracket(operator_of, 1000, rtol=1e-3)
    assert not run.converged and run.lower <= 0.0 <= run.upper
