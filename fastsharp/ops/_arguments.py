"""Arguments of the Krylov ops: shapes that fit each other, nothing written that is also read, leading dimensions put in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsharp.errors import ArgumentTypeError, InputError, ShapeError
from fastsharp.ops._border import (
    SCALARS,
    STORAGE_DTYPES,
    VECTOR_DTYPES,
    Span,
    check,
    check_apart,
    check_length,
    check_members,
    check_nonempty,
    check_rows,
    meet,
    span,
)


class Problem(NamedTuple):
    """A checked basis and its vectors with all leading dimensions in place."""

    V: Tensor  # (E, j, n)
    w: Tensor  # (E, b, n)
    E: int
    b: int
    j: int
    n: int
    lead: tuple[int, ...]  # leading dimensions of w as the caller gave it
    V_span: Span
    w_span: Span


def check_pair(op: str, v: Any, w: Any, out: Any) -> None:
    """v and w (n,) or (E, n) of one dtype and device, out (1,) or (E,) float64."""
    ndim = 2 if isinstance(v, Tensor) and v.dim() == 2 else 1
    check(op, "v", v, ndim, VECTOR_DTYPES)
    check(op, "w", w, ndim, (v.dtype,), v.device)
    if w.shape != v.shape:
        raise ShapeError(f"{op}: w has shape {tuple(w.shape)}, expected {tuple(v.shape)} as v has.")
    check_nonempty(op, "v", v)
    check(op, "out", out, 1, SCALARS, v.device)
    check_length(op, "out", out, v.shape[0] if ndim == 2 else 1, "for these arguments")
    check_apart(op, "out", span(out), v=span(v), w=span(w))


def check_problem(op: str, V: Any, w: Any) -> Problem:
    """V (j, n) or (E, j, n) and w of a matching shape, one device, j, n >= 1, rows apart, w outside every row of V."""
    ndim = 3 if isinstance(V, Tensor) and V.dim() == 3 else 2
    check(op, "V", V, ndim, STORAGE_DTYPES)
    vectors = isinstance(w, Tensor) and w.dim() == ndim  # b of them
    check(op, "w", w, ndim if vectors else ndim - 1, SCALARS if V.dtype == torch.float64 else (torch.float32,), V.device)
    check_nonempty(op, "V", V)
    check_nonempty(op, "w", w)
    shape, (j, n), lead = V.shape, V.shape[-2:], tuple(w.shape[:-1])
    if w.shape[-1] != n or (ndim == 3 and lead[0] != shape[0]):
        members = f"({shape[0]}, {n}) or ({shape[0]}, b, {n})" if ndim == 3 else f"({n},) or (b, {n})"
        raise ShapeError(f"{op}: w has shape {tuple(w.shape)}, expected {members} as V is {tuple(shape)}.")
    check_rows(op, "V", V)
    if vectors:
        check_rows(op, "w", w)
    elif ndim == 3:
        check_members(op, "w", w)
    V_span, w_span = span(V), span(w)
    if meet(V_span, w_span):
        raise InputError(f"{op}: w overlaps a row of V, but is written while V is read. Pass the rows before w, as V[:j] with w = V[j].")
    if ndim == 3:
        w3 = w if vectors else w[:, None]
        return Problem(V, w3, shape[0], w3.shape[1], j, n, lead, V_span, w_span)
    w3 = w[None] if vectors else w[None, None]
    return Problem(V[None], w3, 1, w3.shape[1], j, n, lead, V_span, w_span)


def check_removed(op: str, p: Problem, ab: Any, last: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(ab (E, 2), v_j (E, n), v_{j-1} (E, n) or None): what dots removes first; None without ab."""
    if ab is None:
        if last is not None:
            raise InputError(f"{op}: last was given without ab. Pass ab = (alpha, beta), or leave both out.")
        return None
    if p.b != 1:
        raise InputError(f"{op}: ab removes two rows from one vector a member, but w holds {p.b}. Pass ab=None for several vectors.")
    members = p.V_span[2].dim() == 3
    shape = (p.E, 2) if members else (2,)
    check(op, "ab", ab, len(shape), SCALARS, p.w.device)
    if tuple(ab.shape) != shape:
        raise ShapeError(f"{op}: ab has shape {tuple(ab.shape)}, expected {shape} for these arguments.")
    check_apart(op, "w", p.w_span, ab=span(ab))
    ab2 = ab if members else ab[None]
    if last is None:
        if p.V.dtype != p.w.dtype:
            raise InputError(
                f"{op}: V is stored as {p.V.dtype}, too coarse for the rows to remove. Pass last=(v_j, v_{{j-1}}) in {p.w.dtype}."
            )
        return ab2, p.V[:, -1], p.V[:, -2] if p.j > 1 else None
    if not isinstance(last, tuple) or len(last) != 2:
        raise ArgumentTypeError(f"{op}: last is a {type(last).__name__}, expected a tuple (v_j, v_{{j-1}} or None).")
    if last[0] is None:
        raise InputError(f"{op}: last[0] is None, but v_j always exists. Pass it in {p.w.dtype}.")
    first, *second = (_member_vector(op, f"last[{i}]", v, p, p.w.dtype) for i, v in enumerate(last) if v is not None)
    return ab2, first, second[0] if second else None


def check_results(op: str, p: Problem, t: Any) -> Tensor:
    """out (..., j + 1) float64 with the leading dimensions of w, outside all vectors; as (E, b, j + 1)."""
    _scalars(op, "out", p, t, p.j + 1)
    if len(p.lead) > 0:
        check_rows(op, "out", t)
    check_apart(op, "out", span(t), V=p.V_span, w=p.w_span)
    return _placed(p, t)


