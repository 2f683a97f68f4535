"""The three homes of a basis do the same arithmetic: against float64 algebra on what they hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastsharp import rng
from fastsharp.krylov.basis import Basis, HalfRows, HostRows, Rows
from fastsharp.krylov.tridiagonal import Tridiagonal
from tests.oracles.matrices import DctSpectrum, outlier_spectrum, power_law_spectrum

CPU, F32, F64 = torch.device("cpu"), torch.float32, torch.float64
N = 1003
KINDS: dict[str, Callable[[int], Basis]] = {
    "rows32": lambda m: Rows(N, F32, CPU, m),
    "rows64": lambda m: Rows(N, F64, CPU, m),
    "half": lambda m: HalfRows(N, CPU, m),
    "host32": lambda m: HostRows(N, F32, CPU, m),
    "host64": lambda m: HostRows(N, F64, CPU, m),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def eps(basis: Basis) -> float:
    return max(float(torch.finfo(basis.dtype).eps), basis.noise)


def filled(kind: str, j: int, capacity: int = 50) -> Basis:
    """j orthonormal rows made by the basis itself from random vectors."""
    basis, g = KINDS[kind](capacity), torch.Generator().manual_seed(0)
    c, after = torch.empty(capacity + 1, dtype=F64), torch.empty(1, dtype=F64)
    for i in range(j):
        v = torch.randn(N, generator=g, dtype=F64).to(basis.dtype)
        if i == 0:
            basis.place(0, v / v.norm())
            continue
        basis.vector(i).copy_(v)
        for _ in range(2):
            basis.project(i, None, c[: i + 1], after)
        basis.accept(i, float(after.sqrt()))
    return basis


@kinds
def test_rows_are_orthonormal_to_the_precision_they_are_stored_in(kind: str) -> None:
    basis = filled(kind, 40)
    V = basis.rows(40).double()
    assert float((V @ V.T - torch.eye(40, dtype=F64)).abs().max()) <= 4 * np.sqrt(40) * eps(basis)


@kinds
def test_project_removes_the_given_terms_and_then_the_span(kind: str) -> None:
    for j in (1, 2, 9, 17):
        basis, g = filled(kind, j), torch.Generator().manual_seed(j)
        w = torch.randn(N, generator=g, dtype=F64).to(basis.dtype)
        ab = torch.tensor([0.7, -0.3], dtype=F64)
        before = w.double() - 0.7 * basis.vector(j - 1).double() - (-0.3 * basis.vector(j - 2).double() if j > 1 else 0)
        V = basis.rows(j).double()
        basis.vector(j).copy_(w)
        c, after = torch.full((j + 1,), torch.nan, dtype=F64), torch.full((1,), torch.nan, dtype=F64)
        basis.project(j, ab, c, after)
        size, unit = float(before.norm()), float(torch.finfo(basis.dtype).eps)
        assert float((c[:j] - V @ before).abs().max()) <= 4 * np.sqrt(N) * unit * size
        assert float(c[j]) == pytest.approx(size**2, rel=4 * unit)
        x = basis.vector(j).double()
        want = before - (V @ before) @ V
        assert float((x - want).norm()) <= 4 * np.sqrt(N) * unit * size
        assert float(after) == pytest.approx(float(x @ x), rel=1e-12)


@kinds
def test_combine_gives_unit_vectors_in_the_span(kind: str) -> None:
    basis = filled(kind, 20)
    S = torch.linalg.qr(torch.randn(20, 20, dtype=F64, generator=torch.Generator().manual_seed(1)))[0][:7]
    X = basis.combine(S)
    want = S @ basis.rows(20).double()
    unit = float(torch.finfo(basis.dtype).eps)
    assert X.dtype == basis.dtype and X.shape == (7, N)
    assert float((X.double().norm(dim=1) - 1).abs().max()) <= 4 * unit
    assert float((X.double() - want / want.norm(dim=1, keepdim=True)).abs().max()) <= 4 * unit


@kinds
def test_subtract_takes_off_a_combination_of_some_rows(kind: str) -> None:
    basis = filled(kind, 20)
    w = torch.randn(N, dtype=F64, generator=torch.Generator().manual_seed(2)).to(basis.dtype)
    c = [0.5, -2.0, 0.25]
    want = w.double() - torch.tensor(c, dtype=F64) @ basis.rows(20)[9:12].double()
    basis.subtract(9, c, w)
    assert float((w.double() - want).abs().max()) <= 4 * float(torch.finfo(basis.dtype).eps) * 4


@kinds
@pytest.mark.parametrize(("j", "kept"), [(20, 6), (20, 18), (9, 8), (16, 1)])
def test_compress_replaces_rows_and_moves_the_next_one_behind_them(kind: str, j: int, kept: int) -> None:
    basis = filled(kind, j + 1)
    S = torch.linalg.qr(torch.randn(j, j, dtype=F64, generator=torch.Generator().manual_seed(1)))[0][:kept]
    want = S @ basis.rows(j).double()
    following, stored = basis.vector(j).clone(), basis.rows(j + 1)[j].clone()
    basis.compress(S)
    after = basis.rows(kept + 1)
    assert torch.equal(basis.vector(kept), following) and torch.equal(after[kept], stored)
    assert float((after[:kept].double() - want).abs().max()) <= 2 * eps(basis) * float(want.abs().max())


@kinds
def test_growth_keeps_what_is_there(kind: str) -> None:
    few, many = filled(kind, 10, capacity=80), filled(kind, 70, capacity=80)
    assert torch.equal(few.rows(10), many.rows(10)[:10])


def test_half_rows_take_half_the_bytes() -> None:
    half, full = HalfRows(N, CPU, 64, upfront=True), Rows(N, F32, CPU, 64, upfront=True)
    assert 2 * half._storage.nbytes == full._storage.nbytes


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_half_rows_hold_vectors_of_any_length_and_shape(scale: float) -> None:
    """A row is stored as a power-of-two multiple near sqrt(n): no overflow, and a unit spike survives beside zeros."""
    basis = HalfRows(N, CPU, 4)
    basis.place(0, torch.eye(1, N)[0])
    w = basis.vector(1)
    w.zero_()
    w[5], w[7] = scale, scale
    c, after = torch.empty(2, dtype=F64), torch.empty(1, dtype=F64)
    basis.project(1, None, c, after)
    basis.accept(1, float(after.sqrt()))
    row = basis.rows(2)[1]
    assert float(row.norm()) == pytest.approx(1.0, rel=2.0**-10)
    assert float(row[5]) == pytest.approx(2**-0.5, rel=2.0**-10) and float(row[6]) == 0.0


@pytest.mark.parametrize("spectrum", [outlier_spectrum, power_law_spectrum])
def test_a_float16_basis_moves_the_top_12_by_less_than_1e_6(spectrum: Callable[[], np.ndarray]) -> None:
    exact = DctSpectrum(spectrum(), F32)
    values = []
    for basis in (Rows(exact.operator.n, F32, CPU, 61), HalfRows(exact.operator.n, CPU, 61)):
        g = rng.generator(0)
        state = Tridiagonal(exact.operator, rng.normal(exact.operator.n, g, F32), lambda g=g: rng.normal(exact.operator.n, g, F32), basis)  # type: ignore[misc]
        for _ in range(60):
            state.step()
        values.append(state.ritz()[0].sort(descending=True).values[:12])
    change = ((values[0] - values[1]).abs() / values[0]).max()
    print(f"{spectrum.__name__}: top 12 moved by {float(change):.2g}")  # shown by pytest -rP
    assert float(change) <= 1e-6
