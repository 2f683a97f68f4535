"""Trace, Frobenius norm and tr f(H) against dense float64 truths; degenerate matrices, scales, signs, spaces, interrupts."""

from __future__ import annotations

import pytest
import torch

from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, NonFiniteError, NotConvergedError, NotConvergedWarning, ShapeError
from fastsharp.krylov import lanczos
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.krylov.trace import frobenius, logdet, trace, trace_function
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import CallableOperator, DenseOperator
from fastsharp.results import Estimate
from tests.oracles.matrices import family

METHODS = ("auto", "hutchinson", "hutch++", "xtrace")
DTYPES = (torch.float32, torch.float64)


def holds(e: Estimate, truth: float) -> bool:
    return e.interval[0] <= truth <= e.interval[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 100])
@pytest.mark.parametrize("factor", [0.0, 1.0, -0.7])
def test_multiples_of_the_identity_are_exact(n: int, factor: float, dtype: torch.dtype) -> None:
    A = DenseOperator(factor * torch.eye(n, dtype=dtype))
    for method in ("auto", "hutchinson", "hutch++"):
        e = trace(A, method=method)
        assert holds(e, n * float(A._A[0, 0])) and e.converged and e.stderr == 0.0
        assert abs(e.value - n * float(A._A[0, 0])) <= 16 * torch.finfo(dtype).eps * n
    assert frobenius(A).value == pytest.approx(abs(factor) * n**0.5, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_signs_are_treated_alike(method: str) -> None:
    A = family("outliers_rotated", 100, torch.float64).tensor(torch.float64)
    plus, minus = trace(DenseOperator(A), method=method, rtol=0.1), trace(DenseOperator(-A), method=method, rtol=0.1)
    assert plus.value == -minus.value and plus.interval == (-minus.interval[1], -minus.interval[0]) and plus.n_matvec == minus.n_matvec


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["auto", "xtrace"])
def test_powers_of_two_change_no_bit(method: str, dtype: torch.dtype) -> None:
    A = family("outliers_rotated", 100, dtype).tensor(dtype)
    p = 60 if dtype == torch.float32 else 500
    here, there = trace(DenseOperator(A), method=method), trace(DenseOperator(A * 2.0**p), method=method)
    assert there.value == here.value * 2.0**p and there.n_matvec == here.n_matvec
    assert frobenius(DenseOperator(A * 2.0**p)).value == frobenius(DenseOperator(A)).value * 2.0**p


def test_a_krylov_space_counts_exactly() -> None:
    case = family("geometric_rotated", 120, torch.float64)
    A = case.tensor(torch.float64)
    operator = DenseOperator(A)
    g = torch.Generator().manual_seed(0)
    run = Tridiagonal(operator, torch.randn(120, generator=g, dtype=torch.float64), lambda: torch.randn(120, dtype=torch.float64), 30)
    for _ in range(30):
        run.step()
    space = KrylovSpace.of_run(run)
    P = torch.eye(120, dtype=torch.float64) - space.V.T @ space.V
    left = P @ A @ P
    assert space.trace + float(left.trace()) == pytest.approx(float(A.trace()), abs=1e-11)
    assert space.squares + float(left.square().sum()) == pytest.approx(float(A.square().sum()), abs=1e-11)
    e = trace(operator, pairs=space, method="krylov")
    assert holds(e, float(A.trace())) and e.n_matvec < trace(operator, method="hutch++").n_matvec


def test_the_space_grows_where_that_pays_and_nowhere_else() -> None:
    """Outliers in any direction: fewer products than probes alone. A diagonal with a weak rest: no more, since a projection would spread it."""
    n = 400
    full = DenseOperator(family("outliers_rotated", n, torch.float64).tensor(torch.float64))
    g = torch.Generator().manual_seed(3)
    d, u = torch.rand(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64) / n**0.5
    d[:5] = torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])
    nearly_diagonal = DenseOperator(torch.diag(d) + u[:, None] * u)
    for A, rtol, most in ((full, 0.005, 0.7), (nearly_diagonal, 1e-3, 1.1)):
        grown, alone = (trace(A, rtol=rtol, method=method, max_products=10**5) for method in ("auto", "hutchinson"))
        assert grown.converged and alone.converged
        assert grown.n_matvec <= most * alone.n_matvec, (grown.n_matvec, alone.n_matvec)


