"""The truth of `fastsharp.ops.mlp`: the tangent passes as batched matrix products in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsharp.ops.mlp import Primal, Product


def mlp(primal: Primal) -> tuple[Product, int]:
    """Products of what `primal` holds, in float64."""
    net, L, dtype = primal.net, primal.net.layers, torch.float64

    def product(V: Tensor, member: Tensor, out: Tensor, gauss: bool, scale: float, divisor: float) -> None:
        rows = member.to(V.device)

        def of_rows(t: Tensor) -> Tensor:
            return t.to(dtype)[rows]

        theta, V64, result = of_rows(primal.theta), V.to(dtype), torch.empty_like(V, dtype=dtype)
        za: list[Tensor] = [torch.zeros_like(of_rows(primal.a[0]))]  # a'_l
        zs: list[Tensor] = []
        for l in range(1, L + 1):  # noqa: E741
            z = of_rows(primal.a[l - 1]) @ net.weight(V64, l).mT + za[-1] @ net.weight(theta, l).mT
            bias = net.bias(V64, l)
            zs.append(z if bias is None else z + bias[:, None])
            if l < L:
                za.append(of_rows(primal.slope[l - 1]) * zs[-1])
        u, w = zs[-1], of_rows(primal.w)[..., None]
        if primal.p is not None:
            p = of_rows(primal.p)
            u = u - u.gather(-1, p.argmax(-1, keepdim=True))  # changes nothing, and nothing cancels where the net is sure
            u = p * (u - (p * u).sum(-1, keepdim=True))
        y = w * u
        for l in range(L, 0, -1):  # noqa: E741
            grad = y.mT @ of_rows(primal.a[l - 1])
            back = y @ net.weight(theta, l)
            if not gauss:
                adjoint = of_rows(primal.y[l - 1])
                grad = grad + adjoint.mT @ za[l - 1]
                back = back + adjoint @ net.weight(V64, l)
            net.weight(result, l).copy_(grad)
            bias = net.bias(result, l)
            if bias is not None:
                bias.copy_(y.sum(1))
            if l > 1:
                y = of_rows(primal.slope[l - 2]) * back
                if primal.bend and not gauss:
                    y = y + of_rows(primal.bend[l - 2]) * zs[l - 2]
        out.copy_(result.mul_(scale).div_(divisor))

    return product, 0
