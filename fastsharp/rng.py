"""Random vectors from private generators: the same numbers on every device, the global RNG never touched."""

from __future__ import annotations

import torch

_CHUNK = 1 << 22  # fixed, since it is part of the stream: another value would give other vectors for the same seed


def generator(seed: int) -> torch.Generator:
    """A private CPU generator; one seed, one stream."""
    g = torch.Generator(device="cpu")
    g.manual_seed(seed)
    return g


def normal(n: int, g: torch.Generator, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """n independent standard normals (n,), drawn on the CPU in float32 and then converted and moved.

    Float32 for every dtype: a float64 run starts from the same vector as a float32 one. Chunks bound the host memory.
    """
    out = torch.empty(n, dtype=dtype, device=device)
    for i in range(0, n, _CHUNK):
        part = out[i : i + _CHUNK]
        part.copy_(torch.randn(part.numel(), generator=g, dtype=torch.float32))
    return out
