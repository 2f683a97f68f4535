"""The border to native code: every check, every address, and the only calls of `data_ptr()`.

Backends receive what passed here, so all of them raise the same messages. Nothing is copied silently: an implicit
`.contiguous()` would read stale data and lose writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, KernelError, ShapeError

VECTOR_DTYPES = (torch.float32, torch.float64)
_SCALARS = (torch.float64,)


def check(op: str, name: str, t: Any, ndim: int, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None) -> None:
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
    if t.shape[-1] > 1 and t.stride(-1) != 1:
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


def check_basis(op: str, V: Any, w: Any) -> None:
    """V (j, n) and w (n,) of one dtype and device, j, n >= 1, rows contiguous and apart, w outside every row."""
    check(op, "V", V, 2, VECTOR_DTYPES)
    check(op, "w", w, 1, (V.dtype,), V.device)
    check_nonempty(op, "V", V)
    j, n = V.shape
    check_length(op, "w", w, n, f"as V is {tuple(V.shape)}")
    if j > 1 and V.stride(0) < n:
        raise ShapeError(
            f"{op}: V has row stride {V.stride(0)}, expected at least n = {n}: its rows overlap. Store the basis as (m, n) rows."
        )
    if _overlaps_rows(w, V):
        raise InputError(f"{op}: w overlaps a row of V, but is written while V is read. Pass the rows before w, as V[:j] with w = V[j].")


def check_out(op: str, out: Any, length: int, device: torch.device, *inputs: Tensor) -> None:
    """`out` must be (length,) float64 on `device`, outside the memory of the vectors."""
    check(op, "out", out, 1, _SCALARS, device)
    check_length(op, "out", out, length, "for these arguments")
    for t in inputs:
        if _overlaps_rows(out, t if t.ndim == 2 else t[None]):
            raise InputError(f"{op}: out overlaps one of the vectors. Give it memory of its own.")


def check_scalars(op: str, name: str, t: Any, length: int, device: torch.device) -> None:
    """`t` must be (length,) float64 on `device`."""
    check(op, name, t, 1, _SCALARS, device)
    check_length(op, name, t, length, "for these arguments")


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
