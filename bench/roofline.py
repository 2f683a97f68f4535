"""The ceiling of a kernel that is limited by memory: how fast this machine reads, measured in the same run.

Two ways to read V once: our own read-stream kernel (the sum of all elements, same threads and tiles as the ops) and torch's sum; on
a GPU torch's sum and a copy of one half onto the other. The best is the ceiling, so that no slow yardstick flatters the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import Timing, Variant
from fastsharp.ops import _border, _registry

READS = ("read_stream", "torch.sum", "copy")


def read_variants(x: Tensor) -> list[Variant]:
    """Moving as many bytes as the contiguous tensor x has; half-precision numbers are read as the bits of floats. Writes x on a GPU."""
    if x.element_size() == 2:
        x = x.view(-1)[: x.numel() // 2 * 2].view(torch.float32)
    size = x.numel() * x.element_size()
    variants = [Variant("torch.sum", lambda: torch.sum(x), size)]
    if x.device.type != "cpu":
        first, second = x.view(-1)[: x.numel() // 2 * 2].chunk(2)
        return [*variants, Variant("copy", lambda: first.copy_(second), 2 * first.nbytes)]
    module = _registry.native("cpu")
    if not isinstance(module, str):
        out = torch.empty(1, dtype=torch.float64)
        work = torch.empty(module.workspace_size(1, 1, x.numel(), 0), dtype=torch.float64)
        kernel = module.read_stream_f32 if x.dtype == torch.float32 else module.read_stream_f64
        at = _border.address
        variants.insert(0, Variant("read_stream", lambda: kernel(at(x), x.numel(), at(out), at(work), torch.get_num_threads()), size))
    return variants


def ceiling(timings: dict[str, Timing], *also: str) -> tuple[float, str]:
    """The roofline in GB/s and the name of the read that set it, one of READS or `also`."""
    best = max((t for name, t in timings.items() if name in (*READS, *also)), key=lambda t: t.gbps)
    return best.gbps, best.variant.name
