"""What the dual ops' Triton programs share: one program a row and vector, or a strip of columns and a share of the rows.

Note on numerical properties: everything is float64 between loads and stores and rounded once, but for the products of an activation's
tangents, in the dtype of the tensors. Sums over rows: within a share in order, shares in a launch of their own; both cuts are functions
of rows and columns. No atomics, no autotuning.
Vectors are the fastest index, so that programs of the same primal row run side by side and find it in the cache; offsets are int64.
"""

import triton
import triton.language as tl


@triton.jit
def wide(p, at, inside, missing):
    """float64 values of p, or `missing` where p is None."""
    if p is None:
        return tl.full(at.shape, missing, tl.float64)
    else:
        return tl.load(p + at, mask=inside, other=0).to(tl.float64)


@triton.jit
def moved(p, offset):
    """p moved on, where there is one."""
    if p is None:
        return None
    else:
        return p + offset


@triton.jit
def whole(x):
    """The sum over a row's lanes, as a block of one."""
    return tl.sum(x, axis=0, keep_dims=True)


@triton.jit
def row_of(b):
    """(vector, row) of this program."""
    program = tl.program_id(0).to(tl.int64)
    return program % b, program // b


@triton.jit
def strip_of(b, n, each, rows, BLOCK: tl.constexpr):
    """(vector, share, first row, one past the last, columns) of this program."""
    program = tl.program_id(0).to(tl.int64)
    strips = tl.cdiv(n, BLOCK)
    share = program // b // strips
    at = program // b % strips * BLOCK + tl.arange(0, BLOCK)
    first = share * each
    return program % b, share, first, tl.minimum(first + each, rows), at


@triton.jit(do_not_specialize=["b", "shares"])
def add_partials(partial, width: tl.int64, out, out_vector: tl.int64, b: tl.int64, n: tl.int64, shares: tl.int64, BLOCK: tl.constexpr):
    """out[vector, column] += the sum over shares, in order, of partial[share, vector, column]."""
    program = tl.program_id(0).to(tl.int64)
    k = program % b
    at = program // b * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for share in range(0, shares):
        total += tl.load(partial + (share * b + k) * width + at, mask=at < n, other=0)
    to = out + k * out_vector + at
    tl.store(to, (tl.load(to, mask=at < n, other=0).to(tl.float64) + total).to(out.dtype.element_ty), mask=at < n)
