"""The Hessian of the loss by the network's output as S' D S, sample by sample: rows S that are pulled back in place of unit vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastsharp.curvature.rop.split import Split

Tensor = torch.Tensor

_GATE = 2.0**12  # eps: healthy losses stay below 50, a loss that couples samples misses by its own size


@dataclass(frozen=True)
class LossRoot:
    """H_L = sum over samples s of S_s' D_s S_s.

    rows   (r, samples, width): row i of S_s is rows[i, s]; r <= width, since rows that are zero for all samples are left out
    signs  (r, samples) of 1 and -1, the diagonal of D; None where all are 1: the loss is convex in the output
    """

    rows: Tensor
    signs: Tensor | None


def loss_root(split: Split, generator: torch.Generator, like: Tensor) -> LossRoot | None:
    """The root from `width` products with H_L and one eigendecomposition a sample, in float64; None where samples are coupled.

    Eigenvalues within rounding of zero are zero: the softmax has one for every sample. like: dtype and device
    """
    samples, width = split.samples, split.width
    units = torch.eye(width, dtype=like.dtype, device=like.device)[:, None].expand(width, samples, width)
    columns = split.curve(units.reshape(width, *split.shape)).reshape(width, samples, width)
    H = columns.permute(1, 0, 2).double()
    H = (H + H.mT) / 2
    values, vectors = torch.linalg.eigh(H)  # (samples, width), columns of vectors
    eps = torch.finfo(like.dtype).eps
    least = torch.finfo(like.dtype).tiny / eps  # products with anything smaller underflow
    floor = (8 * width * eps * values.abs().amax(1, keepdim=True)).clamp(min=least)
    values = torch.where(values.abs() > floor, values, 0.0)
    chosen = (values != 0.0).any(0)
    rows = (vectors * values.abs().sqrt()[:, None]).permute(2, 0, 1)[chosen]
    signs = torch.where(values < 0.0, -1.0, 1.0).T[chosen]
    z = torch.randn(split.shape, generator=generator, dtype=torch.float64).to(like)
    exact = split.curve(z[None]).reshape(samples, width).double()
    inner = (rows * z.reshape(samples, width).double()).sum(2) * signs
    missed = ((inner[:, :, None] * rows).sum(0) - exact).norm()
    scale = values.abs().amax(1).clamp(min=width * least / eps) * z.reshape(samples, width).double().norm(dim=1)
    if not float(missed) <= _GATE * eps * float(scale.norm()):
        return None
    negative = bool((signs < 0.0).any())
    return LossRoot(rows.to(like.dtype), signs.to(like.dtype) if negative else None)
