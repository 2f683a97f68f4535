"""Sums of two products of matrices for b vectors: the tangent of a linear layer and its two adjoints.

With y = x W',
    y_t = x W_t' + x_t W'        x_gt = y_gt W + y_g W_t        W_gt += y_gt' x + y_g' x_t
are one sum each, out_k += A_k B_k + C_k D_k, in which a matrix of the primal pass is the same for every k. Torch computes it by two calls,
the second accumulating on the first. The Triton kernel computes it by one, a product of doubled inner length, [A C] [B; D]: `out` is
written once and rounded once.

Which of the two runs: the kernel under `force("triton")`, and on a GPU where a row of FASTER says so; elsewhere torch. A row is added
where bench/bench_dual.py measured the kernel at least 1.1 times as fast as torch on that GPU, in all three products, from its sizes on.
There is none yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsharp.ops import _registry

Factors = tuple[Tensor, Tensor]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Measured(NamedTuple):
    """On this GPU the kernel is faster for out (m, n) and inner length k, where all three are at least as large."""

    capability: tuple[int, int]
    dtype: torch.dtype
    m: int
    n: int
    k: int


FASTER: tuple[Measured, ...] = ()


def dual_linear(out: Tensor | None, first: Factors | None, second: Factors | None, alpha: float = 1.0) -> Tensor | None:
    """out_k += alpha (A_k B_k + C_k D_k) for first = (A, B), second = (C, D); a pair that is None, and `out` None, are zero.

    A, C    (b, m, k) or (m, k), B, D (b, k, n) or (k, n): without b the same for all; at least one has it
    out     (b, m, n), the result itself where it is given; must overlap no factor
    cost    4 b m n k operations
    """
    b = max((len(t) for pair in (first, second) if pair is not None for t in pair if t.dim() > 2), default=0)
    kernel = None if first is None or second is None else paired_kernel(*first)
    if kernel is not None and first is not None and second is not None:
        return kernel(out, first, second, b, alpha)
    for pair in (first, second):
        if pair is not None:
            out = gather(out, *pair, b, alpha)
    return out


def paired_kernel(left: Tensor, right: Tensor) -> _registry.Paired | None:
    """The kernel for products of these sizes, or None where torch's two calls are the choice."""
    if left.dtype not in KERNEL_DTYPES:
        return None
    backend = _registry.choose(left.device)
    if backend.paired is not None:
        return backend.paired
    if not left.is_cuda or not FASTER or not listed(torch.cuda.get_device_capability(left.device), left, right):
        return None
    triton = _registry.available()["triton"]
    return triton.paired if isinstance(triton, _registry.Backend) else None


def listed(capability: tuple[int, int], left: Tensor, right: Tensor) -> bool:
    """True where a row of FASTER holds for this GPU and these factors."""
    (m, k), n = left.shape[-2:], right.shape[-1]
    return any(f[:2] == (capability, left.dtype) and m >= f.m and n >= f.n and k >= f.k for f in FASTER)


def gather(out: Tensor | None, left: Tensor, right: Tensor, b: int, alpha: float = 1.0) -> Tensor:
    """out += alpha left right for b matrices, or stacks of matrices; an operand without the leading b is the same for all of them.

    `out` None is zero. The result is `out` itself where it is given.
    """
    dims = max(2, min(left.dim(), right.dim()))
    left, right = (t if t.dim() > dims else t.expand(b, *t.shape) for t in (left, right))
    if out is None and alpha == 1.0 and dims == 2 and right.stride(0) == 0 and left.is_contiguous():
        return torch.mm(left.flatten(0, 1), right[0]).view(b, left.shape[1], right.shape[2])
    beta = 1.0
    if out is None:
        out, beta = left.new_empty(*left.shape[:-1], right.shape[-1]), 0.0
    if dims == 2 and b > 1:
        return out.baddbmm_(left, right, beta=beta, alpha=alpha)
    for o, a, c in zip(out, left, right, strict=True):
        if dims == 2:
            o.addmm_(a, c, beta=beta, alpha=alpha)
        else:
            o.baddbmm_(a, c, beta=beta, alpha=alpha)
    return out
