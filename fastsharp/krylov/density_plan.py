"""The memory plan of a density: how many probes run at once, and where their bases live, decided before the first product.

    rows of n elements: for each probe that runs, `steps` of basis, the vector in work and the start vector; two of scratch

In this order, the first that fits the budget: all probes in lockstep in the operator's dtype; fewer at once, one group after another, which
costs more passes over the data and no accuracy; one probe at a time on scaled float16 rows (float32 operators); one at a time on rows in
host memory (GPU). A density has no restarts: the quadrature needs the whole of T.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastsharp.errors import BasisMemoryError
from fastsharp.krylov.basis import Basis, HalfRows, HostRows, padded
from fastsharp.krylov.plan import HALF_RING, STAGING, UNRATIONED, spoken

_SCRATCH = 2  # rows: a start vector while it is normalised


@dataclass(frozen=True)
class DensityPlan:
    """What a density will hold in memory; part of a result's settings.

    storage            "float32", "float64" or "float16": of the bases
    place              "device" or "host"
    rows               of one basis
    at_once            probes that run in lockstep
    bytes              bases, vectors in work and start vectors at full size, on the device
    host_bytes         the same in host memory
    expected_products  probes * steps
    budget             bytes that were allowed, None for no limit
    """

    storage: str
    place: str
    rows: int
    at_once: int
    bytes: int
    host_bytes: int
    expected_products: int
    budget: int | None

    def __str__(self) -> str:
        how = f"{self.rows} rows of {self.storage} on the {self.place} for each of {self.at_once} probes at once"
        size = f"{spoken(self.bytes)} on the device" + (f" and {spoken(self.host_bytes)} on the host" if self.host_bytes else "")
        return f"density: {how}; {size}; at most {self.expected_products} products"

    @property
    def apart(self) -> bool:
        """Whether probes run one by one, on a basis that is not in the operator's dtype on its device."""
        return self.storage == "float16" or self.place == "host"

    def record(self) -> dict[str, Any]:
        """Plain data for the settings of a result."""
        return asdict(self)

    def basis(self, n: int, dtype: torch.dtype, device: torch.device) -> Basis:
        """The empty basis of one probe, where they run `apart`; the row behind the last one is never stored."""
        if self.place == "host":
            return HostRows(n, dtype, device, self.rows + 1)
        return HalfRows(n, device, self.rows + 1, upfront=True)


def make_density_plan(
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    probes: int,
    steps: int,
    memory: int | None = None,
    host_memory: int | None = None,
) -> DensityPlan:
    """The plan for `probes` runs of `steps` steps on R^n within `memory` bytes on the device and `host_memory` beside it; None: no limit.

    Raises BasisMemoryError, with the bytes that would do, where not even one probe fits.
    """
    row, steps = padded(n) * (torch.finfo(dtype).bits // 8), min(steps, n)
    name = str(dtype).removeprefix("torch.")
    each, scratch = (steps + 2) * row, _SCRATCH * row

    def plan(storage: str, place: str, at_once: int, on_device: int, on_host: int = 0) -> DensityPlan:
        return DensityPlan(storage, place, steps, at_once, on_device, on_host, probes * steps, memory)

    whole = probes * each + scratch
    if memory is None or whole <= max(memory, UNRATIONED):
        return plan(name, "device", probes, whole)
    fit = (memory - scratch) // each
    if fit >= 1:
        return plan(name, "device", min(fit, probes), min(fit, probes) * each + scratch)
    half = (steps + 1) * (row // 2) + (HALF_RING + 1) * row + scratch
    if dtype == torch.float32 and half <= memory:
        return plan("float16", "device", 1, half)
    staged, rows = (STAGING + 1) * row + scratch, steps + 8  # rows come in blocks of eight
    if device.type == "cuda" and staged <= memory and (host_memory is None or rows * row <= host_memory):
        return plan(name, "host", 1, staged, rows * row)
    least = half if dtype == torch.float32 else each + scratch
    fitting = _steps_that_fit(memory, row, dtype)
    fewer = f"take fewer steps ({fitting} would fit), " if fitting else ""
    raise BasisMemoryError(
        f"density: {steps} steps on n = {n:,} parameters need {spoken(least)} for one probe at least, the budget is {spoken(memory)}.\n"
        f"Raise memory= (half of it is for the basis), {fewer}or choose fewer parameters with params=."
    )


def _steps_that_fit(memory: int, row: int, dtype: torch.dtype) -> int:
    """Steps of one probe within `memory`."""
    if dtype == torch.float32:
        return max((memory - (HALF_RING + 1 + _SCRATCH) * row) // (row // 2) - 1, 0)
    return max((memory - _SCRATCH * row) // row - 2, 0)
