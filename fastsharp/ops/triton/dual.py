"""The Triton column of the dual ops: grids, blocks, workspaces. Called as `fastsharp.ops.reference.dual` is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsharp.ops.reference.dual import Norm, Parameters, Second
from fastsharp.ops.triton import activation_kernels, krylov, norm_kernels, product_kernels, softmax_kernels
from fastsharp.ops.triton import rows as row_kernels

Pair = tuple[Tensor, Tensor]

LARGEST_BLOCK = 1024  # columns of a row that a program holds at once
STRIP = 512  # columns of a program that goes down the rows
ROWS_OF_A_SHARE = 16  # at least
SHARES = 512  # at most


def activation_prepare(kind: str, parameters: Parameters, x: Tensor, bias: Tensor | None, d1: Tensor, d2: Tensor | None) -> None:
    """d1 = f'(x + bias), d2 = f''(x + bias)."""
    rows, n = x.shape
    p0, p1, p2 = parameters
    krylov.launch(
        activation_kernels.activation_prepare, rows * krylov.ceil(n, STRIP), x.device,
        x, x.stride(0), bias, d1, d1.stride(0), d2, *_strides(d2, 1), rows, n,
        KIND=kind, P0=p0, P1=p1, P2=p2, BLOCK=STRIP,
    )  # fmt: skip


def activation_tangent(d1: Tensor, x_t: Tensor, bias_t: Tensor | None, out: Tensor) -> None:
    """out = d1 (x_t + bias_t)."""
    b, rows, n = x_t.shape
    krylov.launch(
        activation_kernels.activation_tangent, b * rows * krylov.ceil(n, STRIP), d1.device,
        d1, d1.stride(0), x_t, *_strides(x_t, 2), bias_t, *_strides(bias_t, 1), out, *_strides(out, 2), b, rows, n, BLOCK=STRIP,
    )  # fmt: skip


def activation_adjoint(d1: Tensor, y_gt: Tensor, q: Tensor | None, a_t: Tensor | None, out: Tensor, bias_gt: Tensor | None) -> None:
    """out = d1 y_gt + q a_t; bias_gt += the sum of out over rows."""
    b, rows, n = y_gt.shape
    shares = rows if bias_gt is None else _shares(rows)
    partial = None if bias_gt is None else _partial(d1, shares, b, n)
    krylov.launch(
        activation_kernels.activation_adjoint, b * shares * krylov.ceil(n, STRIP), d1.device,
        d1, d1.stride(0), y_gt, *_strides(y_gt, 2), q, *_strides(q, 1), a_t, *_strides(a_t, 2), out, *_strides(out, 2),
        partial, b, rows, n, krylov.ceil(rows, shares), BLOCK=STRIP,
    )  # fmt: skip
    if partial is not None and bias_gt is not None:
        _add(partial, bias_gt)


def norm_prepare(x: Tensor, eps: float, center: bool, stats: Tensor) -> None:
    """stats = (mean, 1 / sqrt(var + eps)) of each row; without center the mean is zero."""
    rows, n = x.shape
    krylov.launch(norm_kernels.norm_prepare, rows, x.device, x, x.stride(0), stats, n, EPS=eps, CENTER=center, BLOCK=_block(n))


def norm_tangent(f: Norm, x_t: Tensor | None, w_t: Tensor | None, bias_t: Tensor | None, out: Tensor | None, sums: Tensor) -> None:
    """out = w h_t + w_t h + bias_t; sums = (mean(x_t), mean(h x_t))."""
    (rows, n), b = f.x.shape, sums.shape[0]
    krylov.launch(
        norm_kernels.norm_tangent, b * rows, f.x.device,
        f.x, f.x.stride(0), f.w, f.stats, x_t, *_strides(x_t, 2), w_t, *_strides(w_t, 1), bias_t, *_strides(bias_t, 1),
        out, *_strides(out, 2), sums, b, rows, n, CENTER=f.center, BLOCK=_block(n),
    )  # fmt: skip


