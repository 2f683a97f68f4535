"""The truth of every Krylov op, in float64 throughout, whatever the dtype of the vectors.

Shapes are those that `_border.py` hands on: V (E, j, n), w (E, b, n), with the leading dimensions always there.
Note on numerical properties: the sums are torch's own in float64; for float32 vectors the only rounding that matters is that
of storing w. Deterministic for a fixed thread count, not across thread counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Removed = tuple[Tensor, Tensor, Tensor | None]
Row = tuple[Tensor, Tensor]


def alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
    """out[e] = v_e'w_e."""
    for o, x, y in zip(out, v, w, strict=True):
        o.copy_(x.double() @ y.double())


def dots(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    """w <- w - a v_j - b v_{j-1} with removed = (ab, v_j, v_{j-1}); out[..., :j] = V w; out[..., j] = w'w. A zero skips its term."""
    for e in range(V.shape[0]):
        for i in range(w.shape[1]):
            x = w[e, i].double()
            if removed is not None:
                for a, v in zip(removed[0][e], (removed[1], removed[2]), strict=True):
                    if v is not None and float(a) != 0.0:
                        x = x - a * v[e].double()
                x = w[e, i].copy_(x).double()
            for r, v in enumerate(V[e]):
                out[e, i, r] = v.double() @ x
            out[e, i, -1] = x @ x


def update(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    """w <- w - V'c; out = w'w; row[0] <- row[1] w."""
    for e in range(V.shape[0]):
        for i in range(w.shape[1]):
            x = w[e, i].double()
            for a, v in zip(c[e, i], V[e], strict=True):
                x = x - a * v.double()
            x = w[e, i].copy_(x).double()
            out[e, i] = x @ x
            if row is not None:
                row[0][e].copy_(row[1][e] * x)


def combine(S: Tensor, V: Tensor, out: Tensor) -> None:
    """out = S V, in chunks of columns so that no float64 copy of V is made."""
    for i in range(0, V.shape[1], 1 << 15):
        out[:, i : i + (1 << 15)] = S @ V[:, i : i + (1 << 15)].double()


def probes(kind: str, seed: int, first: int, out: Tensor) -> None:
    """Row i is vector first + i of the stream: Philox-4x32-10 in int64 arithmetic; see `fastsharp.ops.probes`."""
    per_block = 128 if kind == "rademacher" else 4
    n = out.shape[1]
    q = torch.arange(-(-n // per_block), dtype=torch.int64, device=out.device)
    for i, row in enumerate(out):
        words = torch.stack(philox(seed, q, first + i), 1)
        if kind == "rademacher":
            bits = words[:, :, None] >> torch.arange(32, dtype=torch.int64, device=out.device) & 1
            row.copy_(1 - 2 * bits.reshape(-1)[:n])
        else:
            radius = (-2 * ((words[:, 0::2] + 1).double() * 2.0**-32).log()).sqrt()
            angle = words[:, 1::2].double() * (2 * math.pi * 2.0**-32)
            z = torch.stack([radius * angle.cos(), radius * angle.sin()], 2)
            row.copy_(z.reshape(-1)[:n].float())


_MASK = 0xFFFFFFFF


def philox(seed: int, q: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64) for every counter in q."""
    key = [seed & _MASK, seed >> 32 & _MASK]
    c = [q & _MASK, q >> 32, torch.full_like(q, stream & _MASK), torch.full_like(q, stream >> 32)]
    for _ in range(10):
        hi0, lo0 = _product(0xD2511F53, c[0])
        hi1, lo1 = _product(0xCD9E8D57, c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return c[0], c[1], c[2], c[3]


def _product(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of two 32-bit numbers, without leaving the range of int64."""
    low = (a & 0xFFFF) * x
    high = (a >> 16) * x + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