def test_pairs_of_another_matrix_are_refused() -> None:
    A = family("outliers_rotated", 100, torch.float64).tensor(torch.float64)
    pairs = lanczos(DenseOperator(A), k=3)
    assert holds(trace(DenseOperator(A), pairs=pairs), float(A.trace()))
    with pytest.raises(InputError, match="another matrix"):
        trace(DenseOperator(1.1 * A), pairs=pairs)
    with pytest.raises(ShapeError, match="another matrix"):
        trace(DenseOperator(A[:90, :90].contiguous()), pairs=pairs)
    with pytest.raises(InputError, match="not orthonormal"):
        trace(DenseOperator(A), pairs=KrylovSpace(2 * pairs.eigenvectors, torch.diag(pairs.eigenvalues), 0.0))


def test_functions_of_a_matrix() -> None:
    case = family("outliers_rotated", 100, torch.float64)
    A, exact = DenseOperator(case.tensor(torch.float64)), torch.from_numpy(case.exact.copy())
    assert holds(logdet(A, shift=1.0), float((exact + 1).log().sum()))
    assert holds(trace_function(A, lambda x: 1 / (1 + x), rtol=0.1), float((1 / (1 + exact)).sum()))
    small = DenseOperator(case.tensor(torch.float64)[:20, :20].contiguous())
    assert trace_function(small, torch.exp).samples == 0
    with pytest.raises(InputError, match="a Ritz value is -"):
        logdet(DenseOperator(-case.tensor(torch.float64)), shift=1.0)


@pytest.mark.parametrize(
    ("f", "error"),
    [(3, ArgumentTypeError), (lambda x: 1.0, ArgumentTypeError), (lambda x: x[:1], InputError), (lambda x: x / 0, InputError)],
)
def test_functions_that_are_none(f: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        trace_function(DenseOperator(torch.diag(torch.arange(1.0, 81.0))), f)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"rtol": 0.0}, InputError),
        ({"rtol": -0.1}, InputError),
        ({"rtol": float("nan")}, InputError),
        ({"rtol": True}, ArgumentTypeError),
        ({"rtol": "1"}, ArgumentTypeError),
        ({"atol": -1.0}, InputError),
        ({"confidence": 1.0}, InputError),
        ({"method": "best"}, InputError),
        ({"method": "krylov"}, InputError),
        ({"max_products": 10}, InputError),
        ({"max_products": 100.0}, ArgumentTypeError),
        ({"seed": 2**63}, InputError),
        ({"pairs": [1, 2]}, ArgumentTypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        trace(DenseOperator(torch.eye(5)), **arguments)  # type: ignore[arg-type]


def test_a_budget_that_does_not_reach() -> None:
    A = DenseOperator(family("random", 100, torch.float64).tensor(torch.float64))
    with pytest.warns(NotConvergedWarning, match="max_products") as seen:
        e = trace(A, method="hutchinson", max_products=64)
    assert not e.converged and e.n_matvec <= 64 and seen[0].message.partial is e  # type: ignore[union-attr]
    with pytest.raises(NotConvergedError) as caught:
        trace(A, method="hutchinson", max_products=64, strict=True)
    assert caught.value.partial.value == e.value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [1, 30])
def test_what_ends_a_run_carries_the_estimate_so_far(method: str, at: int) -> None:
    A = family("outliers_rotated", 100, torch.float64).tensor(torch.float64)
    for error, raised in ((KeyboardInterrupt(), Interrupted), (MemoryError("full"), MemoryError)):
        calls = 0

        def product(v: torch.Tensor, error: BaseException = error) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return A @ v

        with pytest.raises(raised) as caught:
            trace(CallableOperator(product, 100, torch.float64), method=method, check="off")
        partial = caught.value.partial  # type: ignore[attr-defined]
        assert (partial is None) == (at == 1)
        if partial is not None:
            assert not partial.converged and any("cut short" in note for note in partial.notes)


def test_nan_in_a_product() -> None:
    with pytest.raises(NonFiniteError, match="products 1 to 8"):
        trace(CallableOperator(lambda v: v * float("nan"), 100), check="off")