def norm_adjoint(
    f: Norm,
    y_gt: Tensor | None,
    second: Second | None,
    out: Tensor | None,
    sums: Tensor | None,
    w_gt: Tensor | None,
    bias_gt: Tensor | None,
) -> None:
    """The tangent of the adjoint, its sums, and the gradients of weight and bias, which are added to."""
    rows, n = f.x.shape
    y_g, g_sums, x_t, x_sums, w_t = (None,) * 5 if second is None else second
    like = x_sums if y_gt is None else y_gt
    assert like is not None
    b = like.shape[0]
    if w_gt is not None or bias_gt is not None:  # first: out may take the place of y_gt or x_t
        shares = _shares(rows)
        partial = _partial(f.x, shares, b, 2, n)
        krylov.launch(
            norm_kernels.norm_gradients, b * shares * krylov.ceil(n, STRIP), f.x.device,
            f.x, f.x.stride(0), f.stats, y_gt, *_strides(y_gt, 2), y_g, *_strides(y_g, 1), x_t, *_strides(x_t, 2), x_sums,
            partial, b, rows, n, krylov.ceil(rows, shares), BLOCK=STRIP,
        )  # fmt: skip
        for i, target in enumerate((w_gt, bias_gt)):
            if target is not None:
                _add(partial[:, :, i], target)
    krylov.launch(
        norm_kernels.norm_adjoint, b * rows, f.x.device,
        f.x, f.x.stride(0), f.w, f.stats, y_gt, *_strides(y_gt, 2), y_g, *_strides(y_g, 1), g_sums,
        x_t, *_strides(x_t, 2), x_sums, w_t, *_strides(w_t, 1), out, *_strides(out, 2), sums, b, rows, n,
        CENTER=f.center, BLOCK=_block(n),
    )  # fmt: skip


def softmax_gradient(z: Tensor, target: Tensor | None, weight: Tensor | None, smoothing: float, p: Tensor | None, g: Tensor | None) -> None:
    """p = softmax(z); g = weight (p - (1 - smoothing) e_target - smoothing / columns); rows of weight zero are zero."""
    rows, n = z.shape
    krylov.launch(
        softmax_kernels.softmax_gradient, rows, z.device,
        z, z.stride(0), target, weight, p, *_strides(p, 1), g, *_strides(g, 1), n, SMOOTHING=smoothing, BLOCK=_block(n),
    )  # fmt: skip


def softmax_product(p: Tensor, weight: Tensor | None, u: Tensor, out: Tensor) -> None:
    """out = weight (p u - p (p'u)); rows of weight zero are zero."""
    b, rows, n = u.shape
    krylov.launch(
        softmax_kernels.softmax_product, b * rows, p.device,
        p, p.stride(0), weight, u, *_strides(u, 2), out, *_strides(out, 2), b, n, BLOCK=_block(n),
    )  # fmt: skip


def paired(out: Tensor | None, first: Pair, second: Pair, b: int, alpha: float) -> Tensor:
    """out_k += alpha (A_k B_k + C_k D_k); float32 in its own precision, whatever torch allows itself."""
    (m, inner), n = first[0].shape[-2:], first[1].shape[-1]
    place = first[0].new_empty(b, m, n) if out is None or out.stride(-1) != 1 else out
    if out is not None and place is not out:
        place.copy_(out)
    factors: list[Tensor | int] = []
    turned = {}
    for name, t in zip("ABCD", (*first, *second), strict=True):
        if 1 not in t.stride()[-2:]:
            t = t.contiguous()
        across = t.stride(-1) != 1
        factors += [t, 0 if t.dim() == 2 else t.stride(0), t.stride(-1) if across else t.stride(-2)]
        turned[f"{name}_TURNED"] = across
    tile = {"BM": 64, "BN": 64, "BK": 32}
    krylov.launch(
        product_kernels.paired, b * krylov.ceil(m, tile["BM"]) * krylov.ceil(n, tile["BN"]), place.device,
        *factors, place, place.stride(0), place.stride(1), b, m, n, inner, ALPHA=alpha, ADD=out is not None, PRECISION="ieee", **turned, **tile,
    )  # fmt: skip
    return place if out is None or place is out else out.copy_(place)


def _add(partial: Tensor, out: Tensor) -> None:
    """out += the sum of partial (shares, b, columns) over shares, in a launch of its own, since programs of one launch have no order."""
    shares, b, n = partial.shape
    krylov.launch(
        row_kernels.add_partials, b * krylov.ceil(n, STRIP), out.device,
        partial, partial.stride(1), out, out.stride(0), b, n, shares, BLOCK=STRIP,
    )  # fmt: skip


def _partial(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def _shares(rows: int) -> int:
    return min(krylov.ceil(rows, ROWS_OF_A_SHARE), SHARES)


def _block(n: int) -> int:
    return min(krylov.power_of_two(n), LARGEST_BLOCK)


def _strides(t: Tensor | None, count: int) -> Sequence[int]:
    return (0,) * count if t is None else t.stride()[:count]
