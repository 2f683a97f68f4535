"""The border to native code: every check, every address, and the only calls of `data_ptr()`.

Backends receive what passed here, so all of them raise the same messages. Nothing is copied silently: an implicit
`.contiguous()` would read stale data and lose writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, KernelError, ShapeError

VECTOR_DTYPES = (torch.float32, torch.float64)
STORAGE_DTYPES = (*VECTOR_DTYPES, torch.float16, torch.bfloat16)
_SCALARS = (torch.float64,)


def check(
    op: str, name: str, t: Any, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None, contiguous: bool = True
) -> None:
    """Refuse what a kernel cannot take by address: `t` must be a plain strided tensor of `ndim`, dtype and device, rows contiguous."""
    if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
        hint = "fake and subclassed tensors have no memory a kernel can read" if isinstance(t, Tensor) else "pass a torch.Tensor"
        raise ArgumentTypeError(f"{op}: {name} is a {type(t).__name__}, expected a plain torch.Tensor; {hint}.")
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        raise ArgumentTypeError(
            f"{op}: {name} is wrapped by torch.func (vmap, grad or jvp), but the kernels see memory, not transforms.\n"
            "Call the op outside the transformed function."
        )
    if t.layout != torch.strided or t.is_neg() or t.device.type == "meta":
        raise ArgumentTypeError(
            f"{op}: {name} is sparse, a lazy negation or on 'meta', expected memory that holds its values. Use .resolve_neg()."
        )
    if t.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise DtypeError(f"{op}: {name} is {t.dtype}, expected {expected}. Convert it before the call; kernels never copy.")
    if device is not None and t.device != device:
        raise DeviceError(f"{op}: {name} is on {t.device}, the other arguments on {device}. Move it with .to('{device}').")
    if t.ndim != ndim:
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected {ndim} dimension{'s' if ndim > 1 else ''}.")
    if contiguous and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ShapeError(
            f"{op}: {name} has strides {tuple(t.stride())}, expected the last dimension contiguous.\n"
            f"Pass {name}.contiguous() and keep that tensor: the kernel writes and reads memory in place."
        )
    if t.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{op}: {name} requires grad, but the kernels record no graph. Call it under torch.no_grad() or detach {name}.")


def check_length(op: str, name: str, t: Tensor, length: int, why: str) -> None:
    """`t` must have shape (length,); `why` says where the length comes from."""
    if t.shape[0] != length:
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected ({length},) {why}.")


def check_nonempty(op: str, name: str, t: Tensor) -> None:
    """`t` must have at least one entry."""
    if t.numel() == 0:
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected at least one entry.")


@dataclass(frozen=True)
class Problem:
    """A checked basis and its vectors with all leading dimensions in place."""

    V: Tensor  # (E, j, n)
    w: Tensor  # (E, b, n)
    E: int
    b: int
    j: int
    n: int
    lead: tuple[int, ...]  # leading dimensions of w as the caller gave it


def check_pair(op: str, v: Any, w: Any, out: Any) -> None:
    """v and w (n,) or (E, n) of one dtype and device, out (1,) or (E,) float64."""
    ndim = 2 if isinstance(v, Tensor) and v.ndim == 2 else 1
    check(op, "v", v, ndim, VECTOR_DTYPES)
    check(op, "w", w, ndim, (v.dtype,), v.device)
    if w.shape != v.shape:
        raise ShapeError(f"{op}: w has shape {tuple(w.shape)}, expected {tuple(v.shape)} as v has.")
    check_nonempty(op, "v", v)
    check(op, "out", out, 1, _SCALARS, v.device)
    check_length(op, "out", out, v.shape[0] if ndim == 2 else 1, "for these arguments")
    _apart(op, "out", out, v, w)


def check_problem(op: str, V: Any, w: Any) -> Problem:
    """V (j, n) or (E, j, n) and w of a matching shape, one device, j, n >= 1, rows apart, w outside every row of V."""
    ndim = 3 if isinstance(V, Tensor) and V.ndim == 3 else 2
    check(op, "V", V, ndim, STORAGE_DTYPES)
    dtypes = (torch.float64,) if V.dtype == torch.float64 else (torch.float32,)
    check(op, "w", w, w.ndim if isinstance(w, Tensor) and w.ndim in (ndim - 1, ndim) else ndim - 1, dtypes, V.device)
    check_nonempty(op, "V", V)
    check_nonempty(op, "w", w)
    lead = tuple(w.shape[:-1])
    if w.shape[-1] != V.shape[-1] or (ndim == 3 and w.shape[0] != V.shape[0]):
        members = (
            f"({V.shape[0]}, {V.shape[2]}) or ({V.shape[0]}, b, {V.shape[2]})" if ndim == 3 else f"({V.shape[1]},) or (b, {V.shape[1]})"
        )
        raise ShapeError(f"{op}: w has shape {tuple(w.shape)}, expected {members} as V is {tuple(V.shape)}.")
    V3 = V if ndim == 3 else V[None]
    w3 = w if w.ndim == 3 else w[:, None] if ndim == 3 else w[None] if w.ndim == 2 else w[None, None]
    E, j, n = V3.shape
    _check_strides(op, "V", V3)
    _check_strides(op, "w", w3)
    for e in range(E):
        if _overlaps_block(w3, V3[e]):
            raise InputError(
                f"{op}: w overlaps a row of V, but is written while V is read. Pass the rows before w, as V[:j] with w = V[j]."
            )
    return Problem(V3, w3, E, w3.shape[1], j, n, lead)


def check_removed(op: str, p: Problem, ab: Any, last: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(ab (E, 2), v_j (E, n), v_{j-1} (E, n) or None): what dots removes first; None without ab."""
    if ab is None:
        if last is not None:
            raise InputError(f"{op}: last was given without ab. Pass ab = (alpha, beta), or leave both out.")
        return None
    if p.b != 1:
        raise InputError(f"{op}: ab removes two rows from one vector a member, but w holds {p.b}. Pass ab=None for several vectors.")
    shape = (p.E, 2) if len(p.lead) else (2,)
    check(op, "ab", ab, len(shape), _SCALARS, p.w.device)
    if tuple(ab.shape) != shape:
        raise ShapeError(f"{op}: ab has shape {tuple(ab.shape)}, expected {shape} for these arguments.")
    ab2 = ab if ab.ndim == 2 else ab[None]
    if last is None:
        if p.V.dtype != p.w.dtype:
            raise InputError(
                f"{op}: V is stored as {p.V.dtype}, too coarse for the rows to remove. Pass last=(v_j, v_{{j-1}}) in {p.w.dtype}."
            )
        return ab2, p.V[:, -1], p.V[:, -2] if p.j > 1 else None
    if not isinstance(last, tuple) or len(last) != 2:
        raise ArgumentTypeError(f"{op}: last is a {type(last).__name__}, expected a tuple (v_j, v_{{j-1}} or None).")
    rows = [_check_member_vector(op, f"last[{i}]", v, p, p.w.dtype) for i, v in enumerate(last) if v is not None]
    if not rows or last[0] is None:
        raise InputError(f"{op}: last[0] is None, but v_j always exists. Pass it in {p.w.dtype}.")
    for i, v in enumerate(rows):
        _apart(op, f"last[{i}]", v, p.w)
    return ab2, rows[0], rows[1] if len(rows) > 1 else None


