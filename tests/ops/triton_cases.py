"""Inputs and checkers of the Triton column: ensembles, several vectors, every storage dtype, NaN in everything nobody may read.

The oracle is numpy in extended precision. Each checker also asserts that nothing but its results was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsharp.ops import alpha, combine, dots, probes, update
from fastsharp.ops.reference import krylov as reference
from tests.releases import before
from tests.tolerance import assert_close, chunked_dot_bound, eps, exact, stored_sum_bound, sum_bound

STORAGE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"


def interpreter_or_skip() -> None:
    """Skip the module where Triton's interpreter itself fails: before 3.7 it calls int() on arrays, an error since numpy 2.4."""
    triton = pytest.importorskip("triton")
    if INTERPRETED and before(triton.__version__, "3.7") and not before(np.__version__, "2.4"):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy < 2.4", allow_module_level=True)


def vectors_of(storage: torch.dtype) -> torch.dtype:
    """The dtype of w over a basis of this storage."""
    return torch.float64 if storage == torch.float64 else torch.float32


@dataclass(frozen=True)
class Ensemble:
    """V (E, j, n) and w (E, b, n), rows `pad` and members one row apart, in buffers that hold NaN elsewhere."""

    E: int
    b: int
    j: int
    n: int
    basis: Tensor
    vectors: Tensor
    c: Tensor  # (E, b, j)
    ab: Tensor  # (E, 2)
    last: tuple[Tensor, Tensor]  # v_j, v_{j-1} in the dtype of w, (E, n)

    @property
    def V(self) -> Tensor:
        return self.basis[:, : self.j, : self.n]

    @property
    def w(self) -> Tensor:
        return self.vectors[:, : self.b, : self.n]

    def outside(self) -> Tensor:
        """Everything in both buffers except w."""
        copy = self.vectors.clone()
        copy[:, : self.b, : self.n] = 0
        return torch.cat([self.basis.double().flatten(), copy.double().flatten()])


def ensemble(E: int, b: int, j: int, n: int, storage: torch.dtype, pad: int = 3) -> Ensemble:
    """Rows and vectors of order one."""
    g = torch.Generator().manual_seed(1000 * j + 100 * b + 10 * E + n)
    dtype = vectors_of(storage)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    basis = torch.full((E, j + 1, n + pad), torch.nan, dtype=storage)
    basis[:, :j, :n] = normal(E, j, n)
    vectors = torch.full((E, b + 1, n + pad), torch.nan, dtype=dtype)
    vectors[:, :b, :n] = normal(E, b, n)
    last = normal(E, n).to(dtype).to(DEVICE), normal(E, n).to(dtype).to(DEVICE)
    return Ensemble(E, b, j, n, basis.to(DEVICE), vectors.to(DEVICE), normal(E, b, j).to(DEVICE), normal(E, 2).to(DEVICE), last)


