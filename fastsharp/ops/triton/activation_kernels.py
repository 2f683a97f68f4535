"""Activations as Triton programs; the mathematics is that of `ops.dual`."""

import triton
import triton.language as tl

from fastsharp.ops.triton.rows import strip_of, wide


@triton.jit
def _logistic(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _derivatives(a, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """(f', f'') of float64 a. Constants join by arithmetic: between two of them `where` would choose in float32."""
    zero = tl.zeros_like(a)
    if KIND == "relu":
        first = tl.where(a > 0, zero + 1, zero + P0) + (a - a)
        second = zero
    elif KIND == "gelu":
        density = tl.exp(-0.5 * a * a) * 0.39894228040143267794
        first = 0.5 * (1 + tl.erf(a * 0.70710678118654752440)) + a * density
        second = density * (2 - a * a)
    elif KIND == "gelu_tanh":
        u1 = 0.79788456080286535588 * (1 + 3 * 0.044715 * a * a)
        v = 2 * 0.79788456080286535588 * (a + 0.044715 * a * a * a)
        steep = 4 * _logistic(v) * _logistic(-v)
        t1 = steep * u1
        t2 = steep * (6 * 0.79788456080286535588 * 0.044715 * a - 2 * (_logistic(v) - _logistic(-v)) * u1 * u1)
        first = _logistic(v) + 0.5 * a * t1
        second = t1 + 0.5 * a * t2
    elif KIND == "silu":
        s = _logistic(a)
        s1 = s * _logistic(-a)
        first = s + a * s1
        second = s1 * (2 + a * (1 - 2 * s))
    elif KIND == "tanh":
        first = 4 * _logistic(2 * a) * _logistic(-2 * a)
        second = -2 * (_logistic(2 * a) - _logistic(-2 * a)) * first
    elif KIND == "sigmoid":
        s = _logistic(a)
        first = s * _logistic(-a)
        second = first * (1 - 2 * s)
    elif KIND == "softplus":
        s = _logistic(P0 * a)
        first = tl.where(P0 * a > P1, zero + 1, s)
        second = tl.where(P0 * a > P1, zero, P0 * s * _logistic(-P0 * a))
    else:
        tl.static_assert(KIND == "elu")
        e = (zero + P0) * P1 * P2 * tl.exp(P2 * tl.where(a > 0, zero, a))
        first = tl.where(a > 0, zero + P1, e)
        second = tl.where(a > 0, zero, P2 * e)
    return first, second


@triton.jit
def activation_prepare(
    x, x_row: tl.int64, bias, d1, d1_row: tl.int64, d2, d2_row: tl.int64, rows: tl.int64, n: tl.int64,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d1 = f'(x + bias), d2 = f''(x + bias) on a strip of one row."""
    _, r, _, _, at = strip_of(1, n, 1, rows, BLOCK)
    first, second = _derivatives(wide(x, r * x_row + at, at < n, 0.0) + wide(bias, at, at < n, 0.0), KIND, P0, P1, P2)
    tl.store(d1 + r * d1_row + at, first.to(d1.dtype.element_ty), mask=at < n)
    if d2 is not None:
        tl.store(d2 + r * d2_row + at, second.to(d2.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["b"])
def activation_tangent(
    d1, d1_row: tl.int64, x_t, x_t_vector: tl.int64, x_t_row: tl.int64, bias_t, bias_t_vector: tl.int64,
    out, out_vector: tl.int64, out_row: tl.int64, b: tl.int64, rows: tl.int64, n: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = d1 (x_t + bias_t) on a strip of one row and vector."""
    k, r, _, _, at = strip_of(b, n, 1, rows, BLOCK)
    a_t = tl.load(x_t + k * x_t_vector + r * x_t_row + at, mask=at < n, other=0)
    if bias_t is not None:
        a_t += tl.load(bias_t + k * bias_t_vector + at, mask=at < n, other=0)
    d = tl.load(d1 + r * d1_row + at, mask=at < n, other=0)
    tl.store(out + k * out_vector + r * out_row + at, d * a_t, mask=at < n)


@triton.jit(do_not_specialize=["b", "each"])
def activation_adjoint(
    d1, d1_row: tl.int64, y_gt, y_gt_vector: tl.int64, y_gt_row: tl.int64, q, q_row: tl.int64, a_t, a_t_vector: tl.int64, a_t_row: tl.int64,
    out, out_vector: tl.int64, out_row: tl.int64, partial, b: tl.int64, rows: tl.int64, n: tl.int64, each: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = d1 y_gt + q a_t on a strip of a share's rows, and its sum over them."""
    k, share, first, end, at = strip_of(b, n, each, rows, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for r in range(first, end):
        g = tl.load(d1 + r * d1_row + at, mask=at < n, other=0)
        g *= tl.load(y_gt + k * y_gt_vector + r * y_gt_row + at, mask=at < n, other=0)
        if q is not None:
            c = tl.load(q + r * q_row + at, mask=at < n, other=0)
            g += c * tl.load(a_t + k * a_t_vector + r * a_t_row + at, mask=at < n, other=0)
        tl.store(out + k * out_vector + r * out_row + at, g, mask=at < n)
        total += g.to(tl.float64)
    if partial is not None:
        tl.store(partial + (share * b + k) * n + at, total, mask=at < n)