def check_results(op: str, p: Problem, name: str, t: Any, width: int) -> Tensor:
    """`t` (..., width) float64 with the leading dimensions of w, outside all vectors; as (E, b, width)."""
    shape = (*p.lead, width)
    check(op, name, t, len(shape), _SCALARS, p.w.device)
    if tuple(t.shape) != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape} for these arguments.")
    t3: Tensor
    if t.is_contiguous():
        t3 = t.reshape(p.E, p.b, width)
    else:
        t3 = t if t.ndim == 3 else t[:, None] if p.b == 1 else t[None]
    if name == "out":
        _check_strides(op, name, t3)
        _apart(op, name, t, p.V, p.w)
    return t3


def check_squares(op: str, p: Problem, out: Any) -> Tensor:
    """`out` float64 with the leading dimensions of w, (1,) for a single vector; as (E, b), any strides."""
    shape = p.lead or (1,)
    check(op, "out", out, len(shape), _SCALARS, p.w.device, contiguous=False)
    if tuple(out.shape) != shape:
        raise ShapeError(f"{op}: out has shape {tuple(out.shape)}, expected {shape} for these arguments.")
    _apart(op, "out", out, p.V, p.w)
    squares: Tensor = out if out.ndim == 2 else out[:, None] if p.b == 1 else out[None]
    return squares


def check_row(op: str, p: Problem, row: Any, factor: Any) -> tuple[Tensor, Tensor] | None:
    """(row (E, n) in V's dtype, factor (E,)), or None; row must lie outside V's rows and w."""
    if row is None:
        if factor is not None:
            raise InputError(f"{op}: factor was given without row. Pass the row to write, or leave both out.")
        return None
    if p.b != 1:
        raise InputError(f"{op}: row takes the next row of one vector a member, but w holds {p.b}. Leave row out.")
    if factor is None:
        raise InputError(f"{op}: row was given without factor. Pass factor as a float64 tensor.")
    row2 = _check_member_vector(op, "row", row, p, p.V.dtype)
    check(op, "factor", factor, 1, _SCALARS, p.w.device, contiguous=False)
    check_length(op, "factor", factor, p.E, "for these arguments")
    _apart(op, "row", row2, p.w)
    for e in range(p.E):
        if _overlaps_block(row2[:, None], p.V[e]):
            raise InputError(f"{op}: row overlaps a row of V, but is written while V is read. Pass V[:j] with row = V[j].")
    return row2, factor


