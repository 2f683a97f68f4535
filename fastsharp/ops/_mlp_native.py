"""The cache of csrc/include/fastsharp/mlp.hpp filled from a primal pass, and the native product on it."""

from __future__ import annotations

from collections.abc import Callable
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


def native_mlp(module: ModuleType, place: Callable[[torch.device], tuple[int, ...]], primal: Primal) -> tuple[Product, int]:
    """The native product on the cache of these nets, and the bytes of that cache. `place` ends the arguments: threads, or device and stream."""
    net, theta = primal.net, primal.theta
    suffix = _SUFFIX[theta.dtype]
    widths = torch.tensor(net.widths)
    weights = torch.tensor(net.weights)
    biases = torch.tensor([-1 if b is None else b for b in net.biases])
    tables = [_border.address(t) for t in (widths, weights, biases)]
    shape = (net.layers, *tables, net.curved, _LOSSES[net.loss], primal.samples, net.n)
    on_cpu = theta.device.type == "cpu"
    # ReLU's second derivative is zero and its first one is where the unit is off: then nothing of the unit is left in a tile
    sparse = on_cpu and net.activation == "relu"
    cut = tiles(primal.slope or (primal.a[0],), net.widths, _TILE_BYTES // theta.element_size(), sparse)
    cache = _cache(primal, cut, getattr(module, f"mlp_tile_size_{suffix}")(shape), transposes=on_cpu)
    size, kernel = getattr(module, f"mlp_workspace_size_{suffix}"), getattr(module, f"mlp_product_{suffix}")
    held = (widths, weights, biases, cache, theta, cut)  # the kernel reads them at every call
    fixed = tuple(_border.address(t) for t in (cache, theta, cut.units, cut.counts))
    work = theta.new_empty(0)
    member = placed = torch.empty(0, dtype=torch.int64)  # of the call before, on the host and on the device
    room: tuple[int, ...] = ()  # rows and place that `work` was made for

    def product(V: Tensor, members: Tensor, out: Tensor, gauss: bool, scale: float, divisor: float) -> None:
        nonlocal work, member, placed, room
        assert held
        rows, at = V.shape[0], place(V.device)
        if room != (rows, *at) or not on_cpu:  # on a GPU the allocator keeps streams apart
            needed, room = size(shape, rows, *at), (rows, *at)
            if work.numel() < needed or not on_cpu:
                work = theta.new_empty(needed)
        if on_cpu:
            placed = members
        elif not torch.equal(member, members):
            member, placed = members.clone(), members.to(V.device)
        vectors = (rows, _border.address(placed), _border.address(V), V.stride(0), _border.address(out), out.stride(0), scale, divisor)
        _border.call(kernel, shape, gauss, fixed, vectors, _border.address(work), *at)

    return product, cache.nbytes + cut.units.nbytes + cut.counts.nbytes


def _cache(primal: Primal, cut: Tiles, tile_size: int, *, transposes: bool) -> Tensor:
    """(E, tiles, tile size) as the header says, with or without the transposes of a_l."""
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
        put(a, l, both=transposes)
    for t in (primal.slope, *((primal.bend,) if net.curved else ()), primal.y):
        for l, values in enumerate(t, 1):  # noqa: E741
            put(values, l)
    if primal.p is not None:
        put(primal.p, net.layers)
    put(primal.w[..., None], None)
    if at != tile_size:
        raise AssertionError(f"the cache of the kernel has {tile_size} entries a tile, {at} were written")
    return cache
