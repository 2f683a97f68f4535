"""Inputs and checker of sums of two products, shared by the tests and the benchmark; the oracle is numpy in extended precision."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsharp.ops.dual_linear import Factors, dual_linear
from tests.tolerance import assert_close, eps, exact

Sum = tuple[Tensor | None, Factors, Factors]  # out, (A, B), (C, D)


def sums(b: int, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> dict[str, Sum]:
    """A linear layer's tangent, the adjoint of x and, added to a part of something wider, that of W; and a sum of nothing contiguous."""
    g = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).to(device)

    x, W, y_g = normal(rows, inputs), normal(outputs, inputs), normal(rows, outputs)
    x_t, W_t, y_gt = normal(b, rows, inputs), normal(b, outputs, inputs), normal(b, rows, outputs)
    place = normal(b, outputs * inputs + 5)[:, 3:-2].view(b, outputs, inputs)
    return {
        "tangent": (None, (x, W_t.mT), (x_t, W.t())),
        "adjoint of x": (None, (y_gt, W), (y_g, W_t)),
        "adjoint of W": (place, (y_gt.mT, x), (y_g.t(), x_t)),
        "strided": (normal(b, inputs, rows).mT, (y_gt, W), (normal(rows, 2 * outputs)[:, ::2], W_t)),
    }


def check_sums(b: int, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, alpha: float = 1.0) -> None:
    """Off by a rounding for each of the 2k + 2 terms at most, and in half precision by one of the result for each of two calls."""
    for name, (out, first, second) in sums(b, rows, inputs, outputs, dtype, device).items():
        want = terms = 0
        if out is not None:
            want, terms = exact(out), abs(exact(out))
        for A, B in (first, second):
            want = want + alpha * (exact(A) @ exact(B))
            terms = terms + abs(alpha) * (abs(exact(A)) @ abs(exact(B)))
        got = dual_linear(out, first, second, alpha)
        assert got is not None and (out is None or got is out)
        inner = dtype if dtype == torch.float64 else torch.float32
        roundings = (2 * first[0].shape[-1] + 2) * eps(inner) + (0.0 if dtype == inner else 2 * eps(dtype))
        assert_close(got, want, roundings * terms + 1e-30, name)
