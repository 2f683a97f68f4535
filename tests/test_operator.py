"""The contract of a SymmetricOperator: rows in `apply`, columns in `@`, checks before any work."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import fastsharp
from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, NonFiniteError, NotSymmetricError, ShapeError
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator, SymmetricOperator, as_operator
from tests.cases import net
from tests.curvature.checks import exact
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")
N = 7


def symmetric(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    A = torch.randn(N, N, dtype=dtype)
    return A + A.T


def operators(A: torch.Tensor) -> list[SymmetricOperator]:
    dense = DenseOperator(A)
    return [dense, CallableOperator(lambda v: A @ v, N, A.dtype), CountingOperator(dense)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_by_rows_and_by_columns(dtype):
    A = symmetric(dtype)
    M = torch.randn(N, 3, dtype=dtype)
    room = 8 * torch.finfo(dtype).eps * float(A.norm()) * float(M.norm())
    for operator in operators(A):
        assert operator.shape == (N, N) and operator.dtype == dtype
        assert float((operator @ M - A @ M).abs().max()) <= room
        assert float((operator @ M[:, 0] - A @ M[:, 0]).abs().max()) <= room
        assert float((operator.apply(M.T) - M.T @ A).abs().max()) <= room  # rows that are not contiguous


def test_out_is_written_and_returned():
    A = symmetric()
    V = torch.randn(2, N, dtype=torch.float64)
    for operator in operators(A):
        out = torch.full((2, N), float("nan"), dtype=torch.float64)
        assert operator.apply(V, out) is out and torch.equal(out, operator.apply(V))
        wide = torch.full((2, N + 3), float("nan"), dtype=torch.float64)
        assert torch.equal(operator.apply(V, wide[:, :N]), out) and bool(wide[:, N:].isnan().all())


def test_no_rows_are_no_work():
    counting = CountingOperator(DenseOperator(symmetric()))
    assert counting.apply(torch.empty(0, N, dtype=torch.float64)).shape == (0, N) and counting.count == 0


def test_every_vector_is_counted_once():
    counting = CountingOperator(DenseOperator(symmetric()))
    counting @ torch.ones(N, dtype=torch.float64)
    counting.apply(torch.ones(3, N, dtype=torch.float64))
    assert counting.count == 4


def test_a_counter_says_what_the_counted_operator_says():
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    counting = CountingOperator(H)
    assert (counting.notes, counting.settings, counting.provenance) == (H.notes, H.settings, H.provenance)
    assert counting.layout is H.layout
    n.model[0].bias.data.add_(1)
    with pytest.raises(fastsharp.errors.StaleOperatorError):
        counting.check_unchanged()


@pytest.mark.parametrize(
    ("V", "error", "words"),
    [
        (torch.ones(N, dtype=torch.float64), ShapeError, ("(7,)", "(b, 7)", "A @ v")),
        (torch.ones(2, N + 1, dtype=torch.float64), ShapeError, ("(2, 8)",)),
        (torch.ones(2, N), DtypeError, ("float32", "float64", ".to(torch.float64)")),
        (torch.ones(2, N, device="meta", dtype=torch.float64), DeviceError, ("meta", "cpu")),
        (np.ones((2, N)), ArgumentTypeError, ("ndarray", "torch.Tensor")),
    ],
    ids=["vector", "width", "dtype", "device", "array"],
)
def test_wrong_rows_are_refused_before_any_work(V, error, words):
    counting = CountingOperator(DenseOperator(symmetric()))
    with pytest.raises(error) as caught:
        counting.apply(V)
    check_message(caught.value, *words)
    assert counting.count == 0


def test_wrong_outputs_are_refused():
    operator = DenseOperator(symmetric())
    V = torch.randn(4, N, dtype=torch.float64)
    for out, word in (
        (torch.empty(3, N, dtype=torch.float64), "(3, 7)"),
        (torch.empty(N, 4, dtype=torch.float64).T, "contiguous"),
        (V, "shares memory"),
        (V[:, :], "V"),
    ):
        with pytest.raises(ShapeError) as caught:
            operator.apply(V, out)
        check_message(caught.value, word)
    both = torch.randn(6, N, dtype=torch.float64)
    with pytest.raises(ShapeError, match="shares memory"):
        operator.apply(both[:4], both[2:])


def test_wrong_right_hand_sides_are_refused():
    operator = DenseOperator(symmetric())
    for M in (torch.ones(N + 1, dtype=torch.float64), torch.ones(2, N, dtype=torch.float64), torch.ones(N, 1, 1, dtype=torch.float64)):
        with pytest.raises(ShapeError) as caught:
            operator @ M
        check_message(caught.value, "(7,)", "apply(V)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hessian_as_a_scipy_operator_gives_scipy_s_eigenvalues(dtype):
    n = net("mlp_tanh", dtype)
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    L = H.to_scipy()
    assert L.shape == (131, 131) and L.dtype == np.dtype(str(dtype).removeprefix("torch."))
    top = np.sort(scipy.sparse.linalg.eigsh(L, k=3, which="LA", return_eigenvectors=False, v0=np.ones(131, dtype=L.dtype)))[::-1]
    want = torch.linalg.eigvalsh(exact("mlp_tanh")).flip(0)[:3].numpy()
    assert np.abs(top - want).max() <= (1e-10 if dtype == torch.float64 else 1e-5) * want[0]
    M = np.random.default_rng(0).standard_normal((131, 2))
    assert np.abs(L @ M - exact("mlp_tanh").numpy() @ M).max() <= (1e-10 if dtype == torch.float64 else 1e-4)


def test_what_makes_an_operator():
    A = symmetric()
    v = torch.randn(N, dtype=torch.float64)
    scipy_operator = scipy.sparse.linalg.aslinearoperator(A.numpy())
    own = DenseOperator(A)
    assert as_operator(own) is own
    for source in (A, scipy_operator, (lambda x: A @ x, N, torch.float64)):
        operator = as_operator(source)
        assert operator.n == N and float((operator @ v - A @ v).norm()) <= 1e-13
    assert as_operator((lambda x: x, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (torch.ones(2, 3), ShapeError, ("(2, 3)", "(n, n)")),
        (torch.ones(0, 0), ShapeError, ("n >= 1",)),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), NotSymmetricError, ("not symmetric", "A.T")),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), NonFiniteError, ("(0, 1)", "nan")),
        (torch.eye(3, dtype=torch.int64), DtypeError, ("int64", "float32")),
        ((lambda v: v, 0), InputError, ("n >= 1",)),
        ((lambda v: v, 2.0), ArgumentTypeError, ("float", "int")),
        ("matrix", ArgumentTypeError, ("str", "(callable, n)")),
        (scipy.sparse.linalg.aslinearoperator(np.ones((2, 3))), ShapeError, ("(2, 3)",)),
    ],
    ids=["shape", "empty", "asymmetric", "nan", "integer", "no size", "float size", "text", "scipy"],
)
def test_what_makes_none(source, error, words):
    with pytest.raises(error) as caught:
        as_operator(source)
    check_message(caught.value, *words)


def test_what_a_callable_returns_is_checked():
    for f, error in ((lambda v: v[:2], ShapeError), (lambda v: v.double(), DtypeError), (lambda v: 3, ArgumentTypeError)):
        with pytest.raises(error) as caught:
            CallableOperator(f, N) @ torch.ones(N)
        check_message(caught.value, "callable")


def test_an_operator_is_final_below_its_one_method():
    assert SymmetricOperator.__abstractmethods__ == {"_apply"}
    for cls in (DenseOperator, CallableOperator, CountingOperator, fastsharp.Hessian):
        assert cls.__final__
