"""What `operator=` and the first argument take, in every call: names, classes, factories, composites, callables, numpy and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import nn, optim

import fastsharp
from fastsharp.composite import LinearCombination
from fastsharp.errors import (
    ArgumentTypeError,
    DoubleBackwardError,
    DtypeError,
    InputError,
    NonFiniteError,
    NotSymmetricError,
    ResumeMismatchError,
    ShapeError,
)
from fastsharp.operator import SymmetricOperator, as_operator
from tests.cases import net
from tests.curvature.checks import exact
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")
SOLVERS: dict[str, Callable[..., float]] = {
    "lanczos": lambda *a, **k: float(fastsharp.lanczos(*a, k=1, tol=1e-8, **k).eigenvalues[0]),
    "density": lambda *a, **k: float(fastsharp.density(*a, steps=40, **k).nodes.max()),
    "trace": lambda *a, **k: float(fastsharp.trace(*a, **k)),
    "frobenius": lambda *a, **k: float(fastsharp.frobenius(*a, **k)),
    "logdet": lambda *a, **k: float(fastsharp.logdet(*a, shift=2.0, **k)),
    "trace_function": lambda *a, **k: float(fastsharp.trace_function(*a, f=torch.exp, **k)),
    "spectrum": lambda *a, **k: float(fastsharp.spectrum(*a, k=1, steps=30, **k).eigenpairs.eigenvalues[0]),
}
EXACT: dict[str, Callable[[torch.Tensor], float]] = {
    "lanczos": lambda e: float(e[-1]),
    "density": lambda e: float(e[-1]),
    "trace": lambda e: float(e.sum()),
    "frobenius": lambda e: float(e.norm()),
    "logdet": lambda e: float((e + 2.0).log().sum()),
    "trace_function": lambda e: float(e.exp().sum()),
    "spectrum": lambda e: float(e[-1]),
}


def damped(model: Any, loader: Any, loss_fn: Any, **build: Any) -> SymmetricOperator:
    H = fastsharp.Hessian(model, loader, loss_fn, **build)
    return H + 0.1 * fastsharp.identity_like(H)


def matrix() -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    A = Q * torch.linspace(-1.0, 3.0, 30, dtype=torch.float64) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_a_factory(solver):
    n = net("mlp_tanh")
    found = SOLVERS[solver](n.model, n.batches, n.loss_fn, operator=damped)
    want = EXACT[solver](torch.linalg.eigvalsh(exact("mlp_tanh")) + 0.1)
    assert abs(found - want) <= 0.02 * abs(want)
    alone = EXACT[solver](torch.linalg.eigvalsh(exact("mlp_tanh")))
    assert abs(found - alone) > 3 * abs(found - want)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", ["tensor", "array", "float32", "callable", "linear", "sparse", "swapped", "composite"])
def test_every_solver_takes_a_plain_matrix(form, solver):
    A = matrix()
    n = {
        "tensor": A,
        "array": A.numpy(),
        "float32": A.float().numpy(),
        "callable": (lambda v: A @ v, 30, torch.float64, "cpu"),
        "linear": scipy.sparse.linalg.aslinearoperator(A.numpy()),
        "sparse": scipy.sparse.csr_matrix(A.numpy()),
        "swapped": A.numpy().astype(">f8"),
        "composite": 2 * fastsharp.DenseOperator(A) - fastsharp.DenseOperator(A),
    }[form]
    want = EXACT[solver](torch.linalg.eigvalsh(A))
    assert abs(SOLVERS[solver](n) - want) <= 0.02 * abs(want) + 1e-5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda A: A.numpy().astype(complex), DtypeError, ("complex128", "real")),
        (lambda A: scipy.sparse.linalg.aslinearoperator(A.numpy() * 1j), DtypeError, ("complex128",)),
        (lambda A: scipy.sparse.csr_matrix(A.numpy() * 1j), DtypeError, ("complex128",)),
        (lambda A: A.numpy().astype("float16"), DtypeError, ("float16", "float32")),
        (lambda A: A.numpy().astype("longdouble"), DtypeError, ("float128",)),
        (lambda A: A.to(torch.complex128), DtypeError, ("complex128",)),
        (lambda A: A.half(), DtypeError, ("float16",)),
        (lambda A: A.to(torch.int64), DtypeError, ("int64",)),
        (lambda A: A.to_sparse(), ArgumentTypeError, ("sparse", "to_dense")),
        (lambda A: A.numpy()[:, :29], ShapeError, ("(30, 29)",)),
        (lambda A: scipy.sparse.csr_matrix(A.numpy()[:29]), ShapeError, ("(29, 30)",)),
        (lambda A: np.ones(3), ShapeError, ("(3,)",)),
        (lambda A: np.triu(A.numpy()), NotSymmetricError, ("not symmetric",)),
        (lambda A: scipy.sparse.triu(A.numpy()), NotSymmetricError, ("not symmetric", "A.T")),
        (lambda A: scipy.sparse.csr_matrix([[np.nan, 0.0], [0.0, 1.0]]), NonFiniteError, ("NaN",)),
        (lambda A: scipy.sparse.linalg.aslinearoperator(np.triu(A.numpy())), NotSymmetricError, ("beyond rounding",)),
        (lambda A: lambda v: A @ v, ArgumentTypeError, ("function", "(function, n)")),
        (lambda A: (lambda v: (A @ v).to(torch.complex128), 30, torch.float64), DtypeError, ("complex128", "callable")),
        (lambda A: (lambda v: (A @ v).half(), 30, torch.float64), DtypeError, ("float16", "callable")),
        (lambda A: (lambda v: (A @ v)[:3], 30, torch.float64), ShapeError, ("(3,)", "(30,)")),
        (lambda A: (lambda v: v.mul_(2), 30, torch.float64), InputError, ("writes to its argument", "clone")),
        (lambda A: scipy.sparse.linalg.LinearOperator((30, 30), lambda v: 1j * v, dtype=float), DtypeError, ("complex128", "real")),
        (lambda A: (lambda v: A @ v, 30, torch.int32), DtypeError, ("int32",)),
        (lambda A: [[1.0, 0.0], [0.0, 1.0]], ArgumentTypeError, ()),
    ],
)
def test_what_is_no_symmetric_matrix_is_refused_by_name(make, error, words):
    with pytest.raises(error) as caught:
        fastsharp.lanczos(make(matrix()), k=1)
    check_message(caught.value, *words)


def test_integers_multiply_as_float64_and_a_callable_may_write_to_its_own_copy():
    A = np.array([[2, 1], [1, 2]])
    for form in (A, scipy.sparse.csr_matrix(A), scipy.sparse.linalg.aslinearoperator(A)):
        assert abs(float(fastsharp.lanczos(form, k=1).eigenvalues[0]) - 3.0) <= 1e-12

    def rude(v: Any) -> Any:
        v *= 2.0
        return v

    operator = as_operator(scipy.sparse.linalg.LinearOperator((5, 5), rude, dtype=float))
    V = torch.randn(2, 5, dtype=torch.float64)
    kept = V.clone()
    assert torch.equal(operator.apply(V), 2 * kept) and torch.equal(V, kept)


def test_names_classes_and_built_operators_mean_the_same():
    n = net("mlp_tanh")
    want = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=1, operator="ggn")
    for given in (fastsharp.GGN, lambda *a, **b: fastsharp.GGN(*a, **b)):
        found = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=1, operator=given)
        assert torch.equal(found.eigenvalues, want.eigenvalues) and found.settings == want.settings
    built = fastsharp.lanczos(fastsharp.GGN(n.model, n.batches, n.loss_fn), k=1)
    assert torch.equal(built.eigenvalues, want.eigenvalues)


def test_a_factory_gets_what_the_caller_gave():
    n, seen = net("mlp_tanh"), {}

    def factory(model: Any, loader: Any, loss_fn: Any, **build: Any) -> SymmetricOperator:
        seen.update(build, model=model, loader=loader, loss_fn=loss_fn)
        return fastsharp.Hessian(model, loader, loss_fn, **build)

    fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=1, operator=factory, params="0.*", backend="autograd", seed=4)
    assert (seen["model"], seen["loader"], seen["loss_fn"]) == (n.model, n.batches, n.loss_fn)
    assert (seen["params"], seen["backend"], seen["seed"], seen["bn"]) == ("0.*", "autograd", 4, None)


@pytest.mark.parametrize(
    ("operator", "error", "words"),
    [
        ("fisher matrix", InputError, ("'fisher matrix'", "'ggn'")),
        (3, ArgumentTypeError, ("int", "operator=")),
        (lambda *a, **b: torch.eye(3), ArgumentTypeError, ("Tensor", "SymmetricOperator")),
        (fastsharp.DenseOperator(torch.eye(2)), ArgumentTypeError, ("DenseOperator", "first argument")),
    ],
)
def test_what_builds_no_operator_is_refused_by_name(operator, error, words):
    n = net("mlp_tanh")
    calls = [*SOLVERS.values(), fastsharp.bracket, fastsharp.explain]
    for call in [*calls, lambda *a, **k: fastsharp.Tracker(*a, **k).update()]:
        with pytest.raises(error) as caught:
            call(n.model, n.batches, n.loss_fn, operator=operator)
        check_message(caught.value, *words)


def test_operator_beside_a_matrix_is_refused():
    with pytest.raises(InputError) as caught:
        fastsharp.lanczos(matrix(), operator=fastsharp.GGN)
    check_message(caught.value, "operator", "Leave them out")


def test_the_parts_of_a_composite_pass_the_preflight():
    n = net("mlp_tanh")

    def detached(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target) + (output * output.detach()).mean()

    H = fastsharp.Hessian(n.model, n.batches, detached)
    for made in (H + fastsharp.identity_like(H), fastsharp.block_diagonal(H), fastsharp.Coupling(H, "0.*", "2.*")):
        with pytest.raises(DoubleBackwardError):
            fastsharp.lanczos(made, k=1)
    unchecked = fastsharp.lanczos(H + fastsharp.identity_like(H), k=1, preflight="off")
    assert "unchecked: preflight='off'" in unchecked.notes


def test_the_tracker_follows_a_composite_and_an_optimizer():
    n = net("mlp_tanh")
    optimizer = optim.Adam(n.model.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        n.objective(n.model, n.whole).backward()
        optimizer.step()

    step()

    def preconditioned(*a: Any, **b: Any) -> SymmetricOperator:
        return fastsharp.Preconditioned(fastsharp.Hessian(*a, **b), optimizer)

    tracker = fastsharp.Tracker(n.model, n.batches, n.loss_fn, operator=preconditioned, tol=1e-6, criterion="residual")
    for _ in range(3):
        found = tracker.update()
        fresh = fastsharp.lanczos(preconditioned(n.model, n.batches, n.loss_fn), k=1, tol=1e-8)
        assert abs(float(found.eigenvalues[0] - fresh.eigenvalues[0])) <= 1e-5 * float(fresh.eigenvalues[0])
        step()
    fixed = fastsharp.Tracker(n.model, n.batches, n.loss_fn, operator=lambda *a, **b: fastsharp.DenseOperator(torch.eye(3)))
    with pytest.raises(InputError) as caught:
        fixed.update()
    check_message(caught.value, "DenseOperator", "follow the weights")


def test_a_bracket_takes_what_is_a_mean_over_samples():
    n = net("mlp_tanh")
    found = fastsharp.bracket(n.model, n.batches, n.loss_fn, operator=damped)
    top = float(torch.linalg.eigvalsh(exact("mlp_tanh"))[-1]) + 0.1
    assert found.lower <= top <= found.upper
    for other in (fastsharp.InputHessian, lambda *a, **b: fastsharp.DenseOperator(torch.eye(3))):
        with pytest.raises(InputError) as caught:
            fastsharp.bracket(n.model, n.batches, n.loss_fn, operator=other)
        check_message(caught.value, "bracket" if other is not fastsharp.InputHessian else "Hessian")


def test_explain_and_lists_of_models_take_single_operators():
    n = net("mlp_tanh")
    assert fastsharp.explain(n.model, n.batches, n.loss_fn, operator=fastsharp.GGN).backend
    with pytest.raises(InputError) as caught:
        fastsharp.explain(n.model, n.batches, n.loss_fn, operator=damped)
    check_message(caught.value, "hessian + 0.1 * identity")
    pair = [n.model, net("mlp_tanh", seed=1).model]
    by_name, by_class = (fastsharp.lanczos(pair, n.batches, n.loss_fn, k=1, operator=o) for o in ("ggn", fastsharp.GGN))
    assert all(torch.equal(a.eigenvalues, b.eigenvalues) for a, b in zip(by_name, by_class, strict=True))
    with pytest.raises(InputError) as caught:
        fastsharp.lanczos(pair, n.batches, n.loss_fn, k=1, operator=damped)
    check_message(caught.value, "list of models", "hessian + 0.1 * identity")


def test_a_log_knows_the_matrix_by_its_parts(tmp_path):
    n = net("mlp_tanh")
    path = tmp_path / "log"

    def made(c: float, memory: str = "auto") -> LinearCombination:
        H = fastsharp.Hessian(n.model, n.batches, n.loss_fn, memory=memory)
        return fastsharp.with_weight_decay(H + c * fastsharp.GGN(n.model, n.batches, n.loss_fn), 0.1)

    first = fastsharp.lanczos(made(0.5), k=1, resume=path)
    for preflight, memory in (("fast", "64MiB"), ("off", "auto")):
        again = fastsharp.lanczos(made(0.5, memory), k=1, resume=path, preflight=preflight)
        assert torch.equal(again.eigenvalues, first.eigenvalues) and any("came from the log" in note for note in again.notes)
    with pytest.raises(ResumeMismatchError, match="coefficients"):
        fastsharp.lanczos(made(0.25), k=1, resume=path)
