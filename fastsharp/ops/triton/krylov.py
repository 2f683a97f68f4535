"""The Triton column of the Krylov ops: grids, tile sizes, workspaces. Called as `fastsharp.ops.reference.krylov` is.

Launches go to torch's current stream of the vectors' device; partial sums live in torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from fastsharp.errors import KernelError
from fastsharp.ops.reference.krylov import Removed, Row
from fastsharp.ops.triton import kernels, vectors

CHUNK = 128  # elements whose float32 products are added in float32
TILE = 1024
_SUM_BLOCK = 512
_COMBINE_WARPS = 2
_COUNTERS = {"rademacher": 16, "normal": 256}  # per program
_PER_COUNTER = {"rademacher": 128, "normal": 4}


def alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
    """out[e] = v_e'w_e."""
    (E, n), tiles = v.shape, ceil(v.shape[1], TILE)
    partial = _partial(w, E * tiles)
    launch(kernels.alpha, E * tiles, w.device, v, v.stride(0), w, w.stride(0), partial, n, tiles, **_chunks(), num_warps=4)
    _sum(partial, out[:, None, None], tiles)


def dots(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    """w <- w - a v_j - b v_{j-1} with removed = (ab, v_j, v_{j-1}); out[..., :j] = V w; out[..., j] = w'w."""
    (E, j, n), b, tiles = V.shape, w.shape[1], ceil(V.shape[2], TILE)
    shape = _shape_of(b)
    ab, last, before = removed if removed is not None else (None, None, None)
    partial = _partial(w, E * b * (j + 1) * tiles)
    launch(
        kernels.dots, E * ceil(b, shape["B"]) * tiles, w.device,
        V, V.stride(0), V.stride(1), w, w.stride(0), w.stride(1),
        ab, _member(ab), last, _member(last), before, _member(before), partial, b, j, n, tiles, **shape,
    )  # fmt: skip
    _sum(partial, out, tiles)


def update(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    """w <- w - V'c; out = w'w; row[0] <- row[1] w."""
    (E, j, n), b, tiles = V.shape, w.shape[1], ceil(V.shape[2], TILE)
    shape = _shape_of(b)
    target, factor = row if row is not None else (None, None)
    partial = _partial(w, E * b * tiles)
    launch(
        kernels.update, E * ceil(b, shape["B"]) * tiles, w.device,
        V, V.stride(0), V.stride(1), w, w.stride(0), w.stride(1), c, c.stride(0), c.stride(1),
        target, _member(target), factor, _member(factor), partial, b, j, n, tiles, **shape,
    )  # fmt: skip
    _sum(partial, out[:, :, None], tiles)


def combine(S: Tensor, V: Tensor, out: Tensor) -> None:
    """out = S V."""
    (k, j), n = S.shape, V.shape[1]
    block = _COMBINE_WARPS * 32 * (16 // V.element_size())  # 16 bytes a lane: then no two warps share a column
    launch(
        vectors.combine, ceil(n, block), V.device, S, S.stride(0), V, V.stride(0), out, out.stride(0), k, j, n,
        K=min(8, power_of_two(k)), R=2, BLOCK=block, num_warps=_COMBINE_WARPS,
    )  # fmt: skip


def probes(kind: str, seed: int, first: int, out: Tensor) -> None:
    """Row i is vector first + i of the stream of `seed`."""
    b, n = out.shape
    tiles = ceil(n, _COUNTERS[kind] * _PER_COUNTER[kind])
    signed = seed - 2**64 if seed >= 2**63 else seed
    kernel = vectors.rademacher if kind == "rademacher" else vectors.normal
    launch(kernel, b * tiles, out.device, signed, first, out, out.stride(0), n, tiles, Q=_COUNTERS[kind], num_warps=4)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: float | str) -> None:
    """Run a kernel on a flat grid, with `device` current; a failure of Triton becomes a KernelError that names it."""
    current: Callable[[torch.device], Any] = torch.cuda.device if device.type == "cuda" else nullcontext
    try:
        with current(device):
            kernel[(programs,)](*args, **constants)
    except (RuntimeError, triton.TritonError) as e:
        raise KernelError(f"Triton kernel failed: {str(e).strip().splitlines()[-1]}. Use force('reference') to go on.") from e


def _shape_of(b: int) -> dict[str, int]:
    """Vectors and rows held at once, and warps: a function of b alone, so that equal calls give equal bits."""
    B = min(8, power_of_two(b))
    return {"B": B, "R": 4 if B == 1 else 2 if B == 2 else 1, **_chunks(), "num_warps": 4 if B <= 2 else 8}


def _chunks() -> dict[str, int]:
    return {"G": TILE // CHUNK, "C": CHUNK}


def _sum(partial: Tensor, out: Tensor, tiles: int) -> None:
    """The second stage: out (E, b, width) from partial, in a launch of its own, since programs of one launch have no order."""
    E, b, width = out.shape
    launch(
        kernels.sum_partials, E * b * width, out.device,
        partial, out, out.stride(0), out.stride(1), b, width, tiles, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def _partial(w: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=w.device)


def _member(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()
