"""Problems with members, several vectors and half-precision storage, and their checkers: numpy in extended precision, one vector at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsharp.ops import combine, dots, update
from tests.tolerance import assert_close, chunked_dot_bound, eps, exact, stored_sum_bound, sum_bound

STORAGES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMS = ("single", "vectors", "members", "both")


@dataclass(frozen=True)
class Block:
    """V (E, j, n), w (E, b, n) and everything that goes with them; `form` says which leading dimensions the ops see."""

    form: str
    V: Tensor
    w: Tensor
    last: tuple[Tensor, Tensor]  # (E, n) each
    ab: Tensor  # (E, 2)
    c: Tensor  # (E, b, j)
    factor: Tensor  # (E,)

    @property
    def members(self) -> bool:
        return self.form in ("members", "both")

    def seen(self, t: Tensor, has_vectors: bool) -> Tensor:
        """t (E, ...) or (E, b, ...) with the leading dimensions of the form."""
        if has_vectors and self.form in ("single", "members"):
            t = t[:, 0]
        return t if self.members else t[0]

    def fresh(self, *width: int) -> Tensor:
        return torch.full((*self.w.shape[:2], *width), torch.nan, dtype=torch.float64, device=self.w.device)


def block(
    form: str, E: int, b: int, j: int, n: int, storage: torch.dtype, *, pad: int = 3, device: torch.device | str = "cpu", seed: int = 0
) -> Block:
    """Random entries of order one; NaN in the gaps, which nobody may read. E and b are 1 where the form has no such dimension."""
    E, b = (E if form in ("members", "both") else 1), (b if form in ("vectors", "both") else 1)
    dtype = torch.float64 if storage == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(100 * j + n + seed)

    def draw(*shape: int, to: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(to).to(device)

    def padded(*shape: int, to: torch.dtype) -> Tensor:
        t = torch.full((*shape[:-1], shape[-1] + pad), torch.nan, dtype=to, device=device)[..., : shape[-1]]
        return t.copy_(draw(*shape, to=to))

    V, w = padded(E, j, n, to=storage), padded(E, b, n, to=dtype)
    last = (padded(E, n, to=dtype), padded(E, n, to=dtype))
    return Block(form, V, w, last, draw(E, 2), draw(E, b, j), 3 * draw(E))


def check_dots(k: Block, removal: bool = True) -> None:
    """Per vector: w minus two terms, rounded once; V w and w'w of that w. Without removal w keeps its bits."""
    before, dtype, j = k.w.clone(), k.w.dtype, k.V.shape[1]
    out = k.fresh(j + 1)
    V, w, seen = k.seen(k.V, False), k.seen(k.w, True), k.seen(out, True)
    if removal:
        ab, last = k.seen(k.ab, False), (k.seen(k.last[0], False), k.seen(k.last[1], False))
        assert dots(V, w, ab, out=seen, last=last) is seen
    else:
        dots(V, w, out=seen)
        assert torch.equal(k.w, before), "w changed without anything to remove"
    for e in range(k.V.shape[0]):
        for i in range(k.w.shape[1]):
            rows, x = exact(k.V[e]), exact(k.w[e, i])
            if removal:
                ab = exact(k.ab[e])
                terms = np.stack([exact(before[e, i]), -ab[0] * exact(k.last[0][e]), -ab[1] * exact(k.last[1][e])])
                assert_close(k.w[e, i], terms.sum(0), stored_sum_bound(terms, dtype), f"w[{e}, {i}] after dots")
            assert_close(out[e, i, :j], rows @ x, chunked_dot_bound(rows, x, dtype), f"V w[{e}, {i}]")
            assert_close(out[e, i, j:], [(x * x).sum()], [sum_bound(x * x)], f"w'w[{e}, {i}]")


def check_update(k: Block, with_row: bool) -> None:
    """Per vector: w - V'c rounded once, w'w of that w, and factor w in the dtype of V rounded to nearest."""
    before, dtype = k.w.clone(), k.w.dtype
    out, row = k.fresh(), torch.full_like(k.V[:, 0], torch.nan)
    V, w, c = k.seen(k.V, False), k.seen(k.w, True), k.seen(k.c, True)
    seen = k.seen(out, True) if k.form != "single" else out[0]
    if with_row:
        update(V, w, c, out=seen, row=k.seen(row, False), factor=k.factor)
    else:
        update(V, w, c, out=seen)
    for e in range(k.V.shape[0]):
        for i in range(k.w.shape[1]):
            terms = np.concatenate([exact(before[e, i])[None], -exact(k.c[e, i])[:, None] * exact(k.V[e])])
            assert_close(k.w[e, i], terms.sum(0), stored_sum_bound(terms, dtype), f"w[{e}, {i}] after update")
            x = exact(k.w[e, i])
            assert_close(out[e, i], (x * x).sum(), sum_bound(x * x), f"w'w[{e}, {i}]")
        if with_row:
            want = exact(k.factor[e]) * exact(k.w[e, 0])
            assert_close(row[e], want, rounding_bound(want, k.V.dtype), f"row {e}")


def check_combine(S: Tensor, V: Tensor) -> None:
    """S V, each sum rounded once."""
    dtype = torch.float64 if V.dtype == torch.float64 else torch.float32
    out = torch.full((S.shape[0], V.shape[1] + 2), torch.nan, dtype=dtype, device=V.device)
    assert combine(S, V, out=out[:, :-2]).shape == (S.shape[0], V.shape[1])
    assert bool(out[:, -2:].isnan().all()), "written beyond a row"
    for s, x in zip(S, out, strict=True):
        terms = exact(s)[:, None] * exact(V)
        assert_close(x[:-2], terms.sum(0), stored_sum_bound(terms, dtype), "S V")


def rounding_bound(want: np.ndarray, storage: torch.dtype) -> np.ndarray:
    """Half a unit in the last place of `storage`, a little more for the way through float32, and half a subnormal."""
    tiny = float(torch.finfo(storage).smallest_normal) * eps(storage)
    bound: np.ndarray = eps(storage) / 2 * (1 + 2.0**-12) * np.abs(want) + tiny / 2
    return bound
