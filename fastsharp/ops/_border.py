"""The border to native code: what any tensor must be, every address, and the only calls of `data_ptr()`.

Backends receive what passed here, so all of them raise the same messages. Nothing is copied silently: an implicit
`.contiguous()` would read stale data and lose writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, KernelError, ShapeError
from fastsharp.ops._overlap import layout, overlaps

VECTOR_DTYPES = (torch.float32, torch.float64)
STORAGE_DTYPES = (*VECTOR_DTYPES, torch.float16, torch.bfloat16)
SCALARS = (torch.float64,)
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def check(
    op: str, name: str, t: Any, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None, contiguous: bool = True
) -> None:
    """Refuse what a kernel cannot take by address: `t` must be a plain strided tensor of `ndim`, dtype and device, rows contiguous."""
    if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
        hint = "fake and subclassed tensors have no memory a kernel can read" if isinstance(t, Tensor) else "pass a torch.Tensor"
        raise ArgumentTypeError(f"{op}: {name} is a {type(t).__name__}, expected a plain torch.Tensor; {hint}.")
    if _wrapped(t):
        raise ArgumentTypeError(
            f"{op}: {name} is wrapped by torch.func (vmap, grad or jvp), but the kernels see memory, not transforms.\n"
            "Call the op outside the transformed function."
        )
    if t.layout != torch.strided or t.is_neg() or t.is_meta:
        raise ArgumentTypeError(
            f"{op}: {name} is sparse, a lazy negation or on 'meta', expected memory that holds its values. Use .resolve_neg()."
        )
    if t.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise DtypeError(f"{op}: {name} is {t.dtype}, expected {expected}. Convert it before the call; kernels never copy.")
    if device is not None and t.device != device:
        raise DeviceError(f"{op}: {name} is on {t.device}, the other arguments on {device}. Move it with .to('{device}').")
    if t.dim() != ndim:
        raise ShapeError(f"{op}: {name} has shape {tuple(t.shape)}, expected {ndim} dimension{'s' if ndim > 1 else ''}.")
    if contiguous and t.stride(-1) != 1 and t.shape[-1] > 1:
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


Span = tuple[int, int, Tensor]  # first and one-past-last byte that the elements of a tensor may occupy


def check_rows(op: str, name: str, t: Tensor) -> None:
    """Rows and members of t (n,), (r, n) or (E, r, n) must lie apart: rows in order, members in any order that does not meet."""
    if t.dim() == 1:
        return
    shape, stride = t.shape, t.stride()
    n = shape[-1]
    if t.dim() == 2:
        E, r, member, row = 1, shape[0], 0, stride[0]
    else:
        E, r, member, row = shape[0], shape[1], stride[0], stride[1]
    if r > 1 and row < n:
        raise ShapeError(f"{op}: {name} has row stride {row}, expected at least n = {n}: its rows overlap. Store it as rows of one tensor.")
    if E > 1 and member < (r - 1) * row + n and (member < n or (r > 1 and row < (E - 1) * member + n)):
        raise ShapeError(f"{op}: {name} has strides {stride} for shape {tuple(shape)}: its members overlap. Store them apart.")


def check_members(op: str, name: str, t: Tensor) -> None:
    """Vectors of t (E, n), one a member, must lie apart."""
    if t.dim() == 2 and t.shape[0] > 1 and t.stride(0) < t.shape[1]:
        raise ShapeError(f"{op}: {name} has strides {t.stride()} for shape {tuple(t.shape)}: its members overlap. Store them apart.")


def span(t: Tensor) -> Span:
    """Where t lies; strides are never negative in torch."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes, t
    last = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        last += (size - 1) * stride
    return start, start + last * t.element_size(), t


def meet(x: Span, y: Span) -> bool:
    """True when an element of x shares a byte with one of y; mostly settled by the two ranges."""
    if x[0] >= y[1] or y[0] >= x[1]:
        return False
    a, b = (layout(start, t.element_size(), tuple(t.shape), t.stride()) for start, _, t in (x, y))
    return overlaps(a, b)


def check_apart(op: str, name: str, written: Span, **others: Span | None) -> None:
    """What is written must share no byte with the others."""
    for other, where in others.items():
        if where is not None and meet(written, where):
            raise InputError(f"{op}: {name} overlaps {other}. Give it memory of its own.")


def address(t: Tensor) -> int:
    """Where a checked tensor lies; the caller keeps it alive until the kernel has returned."""
    return t.data_ptr()


def call(kernel: Callable[..., None], *args: object) -> None:
    """Run a native function; a failure that it reports becomes a KernelError that names it."""
    try:
        kernel(*args)
    except RuntimeError as e:
        raise KernelError(f"native kernel failed: {e}. Use force('reference') to go on.") from e


def wrote(*tensors: Tensor | None) -> None:
    """Declare in-place writes that torch did not see, so that autograd's version checks keep working."""
    torch._C._increment_version([t for t in tensors if t is not None and not t.is_inference()])