def nans(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def same(x: Tensor, y: Tensor) -> bool:
    """Bitwise equal, a NaN to a NaN."""
    return bool(torch.equal(x.nan_to_num(nan=1234.5), y.nan_to_num(nan=1234.5)))


def check_alpha(E: int, n: int, dtype: torch.dtype) -> None:
    """out[e] = v_e'w_e to float64 rounding."""
    p = ensemble(E, 1, 1, n, dtype)
    out = nans(E + 1)
    alpha(p.V[:, 0], p.w[:, 0], out=out[:E])
    terms = exact(p.V[:, 0]) * exact(p.w[:, 0])
    assert_close(out[:E], terms.sum(-1), sum_bound(terms), "alpha")
    assert bool(out[E].isnan())


def check_dots(p: Ensemble, removed: bool) -> None:
    """w loses two terms and is rounded once (b = 1); then V w and w'w of that w."""
    before, outside = exact(p.w), p.outside()
    out = nans(p.E, p.b + 1, p.j + 1)
    if removed:
        dots(p.V, p.w[:, 0], p.ab, last=p.last, out=out[:, 0])
        ab = exact(p.ab)
        terms = np.stack([before[:, 0], *(-ab[:, k, None] * exact(p.last[k]) for k in range(2))])
        assert_close(p.w[:, 0], terms.sum(0), stored_sum_bound(terms, p.w.dtype), "w after dots")
    else:
        dots(p.V, p.w, out=out[:, : p.b])
        assert_close(p.w, before, 0, "w after dots without ab")
    x, V = exact(p.w), exact(p.V)
    for e in range(p.E):
        for i in range(p.b):
            assert_close(out[e, i, : p.j], V[e] @ x[e, i], chunked_dot_bound(V[e], x[e, i], p.w.dtype), f"V w of vector {e}, {i}")
    assert_close(out[:, : p.b, p.j], (x * x).sum(-1), sum_bound(x * x), "w'w")
    assert bool(out[:, p.b].isnan().all()) and same(p.outside(), outside)


def check_update(p: Ensemble, with_row: bool) -> None:
    """w - V'c rounded once, w'w of that w, and the next row (b = 1)."""
    V, c, outside, row = exact(p.V), exact(p.c), p.outside(), nans(p.E, p.n + 2, dtype=p.V.dtype)
    terms = np.concatenate([exact(p.w)[None], -np.moveaxis(c[..., None] * V[:, None], 2, 0)])
    out = nans(p.b + 1, p.E).T  # strided the other way round
    factor = p.ab[:, 0]
    if with_row:
        update(p.V, p.w[:, 0], p.c[:, 0], out=out[:, 0], row=row[:, : p.n], factor=factor)
    else:
        update(p.V, p.w, p.c, out=out[:, : p.b])
    assert_close(p.w, terms.sum(0), stored_sum_bound(terms, p.w.dtype), "w after update")
    x = exact(p.w)
    assert_close(out[:, : p.b], (x * x).sum(-1), sum_bound(x * x), "w'w")
    if with_row:
        want = exact(factor)[:, None] * x[:, 0]
        assert_close(row[:, : p.n], want, row_bound(want, p.V.dtype), "next row")
    assert bool(row[:, p.n if with_row else 0 :].isnan().all()) and bool(out[:, p.b].isnan().all()) and same(p.outside(), outside)


def row_bound(want: NDArray[Any], storage: torch.dtype) -> NDArray[Any]:
    """Half a unit of the storage, and a rounding to float32 on the way; a whole one for bfloat16 in the interpreter, which truncates."""
    share = 1.0 if storage == torch.bfloat16 and INTERPRETED else 0.5
    tiny = float(torch.finfo(storage).smallest_normal) * eps(storage)
    return (share * (1 + 1e-6) * eps(storage) + (0 if storage == torch.float64 else eps(torch.float32))) * np.abs(want) + 2e-16 + tiny


def check_combine(k: int, j: int, n: int, storage: torch.dtype) -> None:
    """S V with each sum rounded once."""
    p = ensemble(1, 1, j, n, storage)
    S, out = nans(k, j + 1), nans(k + 1, n + 3, dtype=vectors_of(storage))
    S[:, :j] = torch.randn(k, j, dtype=torch.float64)
    combine(S[:, :j], p.V[0], out=out[:k, :n])
    terms = np.moveaxis(exact(S[:, :j])[:, :, None] * exact(p.V[0]), 1, 0)
    assert_close(out[:k, :n], terms.sum(0), stored_sum_bound(terms, out.dtype), "combine")
    assert bool(out[k].isnan().all()) and bool(out[:, n:].isnan().all())


def check_probes(kind: str, b: int, n: int, dtype: torch.dtype, seed: int, first: int) -> None:
    """The stream of the reference: signs bitwise, normals to one float32 unit (two libraries' ln and cos)."""
    out, want = nans(b + 1, n + 2, dtype=dtype), torch.zeros(b, n, dtype=dtype)
    probes(kind, out=out[:b, :n], seed=seed, first=first)
    reference.probes(kind, seed, first, want)
    bound = 0 if kind == "rademacher" else eps(torch.float32) * np.abs(exact(want)) + 1e-15
    assert_close(out[:b, :n], exact(want), bound, kind)
    assert bool(out[b].isnan().all()) and bool(out[:, n:].isnan().all())
