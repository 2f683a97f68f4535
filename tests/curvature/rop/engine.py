"""The engine on a function of tensors, and the same by autograd, densely, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastsharp.curvature.rop.linearise import Linearised
from fastsharp.curvature.rop.tape import record
from fastsharp.guard import untouched

CPU = torch.device("cpu")
Evaluate = Callable[[], tuple[Any, torch.Tensor]]


def linearised(fn: Evaluate, params: Sequence[torch.Tensor], model: nn.Module | None = None, **options: Any) -> Linearised:
    with untouched(model or nn.Module(), CPU):
        return Linearised(record(fn, params, modules=model), **options)


def dense(lin: Linearised, params: Sequence[torch.Tensor], *, gauss: bool = False) -> torch.Tensor:
    """The whole matrix, its columns as one block of products."""
    n = sum(p.numel() for p in params)
    V, out = torch.eye(n, dtype=params[0].dtype), torch.zeros(n, n, dtype=params[0].dtype)
    lin.product(rows(V, params), rows(out, params), gauss=gauss)
    return out


def rows(V: torch.Tensor, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(b, n) as one strided view (b, *shape) a parameter."""
    parts = V.split([p.numel() for p in params], dim=1)
    return [part.unflatten(1, p.shape) if p.ndim else part.squeeze(1) for part, p in zip(parts, params, strict=True)]


def hessian(fn: Evaluate, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """By double backward, a row at a time."""
    with untouched(nn.Module(), CPU):
        loss = fn()[1]
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        return torch.stack([_gradient(entry, params) for entry in flat])


def gauss_newton(fn: Evaluate, params: Sequence[torch.Tensor], loss_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """J' L J from a dense Jacobian of the output and a dense Hessian of the loss by it."""
    with untouched(nn.Module(), CPU):
        output = fn()[0]
        J = torch.stack([_gradient(entry, params) for entry in output.reshape(-1)])
        z = output.detach()
        L = torch.autograd.functional.hessian(loss_of, z).reshape(z.numel(), z.numel())
        return J.T @ L @ J


def _gradient(y: torch.Tensor, params: Sequence[torch.Tensor]) -> torch.Tensor:
    if not y.requires_grad:
        return torch.zeros(sum(p.numel() for p in params), dtype=y.dtype)
    grads = torch.autograd.grad(y, params, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


def same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Both are sums of some hundred float64 terms of the size of the largest entry: 1e-13 of it is rounding."""
    assert got.shape == want.shape
    error, scale = float((got - want).abs().max()), max(1.0, float(want.abs().max()))
    assert error <= tolerance * scale, f"off by {error:.2e} (scale {scale:.1e})"


def check(fn: Evaluate, params: Sequence[torch.Tensor], model: nn.Module | None = None) -> Linearised:
    """Loss, gradient and Hessian of the tape are those of autograd."""
    lin = linearised(fn, params, model)
    with untouched(nn.Module(), CPU):
        loss = fn()[1]
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    assert torch.equal(lin.loss, loss.detach())
    assert lin.gradient is not None
    for got, want in zip(lin.gradient, grads, strict=True):
        same(torch.zeros_like(want) if got is None else got, want, 1e-13)
    H = hessian(fn, params)
    same(dense(lin, params), H)
    assert float(H.abs().max()) > 1e-6, "the case has no curvature: it would pass whatever the tape"
    return lin
