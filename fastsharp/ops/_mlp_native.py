"""The cache of csrc/include/fastsharp/mlp.hpp filled from a primal pass, and the native product on it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsharp.ops import _border

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
    cache = _cache(primal, getattr(module, f"mlp_tile_size_{suffix}")(shape), transposes=theta.device.type == "cpu")
    size, kernel = getattr(module, f"mlp_workspace_size_{suffix}"), getattr(module, f"mlp_product_{suffix}")
    held = (widths, weights, biases)  # the kernel reads them at every call
    work = theta.new_empty(0)
    member = placed = torch.empty(0, dtype=torch.int64)  # of the call before, on the host and on the device

    def product(V: Tensor, members: Tensor, out: Tensor, gauss: bool) -> None:
        nonlocal work, member, placed
        assert held
        at = place(V.device)
        needed = size(shape, V.shape[0], *at)
        if work.numel() < needed or theta.is_cuda:  # there the allocator keeps streams apart
            work = theta.new_empty(needed)
        if not torch.equal(member, members):
            member = members.clone()
            placed = member.to(V.device)
        rows = (V.shape[0], _border.address(placed), _border.address(V), V.stride(0), _border.address(out), out.stride(0))
        _border.call(kernel, shape, gauss, _border.address(cache), _border.address(theta), rows, _border.address(work), *at)

    return product, cache.nbytes


def _cache(primal: Primal, tile_size: int, *, transposes: bool) -> Tensor:
    """(E, tiles, tile size) as the header says, with or without the transposes of a_l."""
    net, (E, N) = primal.net, primal.w.shape
    step = _TILE_BYTES // primal.w.element_size()
    line = _LINE_BYTES // primal.w.element_size()
    tiles = -(-N // step)
    cache = primal.w.new_zeros(E, tiles, tile_size)
    at = 0

    def put(t: Tensor, columns: int, transposed: bool) -> None:
        """t (E, N, d) as tiles (step, columns) or, transposed, as (d, step)."""
        nonlocal at
        d = t.shape[-1]
        length = d * step if transposed else step * columns
        part = cache[:, :, at : at + length]
        part = part.view(E, tiles, d, step).mT if transposed else part.view(E, tiles, step, columns)
        whole, rest = divmod(N, step)
        part[:, :whole, :, :d] = t[:, : whole * step].reshape(E, whole, step, d)
        if rest:
            part[:, whole, :rest, :d] = t[:, whole * step :]
        at += length

    for a in primal.a:
        put(a, 0, True)
        if transposes:
            put(a, -(-a.shape[-1] // line) * line, False)
    for t in (*primal.slope, *(primal.bend if net.curved else ()), *primal.y, *(() if primal.p is None else (primal.p,))):
        put(t, 0, True)
    put(primal.w[..., None], 0, True)
    if at != tile_size:
        raise AssertionError(f"the cache of the kernel has {tile_size} entries a tile, {at} were written")
    return cache
