"""A sum of two products of matrices as one Triton program, a product of doubled inner length; see `ops.dual_linear`.

A factor has a stride between vectors (0: the same for all) and one inside: rows that far apart, or columns where it is `TURNED`.
"""

import triton
import triton.language as tl


@triton.jit
def _place(row, column, stride, TURNED: tl.constexpr):
    """Offsets of (row, column), contiguous along the columns, or along the rows where the matrix is turned."""
    if TURNED:
        return row + column * stride
    else:
        return row * stride + column


@triton.jit
def _gathered(
    acc, left, left_stride, right, right_stride, i, j, m, n, inner,
    LEFT_TURNED: tl.constexpr, RIGHT_TURNED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc + left right on the rows i and columns j."""
    for start in range(0, inner, BK):
        at = start + tl.arange(0, BK)
        a = tl.load(
            left + _place(i[:, None], at[None, :], left_stride, LEFT_TURNED), mask=(i[:, None] < m) & (at[None, :] < inner), other=0
        )
        c = tl.load(
            right + _place(at[:, None], j[None, :], right_stride, RIGHT_TURNED), mask=(at[:, None] < inner) & (j[None, :] < n), other=0
        )
        acc = tl.dot(a, c, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["b"])
def paired(
    A, A_vector: tl.int64, A_stride: tl.int64, B, B_vector: tl.int64, B_stride: tl.int64,
    C, C_vector: tl.int64, C_stride: tl.int64, D, D_vector: tl.int64, D_stride: tl.int64,
    out, out_vector: tl.int64, out_row: tl.int64, b: tl.int64, m: tl.int64, n: tl.int64, inner: tl.int64,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, C_TURNED: tl.constexpr, D_TURNED: tl.constexpr,
    ALPHA: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out <- alpha (A B + C D), added to out if ADD, on one tile of one vector; sums in float32, rounded once."""
    program = tl.program_id(0).to(tl.int64)
    v, tile = program % b, program // b
    rows = tl.cdiv(m, BM)
    i = tile % rows * BM + tl.arange(0, BM)
    j = tile // rows * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    A += v * A_vector
    B += v * B_vector
    C += v * C_vector
    D += v * D_vector
    acc = _gathered(acc, A, A_stride, B, B_stride, i, j, m, n, inner, A_TURNED, B_TURNED, PRECISION, BK)
    acc = _gathered(acc, C, C_stride, D, D_stride, i, j, m, n, inner, C_TURNED, D_TURNED, PRECISION, BK)
    acc *= ALPHA
    inside = (i[:, None] < m) & (j[None, :] < n)
    to = out + v * out_vector + i[:, None] * out_row + j[None, :]
    if ADD:
        acc += tl.load(to, mask=inside, other=0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
