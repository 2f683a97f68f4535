"""The one comparison of numbers in the tests, and the derivations of what it may allow.

Tolerances are never chosen by looking at a failure. They come from the length of the sums, the precision in which they are
accumulated, and from torch's own error on the same input in the same dtype. There is no branch on machine, CI or backend.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

LONG = np.longdouble  # 64-bit mantissa on x86: an oracle eleven bits better than float64
EPS64 = float(np.finfo(np.float64).eps)


def exact(x: torch.Tensor) -> NDArray[Any]:
    """The values of x in extended precision."""
    return x.detach().cpu().double().numpy().astype(LONG)


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of this dtype."""
    return float(torch.finfo(dtype).eps)


def assert_close(got: torch.Tensor | ArrayLike, want: ArrayLike, bound: ArrayLike, what: str = "result") -> None:
    """|got - want| <= bound, entry by entry; a NaN on either side fails. The report names the worst entry and its ratio."""
    x = exact(got) if isinstance(got, torch.Tensor) else np.asarray(got, dtype=LONG)
    y, b = np.broadcast_arrays(np.asarray(want, dtype=LONG), np.asarray(bound, dtype=LONG))
    if x.shape != y.shape:
        raise AssertionError(f"{what}: shape {x.shape}, expected {y.shape}")
    if x.size == 0:
        raise AssertionError(f"{what}: nothing to compare")
    if not np.all(np.isfinite(b)):
        raise AssertionError(f"{what}: the bound itself is not finite")
    with np.errstate(all="ignore"):
        error = np.abs(x - y)
        wrong = ~(error <= b)
        if not wrong.any():
            return
        ratio = np.where(np.isnan(error), np.inf, error / np.maximum(b, np.finfo(LONG).tiny))
    k = np.unravel_index(int(np.argmax(np.where(wrong, ratio, -1))), ratio.shape)
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.size} entries off, worst at {tuple(int(i) for i in k)}: got {float(x[k])!r}, "
        f"expected {float(y[k])!r}, error {float(error[k]):.3g} = {float(ratio[k]):.3g} x the bound {float(b[k]):.3g}"
    )


def chunked_dot_bound(V: NDArray[Any], w: NDArray[Any], dtype: torch.dtype, torch_error: ArrayLike = 0.0) -> NDArray[Any]:
    """What V w may be off by when products are added in `dtype` at most L = 64 to a lane and the rest in float64.

    A sum of L rounded additions of independent terms of size s has an error of standard deviation eps s L sqrt(1/24); n / L such
    sums give eps sqrt(L / 24) |v o w| = 1.6 eps |v o w|_2, which is eps sqrt(n) times the size of a term. Five of them, plus twice
    torch's own error in the same dtype, plus n float64 additions.
    """
    terms = V * w
    own = 5 * np.sqrt(64 / 24) * eps(dtype) * np.sqrt((terms**2).sum(-1))
    return 2 * np.abs(np.asarray(torch_error, dtype=LONG)) + own + sum_bound(terms)


def sum_bound(terms: NDArray[Any]) -> NDArray[Any]:
    """What a float64 sum over the last axis may be off by: a rounding per addition, in a random walk with five deviations."""
    n = terms.shape[-1]
    return EPS64 * (2 + 5 * np.sqrt(n / 12)) * np.abs(terms).sum(-1)


def stored_sum_bound(terms: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """What a sum over the first axis may be off by when it is kept in float64 and rounded once to `dtype`: always, not just likely."""
    total = np.abs(terms.sum(0))
    tiny = float(torch.finfo(dtype).smallest_normal) * eps(dtype)
    return eps(dtype) / 2 * (1 + 1e-6) * total + EPS64 * (terms.shape[0] + 2) * np.abs(terms).sum(0) + tiny
