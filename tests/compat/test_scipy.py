"""`to_scipy()` in the hands of scipy and curvlinops' users: eigsh, svds, cg, and an operator of curvlinops in the solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from tests.oracles.dense import dense_hessian

scipy_linalg = pytest.importorskip("scipy.sparse.linalg", reason="scipy is not installed")


@pytest.fixture
def subject() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = (torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3)
    return model, [batch], dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), batch)


def test_eigsh(subject) -> None:
    model, batches, H = subject
    values, vectors = scipy_linalg.eigsh(fastsharp.Hessian(model, batches).to_scipy(), k=3, which="LA")
    assert values == pytest.approx(torch.linalg.eigvalsh(H)[-3:].tolist(), rel=1e-9)
    assert np.abs(H.numpy() @ vectors - vectors * values).max() < 1e-9 * values[-1]


def test_svds_needs_the_adjoint_and_several_columns(subject) -> None:
    model, batches, H = subject
    U, s, Vt = scipy_linalg.svds(fastsharp.Hessian(model, batches).to_scipy(), k=4)
    order = s.argsort()
    assert s[order] == pytest.approx(sorted(torch.linalg.svdvals(H)[:4].tolist()), rel=1e-9)
    residual = H.numpy() @ Vt.T - U * s
    assert np.abs(residual).max() < 1e-9 * s.max()


def test_cg_with_a_multiple_of_the_identity(subject) -> None:
    model, batches, _ = subject
    G = fastsharp.GGN(model, batches)
    damped = G.to_scipy() + 0.1 * scipy_linalg.aslinearoperator(np.eye(G.n))
    b = np.linspace(-1, 1, G.n)
    x, info = scipy_linalg.cg(damped, b, rtol=1e-10)
    v = torch.from_numpy(x)
    assert info == 0 and np.abs((G @ v + 0.1 * v).numpy() - b).max() < 1e-8


def test_an_operator_of_curvlinops_in_our_solvers(subject) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    model, batches, H = subject
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    found = fastsharp.lanczos(theirs.to_scipy(), k=2, tol=1e-8)
    assert found.eigenvalues.tolist() == pytest.approx(torch.linalg.eigvalsh(H).flip(0)[:2].tolist(), rel=1e-8)
