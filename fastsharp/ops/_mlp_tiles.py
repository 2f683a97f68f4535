"""Which samples share a tile of the native kernel, and which units take part there.

A unit of ReLU that is off for all samples of a tile drops out of every sum of that tile. With s of the units on for a random sample,
neighbours chosen well leave little more than s of them for a tile, and a product between two such layers s^2 of its multiplications: a
third on 2-100-100-2 where samples in their own order leave 0.88. Where inputs have many dimensions patterns have nothing in common,
and the order stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SHARED = 0.1  # of the variance of the patterns along their leading direction: below, halves are no more alike than the whole
_POWER_STEPS = 3
_LOOKED_AT = 128  # samples that a direction is found from


class Tiles(NamedTuple):
    """order (E, N): sample of each place; units (E, tiles, d_0 + .. + d_L), counts (E, tiles, L + 1): as the kernel reads them."""

    order: Tensor
    units: Tensor
    counts: Tensor
    left_out: tuple[bool, ...]  # by layer: whether some unit is off in some tile


def tiles(slopes: tuple[Tensor, ...], widths: tuple[int, ...], size: int, sparse: bool) -> Tiles:
    """Tiles of `size` samples for E nets with phi'(z_l) = slopes[l - 1] (E, N, d_l); not `sparse`: every unit, samples as they come."""
    E, N = slopes[0].shape[:2]
    count = -(-N // size)
    order = torch.arange(N, device=slopes[0].device).expand(E, N)
    if sparse and count > 1:
        order = _alike(torch.cat(slopes, -1), size)
    units, counts = [], []
    for l, d in enumerate(widths):  # noqa: E741
        every = torch.arange(d).expand(E, count, d)
        if sparse and 0 < l < len(widths) - 1:
            on = tiled(slopes[l - 1], order, size).amax(2) > 0
            units.append(on.logical_not().to(torch.uint8).argsort(dim=-1, stable=True))
            counts.append(on.sum(-1))
        else:
            units.append(every)
            counts.append(torch.full((E, count), d))
    left_out = tuple(bool((used < d).any()) for used, d in zip(counts, widths, strict=True))
    return Tiles(order, torch.cat(units, -1), torch.stack(counts, -1), left_out)


def tiled(t: Tensor, order: Tensor, size: int) -> Tensor:
    """t (E, N, d) as (E, tiles, size, d) in this order, zero behind the last sample."""
    E, N, d = t.shape
    count = -(-N // size)
    out = t.new_zeros(E, count * size, d)
    out[:, :N] = t[torch.arange(E, device=t.device)[:, None], order]  # whole rows, eight times faster than gather
    return out.view(E, count, size, d)


def _alike(patterns: Tensor, size: int) -> Tensor:
    """(E, N) samples so that neighbours are alike in their patterns (E, N, d): halved again and again across the leading direction."""
    E, N, _ = patterns.shape
    members, order = torch.arange(E)[:, None], torch.arange(N).repeat(E, 1)
    parts = [(0, -(-N // size))]  # in tiles
    while parts:
        start, stop = parts.pop()
        if stop - start < 2:
            continue
        here = order[:, start * size : stop * size]
        whole = patterns[members, here]
        X = whole[:, :: max(1, here.shape[1] // _LOOKED_AT)]
        X = X - X.mean(1, keepdim=True)
        squares = X.square().sum(-1)
        along = X[members, squares.argmax(1)[:, None]].mT  # (E, d, 1)
        for _ in range(_POWER_STEPS):
            along = X.mT @ (X @ along)
            along = along / along.norm(dim=1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
        if float((X @ along).square().sum()) <= _SHARED * float(squares.sum()):
            continue
        order[:, start * size : stop * size] = here.gather(1, (whole @ along)[..., 0].argsort(dim=1, stable=True))
        middle = (start + stop) // 2
        parts += [(start, middle), (middle, stop)]
    return order
