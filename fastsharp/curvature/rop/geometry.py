"""Where a tensor lies in its storage."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def place(t: torch.Tensor, active: bool) -> Any:
    """The key of a value within its storage."""
    return t.storage_offset(), t.shape, t.stride(), t.dtype, active


def covers(t: torch.Tensor) -> bool:
    """Whether t is the whole of its storage, each number once."""
    if t.storage_offset() or t.numel() * t.element_size() != t.untyped_storage().nbytes():
        return False
    return t.is_contiguous() or bool(aten.is_non_overlapping_and_dense.default(t))


def window(whole: torch.Tensor, t: torch.Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The call, select or slice, by which t can be had from a whole that begins where the storage does; None where neither can."""
    shape, stride, offset = tuple(t.shape), tuple(t.stride()), int(t.storage_offset())
    for d in range(whole.ndim):
        size, step = whole.shape[d], whole.stride(d)
        start, rest = divmod(offset, step) if step else (0, offset)
        if rest or not start < size:
            continue
        others = [k for k in range(whole.ndim) if k != d]
        if shape == tuple(whole.shape[k] for k in others) and stride == tuple(whole.stride(k) for k in others):
            return aten.select.int, (d, start)
        if t.ndim != whole.ndim or any(shape[k] != whole.shape[k] or stride[k] != whole.stride(k) for k in others):
            continue
        if stride[d] == step and start + shape[d] <= size:
            return aten.slice.Tensor, (d, start, start + shape[d])
        every, rest = divmod(stride[d], step)
        if not rest and every > 0 and shape[d] and start + every * (shape[d] - 1) < size:
            return aten.slice.Tensor, (d, start, start + every * (shape[d] - 1) + 1, every)
    return None


def copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copy = torch.UntypedStorage(storage.nbytes(), device=storage.device)  # type: ignore[no-untyped-call]
    return copy.copy_(storage)


def lying(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Any, stride: Any, offset: int) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)
