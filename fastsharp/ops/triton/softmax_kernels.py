"""Softmax and cross-entropy as Triton programs: a row is swept twice, whatever the number of classes."""

import triton
import triton.language as tl

from fastsharp.ops.triton.rows import row_of, whole, wide


@triton.jit
def _share_of(x, m):
    """e^(x - m); zero for x = -inf whatever m is, since m is -inf where nothing larger was seen."""
    return tl.where(x == -float("inf"), 0.0, tl.exp(x - m))


@triton.jit
def softmax_gradient(
    z, z_row: tl.int64, target, weight, p, p_row: tl.int64, g, g_row: tl.int64, n: tl.int64,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p = softmax(z) and g = weight (p - (1 - smoothing) e_target - smoothing / n) of one row; maximum and sum in one sweep."""
    r = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    w = wide(weight, r + one, one < 1, 1.0)
    live = w != 0
    z += r * z_row
    m = tl.full([1], -float("inf"), tl.float64)
    s = tl.zeros([1], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=(at < n) & live, other=-float("inf")).to(tl.float64)
        top = tl.maximum(m, tl.max(x, axis=0, keep_dims=True))
        s = s * _share_of(m, top) + whole(_share_of(x, top))
        m = top
    s = tl.where(live, s, 1.0)
    smoothing = tl.full([1], SMOOTHING, tl.float64)
    if g is not None:
        hit = tl.load(target + r + one, mask=live, other=-1)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = _share_of(tl.load(z + at, mask=(at < n) & live, other=-float("inf")).to(tl.float64), m) / s
        if p is not None:
            tl.store(p + r * p_row + at, y.to(p.dtype.element_ty), mask=at < n)
        if g is not None:
            d = y - smoothing / n - tl.where(at == hit, 1 - smoothing, 0 * smoothing)
            tl.store(g + r * g_row + at, tl.where(live, w * d, 0.0).to(g.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["b"])
def softmax_product(
    p, p_row: tl.int64, weight, u, u_vector: tl.int64, u_row: tl.int64, out, out_vector: tl.int64, out_row: tl.int64,
    b: tl.int64, n: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = weight (p u - p (p'u)) of one row and vector."""
    k, r = row_of(b)
    one = tl.arange(0, 1)
    w = wide(weight, r + one, one < 1, 1.0)
    live = w != 0
    p += r * p_row
    u += k * u_vector + r * u_row
    along = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        along += wide(p, at, (at < n) & live, 0.0) * wide(u, at, (at < n) & live, 0.0)
    total = whole(along)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = w * wide(p, at, (at < n) & live, 0.0) * (wide(u, at, (at < n) & live, 0.0) - total)
        tl.store(out + k * out_vector + r * out_row + at, y.to(out.dtype.element_ty), mask=at < n)