def check_combination(S: Any, V: Any, out: Any) -> None:
    """S (k, j) float64, V (j, n) storage, out (k, n) outside V."""
    check("combine", "V", V, 2, STORAGE_DTYPES)
    check_nonempty("combine", "V", V)
    _check_strides("combine", "V", V[None])
    check("combine", "S", S, 2, _SCALARS, V.device)
    if S.shape[1] != V.shape[0]:
        raise ShapeError(f"combine: S has shape {tuple(S.shape)}, expected (k, {V.shape[0]}) as V is {tuple(V.shape)}.")
    check("combine", "out", out, 2, (torch.float64,) if V.dtype == torch.float64 else (torch.float32,), V.device)
    if tuple(out.shape) != (S.shape[0], V.shape[1]):
        raise ShapeError(f"combine: out has shape {tuple(out.shape)}, expected {(S.shape[0], V.shape[1])}.")
    _check_strides("combine", "out", out[None])
    _apart("combine", "out", out, S)
    if out.numel() and _overlaps_block(out[None], V):
        raise InputError("combine: out overlaps a row of V, but is written while V is read. Give it memory of its own.")


def check_probes(kind: Any, out: Any, seed: Any, first: Any) -> None:
    """kind by name, out (b, n) float32 or float64 with rows apart, 64-bit seed, first >= 0."""
    if kind not in ("rademacher", "normal"):
        raise InputError(f"probes: kind is {kind!r}, expected 'rademacher' or 'normal'.")
    check("probes", "out", out, 2, VECTOR_DTYPES)
    _check_strides("probes", "out", out[None])
    for name, value in (("seed", seed), ("first", first)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"probes: {name} is {value!r}, a {type(value).__name__}; expected an int.")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"probes: seed is {seed}, expected a 64-bit integer.")
    if not 0 <= first < 2**62:
        raise InputError(f"probes: first is {first}, expected an index from 0.")


def _check_member_vector(op: str, name: str, v: Any, p: Problem, dtype: torch.dtype) -> Tensor:
    """(n,) or (E, n) as w's leading dimensions ask, in `dtype`; as (E, n)."""
    members = len(p.lead) > 0
    check(op, name, v, 2 if members else 1, (dtype,), p.w.device)
    shape = (p.E, p.n) if members else (p.n,)
    if tuple(v.shape) != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(v.shape)}, expected {shape} for these arguments.")
    checked: Tensor = v if members else v[None]
    _check_strides(op, name, checked[:, None])
    return checked


def _check_strides(op: str, name: str, t: Tensor) -> None:
    """Rows (and members) of t (E, r, n) must lie apart: r rows of n in order, members in any order that does not meet."""
    E, r, n = t.shape
    if r > 1 and t.stride(1) < n:
        raise ShapeError(
            f"{op}: {name} has row stride {t.stride(1)}, expected at least n = {n}: its rows overlap. Store it as rows of one tensor."
        )
    span = (r - 1) * t.stride(1) + n
    if E > 1 and t.stride(0) < span and (r == 1 or t.stride(1) < (E - 1) * t.stride(0) + n or t.stride(0) < n):
        raise ShapeError(f"{op}: {name} has strides {tuple(t.stride())} for shape {tuple(t.shape)}: its members overlap. Store them apart.")


def _apart(op: str, name: str, t: Tensor, *others: Tensor) -> None:
    """`t` is written (or read while others are), so its bytes must not meet theirs."""
    for other in others:
        rows = t.reshape(-1, t.shape[-1]) if t.is_contiguous() else t
        blocks = other if other.ndim == 3 else other[None] if other.ndim == 2 else other[None, None]
        vectors = rows if rows.ndim == 3 else rows[None] if rows.ndim == 2 else rows[None, None]
        if any(_overlaps_block(vectors, block) for block in blocks):
            raise InputError(f"{op}: {name} overlaps one of the vectors. Give it memory of its own.")


def _overlaps_block(x: Tensor, V: Tensor) -> bool:
    """True when a row of x (E, b, n) meets a row of V (j, n); mostly settled by the two address ranges."""
    (x0, x1), (v0, v1) = _span(x), _span(V)
    return max(x0, v0) < min(x1, v1) and any(_overlaps_rows(row, V) for member in x for row in member)


def _span(t: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that the elements of t may occupy (all strides are >= 0 in torch)."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + last * t.element_size()


def _overlaps_rows(x: Tensor, V: Tensor) -> bool:
    """True when the bytes of the vector x meet those of a row of V."""
    size = V.shape[1] * V.element_size()
    x_size = x.shape[0] * x.element_size()
    stride = V.stride(0) * V.element_size() if V.shape[0] > 1 else size
    offset = x.data_ptr() - V.data_ptr()
    if offset <= -x_size or offset >= (V.shape[0] - 1) * stride + size:
        return False
    first = max(0, -(-(offset - size + 1) // stride))  # the first row that ends after x begins
    return first < V.shape[0] and first * stride < offset + x_size


def address(t: Tensor) -> int:
    """Where a checked tensor lies; the caller keeps it alive until the kernel has returned."""
    return t.data_ptr()


def call(kernel: Callable[..., None], *args: int) -> None:
    """Run a native function; a failure that it reports becomes a KernelError that names it."""
    try:
        kernel(*args)
    except RuntimeError as e:
        raise KernelError(f"native kernel failed: {e}") from e


def wrote(*tensors: Tensor) -> None:
    """Declare in-place writes that torch did not see, so that autograd's version checks keep working."""
    for t in tensors:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)
