"""The memory plan of a run: where the basis lives and when it is restarted, decided before the first product.

    rows of n elements: the basis and the vector in work, then k Ritz vectors and k products that verify them

In this order, the first that fits the budget: all rows in the operator's dtype; float16 rows, where tol allows their rounding; a
thick restart whenever the basis is full; rows in host memory. A budget below the least of these is not met, and the plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastsharp.errors import BasisMemoryError
from fastsharp.krylov.basis import Basis, HalfRows, HostRows, Rows, padded
from fastsharp.krylov.request import Request

UNRATIONED = 16 << 20  # a basis below this many bytes is not worth a restart
_LEAST_TAIL = 8  # rows beyond k that a restarted run needs to get anywhere
_HALF_TOL = 1e-3  # Ritz vectors from float16 rows have residuals of 2e-4 to 4e-4 of the value
STAGING = 8 + 3  # rows on the device when the basis is in host memory
HALF_RING = 3
_RESTART_FACTOR = 1.2  # products against an unrestarted run: 1.0 to 1.13 on the test spectra with k + 8 rows


@dataclass(frozen=True)
class Plan:
    """What a run will hold in memory; part of a result's settings.

    storage            "float32", "float64" or "float16": of the basis
    place              "device" or "host"
    rows               most rows held at once, the one in work included
    kept               Ritz vectors that a thick restart keeps when the basis is full; 0: it never is
    bytes              basis, Ritz vectors and their products at full size, on the device
    host_bytes         the same in host memory
    expected_products  Krylov products of a typical run; an estimate, made before anything is known of the spectrum
    budget             bytes that were allowed, None for no limit
    """

    storage: str
    place: str
    rows: int
    kept: int
    bytes: int
    host_bytes: int
    expected_products: int
    budget: int | None

    def __str__(self) -> str:
        how = f"{self.rows} rows of {self.storage} on the {self.place}" + (f", {self.kept} kept when full" if self.kept else "")
        size = f"{spoken(self.bytes)} on the device" + (f" and {spoken(self.host_bytes)} on the host" if self.host_bytes else "")
        return f"basis: {how}; {size}; about {self.expected_products} products expected"

    def record(self) -> dict[str, Any]:
        """Plain data for the settings of a result."""
        return dict(vars(self))

    def notes(self) -> list[str]:
        """What a result must say of it."""
        notes = []
        if self.storage == "float16":
            notes.append(
                "the basis was stored in scaled float16 to fit the memory budget; eigenvalues and residuals come from full-precision products"
            )
        if self.place == "host":
            notes.append("the basis was kept in host memory to fit the memory budget")
        if self.budget is not None and self.bytes > self.budget:
            notes.append(
                f"the run needs {spoken(self.bytes)} for its basis and Ritz vectors at least, more than the budget of {spoken(self.budget)}"
            )
        return notes

    def basis(self, n: int, dtype: torch.dtype, device: torch.device) -> Basis:
        """The empty basis that was planned; taken whole where the copy of a growth would not fit."""
        upfront = self.budget is not None and self.kept > 0
        if self.place == "host":
            return HostRows(n, dtype, device, self.rows)
        if self.storage == "float16":
            return HalfRows(n, device, self.rows, upfront=upfront)
        return Rows(n, dtype, device, self.rows, upfront=upfront)


def make_plan(
    n: int, dtype: torch.dtype, device: torch.device, request: Request, memory: int | None = None, host_memory: int | None = None
) -> Plan:
    """The plan for `request` on R^n within `memory` bytes on the device and `host_memory` bytes beside it; None: no limit.

    Raises BasisMemoryError when even a restarted basis exceeds what the device and the host have left (`host_memory`).
    """
    size = torch.finfo(dtype).bits // 8
    row, k = padded(n) * size, request.k
    name = str(dtype).removeprefix("torch.")
    whole = request.max_iter + 1
    typical = comfortable_rows(k, request.max_iter)
    products = min(request.max_iter, k + 30)

    def plan(storage: str, place: str, rows: int, per_row: int, extra: int, expected: int = products) -> Plan:
        rows = min(rows, whole)
        kept = 0 if rows == whole else min(max(rows // 2, k + 3), rows - 4)
        on_device = (2 * k + extra) * row + (rows * per_row if place == "device" else 0)
        return Plan(
            storage, place, rows, kept, on_device, rows * per_row if place == "host" else 0, min(expected, request.max_iter), memory
        )

    if memory is None or min(whole, typical) * row <= UNRATIONED:
        unrationed = whole if memory is None else max(typical, UNRATIONED // row, (memory - 2 * k * row) // row)
        return plan(name, "device", unrationed, row, 0)
    full = (memory - 2 * k * row) // row
    if full >= typical:
        return plan(name, "device", full, row, 0)
    half = (memory - (2 * k + HALF_RING) * row) // (row // 2)
    if dtype == torch.float32 and half >= typical and (request.tol >= _HALF_TOL or request.criterion == "value"):
        return plan("float16", "device", half, row // 2, HALF_RING)
    least = k + _LEAST_TAIL
    if full >= least:
        return plan(name, "device", full, row, 0, round(_RESTART_FACTOR * products))
    if device.type == "cuda" and (2 * k + STAGING) * row <= memory and (host_memory is None or typical * row <= host_memory):
        rows = whole if host_memory is None else host_memory // row
        return plan(name, "host", rows, row, STAGING)
    smallest = plan(name, "device", least, row, 0, round(_RESTART_FACTOR * products))
    if host_memory is not None and device.type != "cuda" and smallest.bytes > host_memory:
        raise BasisMemoryError(
            f"lanczos: k = {k} pairs of n = {n:,} need {spoken(smallest.bytes)} at least ({least} basis rows, {2 * k} for Ritz vectors), "
            f"but {spoken(host_memory)} are free.\n"
            "Ask for fewer pairs, choose fewer parameters with params=, or free memory."
        )
    return smallest


def comfortable_rows(k: int, max_iter: int) -> int:
    """Rows with which most runs end before the basis is full: 3 k + 40, or all of them."""
    return min(max_iter, 3 * k + 40) + 1


def whole_bytes(n: int, dtype: torch.dtype, request: Request) -> int:
    """Bytes of a basis that is never full, and of the Ritz vectors."""
    return (request.max_iter + 1 + 2 * request.k) * padded(n) * (torch.finfo(dtype).bits // 8)


def spoken(size: int) -> str:
    """A number of bytes, to three digits."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"
