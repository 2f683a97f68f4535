"""Arguments of the dual ops: shapes that fit each other, nothing written that is also read elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsharp.errors import InputError, ShapeError
from fastsharp.ops._border import SCALARS, VECTOR_DTYPES, address, check, check_apart, check_nonempty, meet, span
from fastsharp.ops._border import check_rows as check_rows_apart
from fastsharp.ops.reference.dual import Norm, Parameters, Second

DEFAULTS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,),
    "gelu": (),
    "gelu_tanh": (),
    "silu": (),
    "tanh": (),
    "sigmoid": (),
    "softplus": (1.0, 20.0),
    "elu": (1.0, 1.0, 1.0),
}


def check_curve(kind: Any, parameters: tuple[float, ...]) -> Parameters:
    """A known activation with as many parameters as it has, at most; the missing ones by default, then zeros."""
    if kind not in DEFAULTS:
        raise InputError(f"activation_prepare: kind is {kind!r}, expected one of {', '.join(DEFAULTS)}.")
    defaults = DEFAULTS[kind]
    if len(parameters) > len(defaults):
        raise InputError(f"activation_prepare: {kind} takes {len(defaults)} parameters, got {len(parameters)}.")
    full = (*parameters, *defaults[len(parameters) :], 0.0, 0.0, 0.0)
    return full[0], full[1], full[2]


def check_rows(op: str, name: str, t: Any) -> None:
    """(rows, columns), not empty, rows apart."""
    check(op, name, t, 2, VECTOR_DTYPES)
    check_nonempty(op, name, t)
    check_rows_apart(op, name, t)


def check_like(op: str, name: str, t: Any, shape: Sequence[int], like: Tensor) -> None:
    """`t` of this shape with the dtype and device of `like`, rows apart."""
    check(op, name, t, len(shape), (like.dtype,), like.device)
    if tuple(t.shape) != tuple(shape):
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)} for these arguments.")
    check_rows_apart(op, name, t)


def check_stack(op: str, primal: str, m: Any, name: str, t: Any) -> None:
    """m (rows, columns) and t (b, rows, columns) with b >= 1."""
    check_rows(op, primal, m)
    check(op, name, t, 3, (m.dtype,), m.device)
    check_nonempty(op, name, t)
    check_like(op, name, t, (t.shape[0], *m.shape), m)


def check_columns(op: str, name: str, t: Any, like: Tensor, m: Tensor | None = None) -> None:
    """t (b, columns) for `like` (b, rows, ...) over the matrix m (default: like itself), or None."""
    if t is not None:
        m = like if m is None else m
        check_like(op, name, t, (like.shape[0], m.shape[-1]), m)


def check_activation(op: str, x: Any, d1: Any, d2: Any, bias: Any) -> None:
    """x, d1, d2 (rows, columns), bias (columns,); what is written lies apart from everything but x itself."""
    check_rows(op, "x", x)
    for name, t in (("d1", d1), ("d2", d2)):
        if t is not None:
            check_like(op, name, t, x.shape, x)
    if d1 is None:
        raise InputError(f"{op}: d1 is None, expected a tensor of the shape of x.")
    if bias is not None:
        check_like(op, "bias", bias, x.shape[1:], x)
    check_apart(op, "d1", span(d1), x=span(x), d2=_span(d2), bias=_span(bias))
    if d2 is not None:
        check_apart(op, "d2", span(d2), x=span(x), bias=_span(bias))


def check_second(op: str, q: Any, a_t: Any, y_gt: Tensor) -> None:
    """q (rows, columns) and a_t (b, rows, columns), both or neither."""
    if (q is None) != (a_t is None):
        raise InputError(f"{op}: q and a_t belong together, but one of them is None.")
    if q is not None:
        check_like(op, "q", q, y_gt.shape[1:], y_gt)
        check_like(op, "a_t", a_t, y_gt.shape, y_gt)


def check_out(op: str, out: Any, *tangents: Tensor | None, **others: Tensor | None) -> None:
    """out (b, rows, columns) is one of the tangents themselves or apart from them, and apart from the others."""
    present = [t for t in tangents if t is not None]
    if present:
        check_like(op, "out", out, present[0].shape, present[0])
    where = span(out)
    for t in present:
        same = address(t) == where[0] and t.stride() == out.stride()
        if not same and meet(where, span(t)):
            raise InputError(f"{op}: out overlaps a tangent that is read, but is not that tensor. Give it memory of its own.")
    check_apart(op, "out", where, **{name: span(t) for name, t in others.items() if t is not None})


def check_gradients(op: str, w_gt: Tensor | None = None, bias_gt: Tensor | None = None, **read: Tensor | None) -> None:
    """Gradients, which are added to, share no memory with each other or with what is read."""
    spans = {name: span(t) for name, t in read.items() if t is not None}
    for name, t in (("w_gt", w_gt), ("bias_gt", bias_gt)):
        if t is not None:
            check_apart(op, name, span(t), **spans)
    if w_gt is not None and bias_gt is not None:
        check_apart(op, "w_gt", span(w_gt), bias_gt=span(bias_gt))


def check_pairs(op: str, name: str, t: Any, shape: Sequence[int], x: Tensor) -> None:
    """t (*shape, 2) float64 without gaps, apart from x."""
    check(op, name, t, len(shape) + 1, SCALARS, x.device)
    if tuple(t.shape) != (*shape, 2) or not t.is_contiguous():
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)} and strides {t.stride()}, expected a contiguous {(*shape, 2)}.")
    check_apart(op, name, span(t), x=span(x))


def check_norm(op: str, f: Norm) -> None:
    """x (rows, columns), w (columns,) or None, stats (rows, 2)."""
    check_rows(op, "x", f.x)
    if f.w is not None:
        check_like(op, "w", f.w, f.x.shape[1:], f.x)
    check_pairs(op, "stats", f.stats, f.x.shape[:1], f.x)


def check_tangents(op: str, f: Norm, sums: Any, **tangents: Tensor | None) -> None:
    """Each (b, rows, columns) for sums (b, rows, ...), which must be pairs where they are float64 pairs of the tangent."""
    for name, t in tangents.items():
        if t is not None:
            check_like(op, name, t, (sums.shape[0], *f.x.shape), f.x)
    if op == "norm_tangent":
        check(op, "sums", sums, 3, SCALARS, f.x.device)
        check_pairs(op, "sums", sums, (sums.shape[0], f.x.shape[0]), f.x)
        check_nonempty(op, "sums", sums)


def check_norm_second(op: str, f: Norm, y_gt: Any, second: Second | None) -> Tensor:
    """What carries b: y_gt, or x_sums where y_gt is None; the parts of `second` fit it."""
    if y_gt is None and second is None:
        raise InputError(f"{op}: y_gt and second are both None: there is nothing to compute.")
    like = y_gt if second is None else second.x_sums
    check(op, "y_gt" if second is None else "second.x_sums", like, 3, (f.x.dtype,) if second is None else SCALARS, f.x.device)
    check_nonempty(op, "y_gt", like)
    if second is not None:
        check_like(op, "second.y_g", second.y_g, f.x.shape, f.x)
        check_pairs(op, "second.g_sums", second.g_sums, (1, f.x.shape[0]), f.x)
        check_pairs(op, "second.x_sums", second.x_sums, (like.shape[0], f.x.shape[0]), f.x)
        if second.x_t is not None:
            check_like(op, "second.x_t", second.x_t, (like.shape[0], *f.x.shape), f.x)
        check_columns(op, "second.w_t", second.w_t, like, f.x)
    return like


def check_row_weights(op: str, weight: Any, p: Tensor) -> None:
    """weight (rows,) in the dtype of p, or None."""
    if weight is not None:
        check_like(op, "weight", weight, p.shape[:1], p)


def check_softmax(op: str, z: Any, target: Any, weight: Any, p: Any, g: Any) -> None:
    """z, p, g (rows, columns); target (rows,) int64, needed for g; p and g lie apart, each apart from z or z itself."""
    check_rows(op, "z", z)
    check_row_weights(op, weight, z)
    if (g is None) != (target is None):
        raise InputError(f"{op}: g and target belong together, but one of them is None.")
    if p is None and g is None:
        raise InputError(f"{op}: p and g are both None: there is nothing to compute.")
    if target is not None:
        check(op, "target", target, 1, (torch.int64,), z.device)
        if target.shape[0] != z.shape[0]:
            raise ShapeError(f"{op}: target has shape {tuple(target.shape)}, expected ({z.shape[0]},) as z is {tuple(z.shape)}.")
    for name, t in (("p", p), ("g", g)):
        if t is not None:
            check_like(op, name, t, z.shape, z)
            if not (address(t) == address(z) and t.stride() == z.stride()):
                check_apart(op, name, span(t), z=span(z))
            check_apart(op, name, span(t), target=_span(target), weight=_span(weight))
    if p is not None and g is not None:
        check_apart(op, "p", span(p), g=span(g))


def _span(t: Tensor | None) -> Any:
    return None if t is None else span(t)
