"""The tangent half of layers that memory limits: activations, layer and RMS norm, softmax with cross-entropy, for b vectors at once.

The primal pass is given: what depends on it alone (derivatives, row statistics, probabilities) is prepared once. Each product then
costs one pass forward (`tangent`) and one back (`adjoint`: the tangent of the adjoint), whatever b is: primal rows are read once and
meet all b vectors while they lie in cache.

Shapes. Primal matrices are (rows, columns), tangents (b, rows, columns), what belongs to columns (weights, biases) (columns,) and (b,
columns); the last dimension contiguous, the others with any stride that keeps rows apart. float32 or float64, one dtype and device a call.
`out` may be one of the tangents that are read, the very same tensor; otherwise nothing written may overlap what is read. None stands
for a tangent of zero, or for a result that is not wanted. Gradients of weights and biases are added to what is there.

Note on numerical properties. The kernels compute norms and softmax in float64 between load and store and round each result once;
activations take their products in the dtype of the tensors, as torch does. Sums over rows run in float64, in an order fixed by the
sizes: every result is bitwise repeatable, independent of the thread count on the CPU, and of b and the GPU on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from fastsharp.ops import _border, _registry
from fastsharp.ops import _dual_arguments as arguments
from fastsharp.ops.reference.dual import Norm as Norm
from fastsharp.ops.reference.dual import Second as Second


def fused(t: Tensor) -> bool:
    """True where these ops run as kernels of one pass on tensors like t: float32 or float64, not empty, on the CPU or on a GPU that has them."""
    if t.dtype not in _border.VECTOR_DTYPES or t.numel() == 0:
        return False
    return t.is_cpu or _registry.choose(t.device).name != "reference"


def activation_prepare(
    kind: str, x: Tensor, *, d1: Tensor, d2: Tensor | None = None, bias: Tensor | None = None, parameters: tuple[float, ...] = ()
) -> None:
    """d1 = f'(x + bias) and d2 = f''(x + bias).

    kind        relu (slope of the negative half, 0), gelu, gelu_tanh, silu, tanh, sigmoid, softplus (beta 1, threshold 20) or
                elu (alpha 1, scale 1, input scale 1); the numbers in brackets are `parameters` and their defaults
    x, d1, d2   (rows, columns); d2 may be left out where f is piecewise linear
    """
    curve = arguments.check_curve(kind, parameters)
    arguments.check_activation("activation_prepare", x, d1, d2, bias)
    _registry.choose(x.device).dual.activation_prepare(kind, curve, x, bias, d1, d2)
    _border.wrote(d1, d2)


def activation_tangent(d1: Tensor, x_t: Tensor, *, out: Tensor, bias_t: Tensor | None = None) -> Tensor:
    """out = d1 (x_t + bias_t): the tangent of the output.

    cost    reads rows columns (1 + b) elements, writes b rows columns; out may be x_t
    """
    op = "activation_tangent"
    arguments.check_stack(op, "d1", d1, "x_t", x_t)
    arguments.check_columns(op, "bias_t", bias_t, x_t)
    arguments.check_out(op, out, x_t, d1=d1, bias_t=bias_t)
    _registry.choose(d1.device).dual.activation_tangent(d1, x_t, bias_t, out)
    _border.wrote(out)
    return out


def activation_adjoint(
    d1: Tensor, y_gt: Tensor, *, out: Tensor, q: Tensor | None = None, a_t: Tensor | None = None, bias_gt: Tensor | None = None
) -> Tensor:
    """out = d1 y_gt + q a_t: the tangent of the adjoint; bias_gt += the sum of out over rows.

    q       f''(a) y_g (rows, columns), with a_t the tangent of a = x + bias; both None: J' y_gt alone
    cost    reads rows columns (2 + 2b) elements, writes b rows columns; out may be y_gt or a_t
    """
    op = "activation_adjoint"
    arguments.check_stack(op, "d1", d1, "y_gt", y_gt)
    arguments.check_second(op, q, a_t, y_gt)
    arguments.check_columns(op, "bias_gt", bias_gt, y_gt)
    arguments.check_out(op, out, y_gt, a_t, d1=d1, q=q, bias_gt=bias_gt)
    arguments.check_gradients(op, bias_gt=bias_gt, d1=d1, q=q, y_gt=y_gt, a_t=a_t)
    _registry.choose(d1.device).dual.activation_adjoint(d1, y_gt, q, a_t, out, bias_gt)
    _border.wrote(out, bias_gt)
    return out


def norm_prepare(x: Tensor, *, eps: float, center: bool, stats: Tensor) -> Tensor:
    """stats[r] = (m, 1 / sqrt(mean((x_r - m)^2) + eps)), m the mean of the row where `center` (layer norm), else zero (RMS norm).

    x       (rows, columns)
    stats   (rows, 2) float64, written and returned
    """
    arguments.check_rows("norm_prepare", "x", x)
    arguments.check_pairs("norm_prepare", "stats", stats, x.shape[:1], x)
    _registry.choose(x.device).dual.norm_prepare(x, eps, center, stats)
    _border.wrote(stats)
    return stats


def norm_tangent(
    f: Norm, x_t: Tensor | None, *, out: Tensor | None, sums: Tensor, w_t: Tensor | None = None, bias_t: Tensor | None = None
) -> None:
    """out = w h_t + w_t h + bias_t with h = (x - m) r and h_t = r (x_t - mean(x_t) - h mean(h x_t)).

    f       x (rows, columns), weight (columns,) or None, stats of `norm_prepare`, center
    sums    (b, rows, 2) float64: (mean(x_t), mean(h x_t)), which `norm_adjoint` reads; without center the first is zero
    cost    reads rows columns (1 + b) elements, writes b rows columns; out may be x_t
    """
    op = "norm_tangent"
    arguments.check_norm(op, f)
    arguments.check_tangents(op, f, sums, x_t=x_t, out=out)
    arguments.check_columns(op, "w_t", w_t, sums, f.x)
    arguments.check_columns(op, "bias_t", bias_t, sums, f.x)
    if out is not None:
        arguments.check_out(op, out, x_t, x=f.x, w=f.w, w_t=w_t, bias_t=bias_t)
    _registry.choose(f.x.device).dual.norm_tangent(f, x_t, w_t, bias_t, out, sums)
    _border.wrote(out, sums)


def norm_adjoint(
    f: Norm,
    y_gt: Tensor | None,
    *,
    out: Tensor | None,
    second: Second | None = None,
    sums: Tensor | None = None,
    w_gt: Tensor | None = None,
    bias_gt: Tensor | None = None,
) -> None:
    """The tangent of the adjoint: with P v = v - mean(v) - h mean(h v), g = w y_g, g_t = w y_gt + w_t y_g,

        out = r P g_t - r^2 mean(h x_t) P g - r (h_t mean(h g) + h mean(h_t g)),
        w_gt += sum over rows of y_gt h + y_g h_t,   bias_gt += sum over rows of y_gt.

    second  None: J' y_gt alone, r P (w y_gt). With y_g in place of y_gt that is the adjoint of the primal pass, whose `sums` are the
            g_sums of later calls
    sums    (b, rows, 2) float64, written: (mean(g_t), mean(h g_t)); None: not wanted
    cost    reads rows columns (2 + 2b) elements, writes b rows columns; out may be y_gt or second.x_t
    """
    op = "norm_adjoint"
    arguments.check_norm(op, f)
    like = arguments.check_norm_second(op, f, y_gt, second)
    arguments.check_tangents(op, f, like, y_gt=y_gt, out=out)
    if sums is not None:
        arguments.check_pairs(op, "sums", sums, like.shape[:2], f.x)
    x_t = None if second is None else second.x_t
    w_t = None if second is None else second.w_t
    arguments.check_columns(op, "w_gt", w_gt, like, f.x)
    arguments.check_columns(op, "bias_gt", bias_gt, like, f.x)
    y_g = None if second is None else second.y_g
    if out is not None:
        arguments.check_out(op, out, y_gt, x_t, x=f.x, y_g=y_g, w=f.w, w_t=w_t, w_gt=w_gt, bias_gt=bias_gt)
    arguments.check_gradients(op, w_gt=w_gt, bias_gt=bias_gt, x=f.x, y_g=y_g, y_gt=y_gt, x_t=x_t, w=f.w, w_t=w_t)
    _registry.choose(f.x.device).dual.norm_adjoint(f, y_gt, second, out, sums, w_gt, bias_gt)
    _border.wrote(out, sums, w_gt, bias_gt)


def softmax_gradient(
    z: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    p: Tensor | None = None,
    g: Tensor | None = None,
) -> None:
    """p = softmax(z) and g = weight (p - (1 - smoothing) e_target - smoothing / columns), the gradient of the weighted cross-entropy.

    z, p, g (rows, columns); p and g may each be left out, and either may be z
    target  (rows,) int64, in [0, columns) where the weight is not zero: it is not read elsewhere, and those rows of p and g are zero
    weight  (rows,) in the dtype of z; None: one
    """
    arguments.check_softmax("softmax_gradient", z, target, weight, p, g)
    _registry.choose(z.device).dual.softmax_gradient(z, target, weight, smoothing, p, g)
    _border.wrote(p, g)


def softmax_product(p: Tensor, u: Tensor, *, out: Tensor, weight: Tensor | None = None) -> Tensor:
    """out = weight (p u - p (p'u)): the Hessian of the weighted cross-entropy, or the Jacobian of softmax without weight.

    p       (rows, columns), rows of probabilities; u, out (b, rows, columns), out may be u
    weight  (rows,) in the dtype of p; None: one. A row of weight zero is zero, whatever u is
    cost    reads rows columns (1 + b) elements, writes b rows columns
    """
    op = "softmax_product"
    arguments.check_stack(op, "p", p, "u", u)
    arguments.check_row_weights(op, weight, p)
    arguments.check_out(op, out, u, p=p, weight=weight)
    _registry.choose(p.device).dual.softmax_product(p, weight, u, out)
    _border.wrote(out)
    return out