def check_coefficients(op: str, p: Problem, t: Any) -> Tensor:
    """c (..., j) float64 with the leading dimensions of w, outside w; as (E, b, j)."""
    _scalars(op, "c", p, t, p.j)
    check_apart(op, "w", p.w_span, c=span(t))
    return _placed(p, t)


def check_squares(op: str, p: Problem, out: Any) -> Tensor:
    """`out` float64 with the leading dimensions of w, (1,) for a single vector; as (E, b), any strides that keep entries apart."""
    shape = p.lead or (1,)
    check(op, "out", out, len(shape), SCALARS, p.w.device, contiguous=False)
    if tuple(out.shape) != shape:
        raise ShapeError(f"{op}: out has shape {tuple(out.shape)}, expected {shape} for these arguments.")
    if len(shape) > 1 or shape[0] > 1:
        check_rows(op, "out", out[..., None])
    check_apart(op, "out", span(out), V=p.V_span, w=p.w_span)
    if len(shape) == 2:
        return out  # type: ignore[no-any-return]  # checked to be a Tensor above
    squares: Tensor = out[None] if p.V_span[2].dim() == 2 and p.lead else out[:, None]
    return squares


def check_row(op: str, p: Problem, row: Any, factor: Any, c: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """(row (E, n) in V's dtype, factor (E,)), or None; row must lie outside everything else."""
    if row is None:
        if factor is not None:
            raise InputError(f"{op}: factor was given without row. Pass the row to write, or leave both out.")
        return None
    if p.b != 1:
        raise InputError(f"{op}: row takes the next row of one vector a member, but w holds {p.b}. Leave row out.")
    if factor is None:
        raise InputError(f"{op}: row was given without factor. Pass factor as a float64 tensor.")
    check(op, "factor", factor, 1, SCALARS, p.w.device, contiguous=False)
    check_length(op, "factor", factor, p.E, "for these arguments")
    row2 = _member_vector(op, "row", row, p, p.V.dtype)
    if meet(span(row), p.V_span):
        raise InputError(f"{op}: row overlaps a row of V, but is written while V is read. Pass V[:j] with row = V[j].")
    if p.w.dtype == torch.float64:  # a float32 or half-precision row cannot share memory with float64 scalars, short of reinterpretation
        check_apart(op, "row", span(row), c=span(c), out=span(out), factor=span(factor))
        check_apart(op, "w", p.w_span, factor=span(factor))
    return row2, factor


def check_combination(S: Any, V: Any, out: Any) -> None:
    """S (k, j) float64, V (j, n) storage, out (k, n) outside both."""
    check("combine", "V", V, 2, STORAGE_DTYPES)
    check_nonempty("combine", "V", V)
    check_rows("combine", "V", V)
    check("combine", "S", S, 2, SCALARS, V.device)
    if S.shape[1] != V.shape[0]:
        raise ShapeError(f"combine: S has shape {tuple(S.shape)}, expected (k, {V.shape[0]}) as V is {tuple(V.shape)}.")
    check("combine", "out", out, 2, SCALARS if V.dtype == torch.float64 else (torch.float32,), V.device)
    if tuple(out.shape) != (S.shape[0], V.shape[1]):
        raise ShapeError(f"combine: out has shape {tuple(out.shape)}, expected {(S.shape[0], V.shape[1])}.")
    check_rows("combine", "out", out)
    if out.numel():
        check_apart("combine", "out", span(out), S=span(S), V=span(V))


def check_probes(kind: Any, out: Any, seed: Any, first: Any) -> None:
    """kind by name, out (b, n) float32 or float64 with rows apart, 64-bit seed, first >= 0."""
    if kind not in ("rademacher", "normal"):
        raise InputError(f"probes: kind is {kind!r}, expected 'rademacher' or 'normal'.")
    check("probes", "out", out, 2, VECTOR_DTYPES)
    check_rows("probes", "out", out)
    for name, value in (("seed", seed), ("first", first)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"probes: {name} is {value!r}, a {type(value).__name__}; expected an int.")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"probes: seed is {seed}, expected a 64-bit integer.")
    if not 0 <= first < 2**62:
        raise InputError(f"probes: first is {first}, expected an index from 0.")


def _member_vector(op: str, name: str, v: Any, p: Problem, dtype: torch.dtype) -> Tensor:
    """(n,) or (E, n) as V's leading dimensions ask, in `dtype`, outside w; as (E, n)."""
    members = p.V_span[2].dim() == 3
    check(op, name, v, 2 if members else 1, (dtype,), p.w.device)
    shape = (p.E, p.n) if members else (p.n,)
    if tuple(v.shape) != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(v.shape)}, expected {shape} for these arguments.")
    check_members(op, name, v)
    check_apart(op, name, span(v), w=p.w_span)
    checked: Tensor = v if members else v[None]
    return checked


def _scalars(op: str, name: str, p: Problem, t: Any, width: int) -> None:
    """`t` (..., width) float64 with the leading dimensions of w."""
    shape = (*p.lead, width)
    check(op, name, t, len(shape), SCALARS, p.w.device)
    if tuple(t.shape) != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape} for these arguments.")


def _placed(p: Problem, t: Tensor) -> Tensor:
    """t (..., width) as (E, b, width)."""
    if t.dim() == 3:
        return t
    if t.dim() == 1:
        return t[None, None]
    return t[None] if p.V_span[2].dim() == 2 else t[:, None]
