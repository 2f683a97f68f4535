"""The ceiling of a kernel that is limited by memory: how fast this machine reads, measured in the same run.

Two ways to read V once: our own read-stream kernel (the sum of all elements, same threads and tiles as the ops) and torch's sum.
The better of both is the ceiling, so that neither a slow yardstick nor a lucky one flatters the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import Timing, Variant
from fastsharp.ops import _border, _registry

READS = ("read_stream", "torch.sum")


def read_variants(x: Tensor) -> list[Variant]:
    """Reading the contiguous tensor x once, both ways; on a GPU torch's alone."""
    size = x.numel() * x.element_size()
    variants = [Variant("torch.sum", lambda: torch.sum(x), size)]
    module = _registry.native(x.device.type)
    if x.device.type == "cpu" and not isinstance(module, str):
        out = torch.empty(1, dtype=torch.float64)
        work = torch.empty(module.workspace_size(1, 1, x.numel(), 0), dtype=torch.float64)
        kernel = module.read_stream_f32 if x.dtype == torch.float32 else module.read_stream_f64
        at = _border.address
        variants.insert(0, Variant("read_stream", lambda: kernel(at(x), x.numel(), at(out), at(work), torch.get_num_threads()), size))
    return variants


def ceiling(timings: dict[str, Timing]) -> tuple[float, str]:
    """The roofline in GB/s and the name of the read that set it."""
    best = max((t for name, t in timings.items() if name in READS), key=lambda t: t.gbps)
    return best.gbps, best.variant.name
