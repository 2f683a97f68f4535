"""The cache of csrc/include/fastsharp/mlp.hpp filled from a primal pass, and the native product on it."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsharp.ops import _border
from fastsharp.ops._mlp_tiles import Tiles, tiled, tiles

if TYPE_CHECKING:
    from fastsharp.ops.mlp import Primal, Product

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
_LOSSES = {"cross_entropy": 0, "squared": 1}
_TILE_BYTES, _LINE_BYTES = 256, 64


def native_mlp(module: ModuleType, primal: Primal) -> tuple[Product, int]:
    """The native product on the cache of these nets, and the bytes of that cache."""
    net, theta = primal.net, primal.theta
    suffix = _SUFFIX[theta.dtype]
    widths = torch.tensor(net.widths)
    weights = torch.tensor(net.weights)
    biases = torch.tensor([-1 if b is None else b for b in net.biases])
    tables = [_border.address(t) for t in (widths, weights, biases)]
    shape = (net.layers, *tables, net.curved, _LOSSES[net.loss], primal.samples, net.n)
    # ReLU's second derivative is zero and its first one is where the unit is off: then nothing of the unit is left in a tile
    cut = tiles(primal.slope or (primal.a[0],), net.widths, _TILE_BYTES // theta.element_size(), net.activation == "relu")
    cache = _cache(primal, cut, getattr(module, f"mlp_tile_size_{suffix}")(*shape))
    size, kernel = getattr(module, f"mlp_workspace_size_{suffix}"), getattr(module, f"mlp_product_{suffix}")
    held = (widths, weights, biases, cache, theta, cut)  # the kernel reads them at every call
    fixed = tuple(_border.address(t) for t in (cache, theta, cut.units, cut.counts))
    work = theta.new_empty(0)
    room = (0, 0)  # rows and threads that `work` was made for

    def product(V: Tensor, member: Tensor, out: Tensor, gauss: bool, scale: float, divisor: float) -> None:
        nonlocal work, room
        assert held
        rows, threads = V.shape[0], torch.get_num_threads()
        if room != (rows, threads):
            needed, room = size(*shape, rows, threads), (rows, threads)
            if work.numel() < needed:
                work = theta.new_empty(needed)
        vectors = (rows, _border.address(member), _border.address(V), V.stride(0), _border.address(out), out.stride(0))
        _border.call(kernel, *shape, gauss, *fixed, *vectors, scale, divisor, _border.address(work), threads)

    return product, cache.nbytes + cut.units.nbytes + cut.counts.nbytes


def _cache(primal: Primal, cut: Tiles, tile_size: int) -> Tensor:
    """(E, tiles, tile size) as the header says."""
    net, (E, _) = primal.net, primal.w.shape
    step = _TILE_BYTES // primal.w.element_size()
    line = _LINE_BYTES // primal.w.element_size()
    count = cut.counts.shape[1]
    cache = primal.w.new_zeros(E, count, tile_size)
    units = torch.split(cut.units, list(net.widths), -1)
    at = 0

    def put(t: Tensor, l: int | None, both: bool = False) -> None:  # noqa: E741
        """t (E, N, d) of layer l as tiles (d, step), and with `both` as (step, d padded) too; units that take part come first."""
        nonlocal at
        d = t.shape[-1]
        values = tiled(t, cut.order, step)
        if l is not None and cut.left_out[l]:
            values = values.gather(-1, units[l][:, :, None].expand(E, count, step, d))
        cache[:, :, at : at + d * step].view(E, count, d, step)[:] = values.mT
        at += d * step
        if both:
            padded = -(-d // line) * line
            cache[:, :, at : at + step * padded].view(E, count, step, padded)[..., :d] = values
            at += step * padded

    for l, a in enumerate(primal.a):  # noqa: E741
        put(a, l, both=True)
    for t in (primal.slope, *((primal.bend,) if net.curved else ()), primal.y):
        for l, values in enumerate(t, 1):  # noqa: E741
            put(values, l)
    if primal.p is not None:
        put(primal.p, net.layers)
    put(primal.w[..., None], None)
    if at != tile_size:
        raise AssertionError(f"the cache of the kernel has {tile_size} entries a tile, {at} were written")
    return cache
