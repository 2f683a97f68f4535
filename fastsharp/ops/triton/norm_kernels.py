"""Layer and RMS norm as Triton programs; the mathematics is that of `ops.dual`."""

import triton
import triton.language as tl

from fastsharp.ops.triton.rows import moved, row_of, strip_of, whole, wide


@triton.jit
def norm_prepare(x, x_row: tl.int64, stats, n: tl.int64, EPS: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """stats = (mean, 1 / sqrt(var + eps)) of one row."""
    r = tl.program_id(0).to(tl.int64)
    x += r * x_row
    mean = tl.zeros([1], tl.float64)
    if CENTER:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x + at, mask=at < n, other=0).to(tl.float64)
        mean = whole(total) / n
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        d = tl.where(at < n, tl.load(x + at, mask=at < n, other=0).to(tl.float64) - mean, 0)
        squares += d * d
    one = tl.arange(0, 1)
    tl.store(stats + 2 * r + one, mean)
    tl.store(stats + 2 * r + 1 + one, 1 / tl.sqrt(whole(squares) / n + EPS))


@triton.jit(do_not_specialize=["b"])
def norm_tangent(
    x, x_row: tl.int64, w, stats, x_t, x_t_vector: tl.int64, x_t_row: tl.int64, w_t, w_t_vector: tl.int64,
    bias_t, bias_t_vector: tl.int64, out, out_vector: tl.int64, out_row: tl.int64, sums, b: tl.int64, rows: tl.int64, n: tl.int64,
    CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = w h_t + w_t h + bias_t and sums = (mean(x_t), mean(h x_t)) of one row and vector."""
    k, r = row_of(b)
    one = tl.arange(0, 1)
    x += r * x_row
    x_t = moved(x_t, k * x_t_vector + r * x_t_row)
    w_t = moved(w_t, k * w_t_vector)
    bias_t = moved(bias_t, k * bias_t_vector)
    middle = tl.load(stats + 2 * r + one)
    rstd = tl.load(stats + 2 * r + 1 + one)
    s0 = tl.zeros([BLOCK], tl.float64)
    s1 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        t = tl.where(at < n, wide(x_t, at, at < n, 0.0), 0)
        s0 += t
        s1 += (wide(x, at, at < n, 0.0) - middle) * rstd * t
    mean = whole(s0) / n if CENTER else tl.zeros([1], tl.float64)
    along = whole(s1) / n
    sums += 2 * (k * rows + r)
    tl.store(sums + one, mean)
    tl.store(sums + 1 + one, along)
    if out is not None:
        out += k * out_vector + r * out_row
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            h = (wide(x, at, at < n, 0.0) - middle) * rstd
            h_t = (wide(x_t, at, at < n, 0.0) - mean - h * along) * rstd
            y = h_t * wide(w, at, at < n, 1.0) + wide(w_t, at, at < n, 0.0) * h + wide(bias_t, at, at < n, 0.0)
            tl.store(out + at, y.to(out.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["b"])
def norm_adjoint(
    x, x_row: tl.int64, w, stats, y_gt, y_gt_vector: tl.int64, y_gt_row: tl.int64,
    y_g, y_g_row: tl.int64, g_sums, x_t, x_t_vector: tl.int64, x_t_row: tl.int64, x_sums, w_t, w_t_vector: tl.int64,
    out, out_vector: tl.int64, out_row: tl.int64, sums, b: tl.int64, rows: tl.int64, n: tl.int64,
    CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the tangent of the adjoint and sums = (mean(g_t), mean(h g_t)) of one row and vector."""
    k, r = row_of(b)
    one = tl.arange(0, 1)
    pair = 2 * (k * rows + r)
    x += r * x_row
    y_gt = moved(y_gt, k * y_gt_vector + r * y_gt_row)
    y_g = moved(y_g, r * y_g_row)
    x_t = moved(x_t, k * x_t_vector + r * x_t_row)
    w_t = moved(w_t, k * w_t_vector)
    middle = tl.load(stats + 2 * r + one)
    rstd = tl.load(stats + 2 * r + 1 + one)
    if y_g is not None:
        x_mean = tl.load(x_sums + pair + one)
        x_along = tl.load(x_sums + pair + 1 + one)
        g_mean = tl.load(g_sums + 2 * r + one)
        g_along = tl.load(g_sums + 2 * r + 1 + one)
    s0 = tl.zeros([BLOCK], tl.float64)
    s1 = tl.zeros([BLOCK], tl.float64)
    s2 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = (wide(x, at, at < n, 0.0) - middle) * rstd
        weight = wide(w, at, at < n, 1.0)
        g_t = weight * wide(y_gt, at, at < n, 0.0)
        if y_g is not None:
            g = wide(y_g, at, at < n, 0.0)
            g_t += wide(w_t, at, at < n, 0.0) * g
            s2 += weight * g * (wide(x_t, at, at < n, 0.0) - x_mean - h * x_along) * rstd
        s0 += g_t
        s1 += h * g_t
    mean = whole(s0) / n if CENTER else tl.zeros([1], tl.float64)
    along = whole(s1) / n
    cross = whole(s2) / n
    if sums is not None:
        tl.store(sums + pair + one, mean)
        tl.store(sums + pair + 1 + one, along)
    if out is not None:
        out += k * out_vector + r * out_row
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            h = (wide(x, at, at < n, 0.0) - middle) * rstd
            weight = wide(w, at, at < n, 1.0)
            g_t = weight * wide(y_gt, at, at < n, 0.0)
            if y_g is not None:
                g = wide(y_g, at, at < n, 0.0)
                g_t += wide(w_t, at, at < n, 0.0) * g
                h_t = (wide(x_t, at, at < n, 0.0) - x_mean - h * x_along) * rstd
                g_t -= h * cross + h_t * g_along + (weight * g - g_mean - h * g_along) * (rstd * x_along)
            tl.store(out + at, ((g_t - mean - h * along) * rstd).to(out.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["b", "each"])
def norm_gradients(
    x, x_row: tl.int64, stats, y_gt, y_gt_vector: tl.int64, y_gt_row: tl.int64,
    y_g, y_g_row: tl.int64, x_t, x_t_vector: tl.int64, x_t_row: tl.int64, x_sums,
    partial, b: tl.int64, rows: tl.int64, n: tl.int64, each: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[share, vector, :, column] = the sums over the share's rows of y_gt h + y_g h_t, and of y_gt."""
    k, share, first, end, at = strip_of(b, n, each, rows, BLOCK)
    w_sum = tl.zeros([BLOCK], tl.float64)
    bias_sum = tl.zeros([BLOCK], tl.float64)
    one = tl.arange(0, 1)
    for r in range(first, end):
        rstd = tl.load(stats + 2 * r + 1 + one)
        h = (wide(x, r * x_row + at, at < n, 0.0) - tl.load(stats + 2 * r + one)) * rstd
        y_t = wide(y_gt, k * y_gt_vector + r * y_gt_row + at, at < n, 0.0)
        bias_sum += y_t
        w_sum += y_t * h
        if y_g is not None:
            pair = x_sums + 2 * (k * rows + r) + one
            h_t = (wide(x_t, k * x_t_vector + r * x_t_row + at, at < n, 0.0) - tl.load(pair) - h * tl.load(pair + 1)) * rstd
            w_sum += wide(y_g, r * y_g_row + at, at < n, 0.0) * h_t
    partial += (share * b + k) * 2 * n
    tl.store(partial + at, w_sum, mask=at < n)
    tl.store(partial + n + at, bias_sum, mask=at < n)
