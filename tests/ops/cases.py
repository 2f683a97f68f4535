"""Inputs and checkers of the Krylov ops, shared by the theorems, by the mutants that must break them, and by the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsharp.ops import _registry, alpha, dots, force, update
from tests.tolerance import LONG, assert_close, chunked_dot_bound, exact, stored_sum_bound, sum_bound

DTYPES = (torch.float32, torch.float64)
VARIANTS = ("reference", "cpu-scalar", "cpu-avx2", "cpu-avx512", "cuda")


def device_of(variant: str) -> torch.device:
    return torch.device("cuda" if variant == "cuda" else "cpu")


@contextmanager
def using(variant: str) -> Iterator[None]:
    """Force a backend, and on the CPU an instruction set; skip what this machine does not have, saying so."""
    name, _, level = variant.partition("-")
    found = _registry.available()[name]
    if isinstance(found, str):
        pytest.skip(found)
    if not level:
        with force(name):
            yield
        return
    module = _registry.native("cpu")
    assert not isinstance(module, str)
    before = module.simd()
    if not module.set_simd(level):
        pytest.skip(f"this CPU has no {level}")
    try:
        with force(name):
            yield
    finally:
        assert module.set_simd(before)


@dataclass(frozen=True)
class Case:
    """V (j, n), w (n,) as row j of the same storage, with rows `pad` elements apart; ab and c of the size of w."""

    basis: Tensor
    j: int
    n: int
    ab: Tensor
    c: Tensor

    @property
    def V(self) -> Tensor:
        return self.basis[: self.j, : self.n]

    @property
    def w(self) -> Tensor:
        return self.basis[self.j, : self.n]

    def copy(self) -> Case:
        return Case(self.basis.clone(), self.j, self.n, self.ab.clone(), self.c.clone())


def case(
    j: int, n: int, dtype: torch.dtype, *, pad: int = 0, scale: float = 1.0, device: torch.device | str = "cpu", seed: int = 0
) -> Case:
    """Rows of order one, a vector of order `scale`, and NaN in the padding, which nobody may read."""
    g = torch.Generator().manual_seed(1000 * j + n + seed)
    basis = torch.full((j + 1, n + pad), torch.nan, dtype=dtype)
    basis[:, :n] = torch.randn(j + 1, n, generator=g, dtype=torch.float64)
    basis[j] *= scale
    ab = scale * torch.randn(2, generator=g, dtype=torch.float64)
    c = scale * torch.randn(j, generator=g, dtype=torch.float64)
    return Case(basis.to(device), j, n, ab.to(device), c.to(device))


def poisoned(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), torch.nan, dtype=torch.float64, device=device)


def check_alpha(k: Case) -> None:
    """out = v'w to float64 rounding."""
    V, w = exact(k.V), exact(k.w)
    out = alpha(k.V[0], k.w, out=poisoned(1, k.w.device))
    terms = V[0] * w
    assert_close(out, [terms.sum()], [sum_bound(terms)], "alpha")


def check_dots(k: Case) -> None:
    """w = w - a V[j-1] - b V[j-2] rounded once, then V w and w'w of that w."""
    V, w, ab, dtype = exact(k.V), exact(k.w), exact(k.ab), k.w.dtype
    out = dots(k.V, k.w, k.ab, out=poisoned(k.j + 1, k.w.device))
    terms = np.stack([w, -ab[0] * V[-1], -ab[1] * V[-2] if k.j >= 2 else np.zeros_like(w)])
    assert_close(k.w, terms.sum(0), stored_sum_bound(terms, dtype), "w after dots")
    x = exact(k.w)
    torchs = torch.mv(k.V.clone(), k.w)
    bound = chunked_dot_bound(V, x, dtype, exact(torchs) - V @ x)
    assert_close(out[: k.j], V @ x, bound, "V w")
    assert_close(out[k.j :], [(x * x).sum()], [sum_bound(x * x)], "w'w")


def check_update(k: Case) -> None:
    """w = w - V'c rounded once, never worse than twice torch's own addmv, then w'w of that w."""
    V, w, c, dtype = exact(k.V), exact(k.w), exact(k.c), k.w.dtype
    torchs = torch.addmv(k.w, k.V.clone().T, k.c.to(dtype), alpha=-1)
    out = update(k.V, k.w, k.c, out=poisoned(1, k.w.device))
    terms = np.concatenate([w[None], -c[:, None] * V])
    assert_close(k.w, terms.sum(0), stored_sum_bound(terms, dtype), "w after update")
    x = exact(k.w)
    ours, theirs = (np.sqrt(((y - terms.sum(0)) ** 2).sum()) for y in (x, exact(torchs)))
    floor = np.finfo(LONG).eps + torch.finfo(dtype).eps * np.sqrt((terms.sum(0) ** 2).sum())
    assert_close([ours], [0], [2 * theirs + floor], "error of update against torch's")
    assert_close(out, [(x * x).sum()], [sum_bound(x * x)], "w'w")
