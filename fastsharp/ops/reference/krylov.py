"""The three passes of a Lanczos step, in float64 throughout, whatever the dtype of the vectors.

Note on numerical properties: the sums are torch's own in float64; for float32 vectors the only rounding that matters is that
of storing w. Deterministic for a fixed thread count, not across thread counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
    """out[0] = v'w."""
    out[0] = v.double() @ w.double()


def dots(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    """w <- w - ab[0] V[j-1] - ab[1] V[j-2]; out[:j] = V w; out[j] = w'w. A zero coefficient skips its term."""
    x = w.double()
    for a, v in zip(ab, reversed(V[-2:].unbind()), strict=False):
        x = x - torch.where(a == 0, 0, a * v.double())
    x = w.copy_(x).double()
    for r, v in enumerate(V):
        out[r] = v.double() @ x
    out[-1] = x @ x


def update(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    """w <- w - V'c; out[0] = w'w."""
    x = w.double()
    for a, v in zip(c, V, strict=True):
        x = x - a * v.double()
    x = w.copy_(x).double()
    out[0] = x @ x
