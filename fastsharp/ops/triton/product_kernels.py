"""A sum of two products of matrices as one Triton program, a product of doubled inner length; see `ops.dual_linear`."""

import triton
import triton.language as tl


@triton.jit
def _gathered(acc, left, left_row, left_column, right, right_row, right_column, i, j, m, n, k, PRECISION: tl.constexpr, BK: tl.constexpr):
    """acc + left right on the rows i and columns j."""
    for start in range(0, k, BK):
        at = start + tl.arange(0, BK).to(tl.int64)
        a = tl.load(left + i[:, None] * left_row + at[None, :] * left_column, mask=(i[:, None] < m) & (at[None, :] < k), other=0)
        c = tl.load(right + at[:, None] * right_row + j[None, :] * right_column, mask=(at[:, None] < k) & (j[None, :] < n), other=0)
        acc = tl.dot(a, c, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["b"])
def paired(
    A, A_vector: tl.int64, A_row: tl.int64, A_column: tl.int64, B, B_vector: tl.int64, B_row: tl.int64, B_column: tl.int64,
    C, C_vector: tl.int64, C_row: tl.int64, C_column: tl.int64, D, D_vector: tl.int64, D_row: tl.int64, D_column: tl.int64,
    out, out_vector: tl.int64, out_row: tl.int64, out_column: tl.int64, b: tl.int64, m: tl.int64, n: tl.int64, k: tl.int64,
    ALPHA: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out <- alpha (A B + C D), added to out if ADD, on one tile of one vector; sums in float32, rounded once."""
    program = tl.program_id(0).to(tl.int64)
    v, tile = program % b, program // b
    rows = tl.cdiv(m, BM)
    i = tile % rows * BM + tl.arange(0, BM)
    j = tile // rows * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = _gathered(acc, A + v * A_vector, A_row, A_column, B + v * B_vector, B_row, B_column, i, j, m, n, k, PRECISION, BK)
    acc = _gathered(acc, C + v * C_vector, C_row, C_column, D + v * D_vector, D_row, D_column, i, j, m, n, k, PRECISION, BK)
    acc *= ALPHA
    inside = (i[:, None] < m) & (j[None, :] < n)
    to = out + v * out_vector + i[:, None] * out_row + j[None, :] * out_column
    if ADD:
        acc += tl.load(to, mask=inside, other=0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
