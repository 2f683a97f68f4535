"""H_L = S' D S, sample by sample: rows S that are pulled back through the network, D = diag(1 and -1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsharp import errors

_GATE = 2.0**12  # eps: a loss that couples samples misses by its own size


def loss_root(loss: Tensor, z: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Rows (r, samples, width) and signs (r, samples), 0 where a sample has fewer than r rows.

    `width` products with H_L give every sample's block, an eigendecomposition in float64 its root: for the cross-entropy of C classes
    diag(p) - p p' of rank C - 1. Eigenvalues within rounding of zero are left out. InputError where the loss couples samples.
    """
    width = z.numel() // samples
    (slope,) = torch.autograd.grad(loss, z, create_graph=True, materialize_grads=True)
    if not slope.requires_grad:
        return z.new_zeros((0, samples, width)), z.new_zeros((0, samples))

    def curve(u: Tensor) -> Tensor:
        (h,) = torch.autograd.grad(slope, z, u.reshape(z.shape), retain_graph=True, materialize_grads=True)
        return h.reshape(samples, width)

    H = z.new_empty((samples, width, width), dtype=torch.float64)
    for c in range(width):
        unit = torch.zeros((samples, width), dtype=z.dtype, device=z.device)
        unit[:, c] = 1.0
        H[:, :, c] = curve(unit)
    H = (H + H.mT) / 2
    values, vectors = torch.linalg.eigh(H)
    eps = torch.finfo(z.dtype).eps
    size = values.abs().amax(1, keepdim=True) if width else values
    top = float(size.max()) if size.numel() else 0.0
    if top == 0.0:
        return z.new_zeros((0, samples, width)), z.new_zeros((0, samples))
    signs_of_sample = (torch.arange(samples, device=z.device, dtype=z.dtype) * 2.399963).cos()[:, None]  # differ from sample to sample
    u = signs_of_sample * torch.linspace(0.5, 1.5, width, dtype=z.dtype, device=z.device)
    missed = curve(u).double() - (H @ u.double()[:, :, None])[:, :, 0]
    if not float(missed.norm()) <= _GATE * eps * top * float(u.norm()):
        raise errors.InputError(
            "ggn_spectrum: the loss couples the samples of a batch, so that its Hessian by the output is no block for each sample.\n"
            "Use fastsharp.lanczos(operator='ggn'), which takes such a loss."
        )
    values = torch.where(values.abs() > eps * torch.clamp(width * size, min=top), values, 0.0)
    order = values.abs().argsort(dim=1, descending=True)
    r = int((values != 0.0).sum(1).max())
    chosen = order[:, :r]
    values = values.gather(1, chosen)
    rows = vectors.gather(2, chosen[:, None].expand(samples, width, r)) * values.abs().sqrt()[:, None]
    return rows.permute(2, 0, 1).to(z.dtype).contiguous(), values.sign().T.to(z.dtype).contiguous()
