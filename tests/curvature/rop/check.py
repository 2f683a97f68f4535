"""One rule alone against torch's double backward in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

import fastsharp.curvature.rop.rules  # noqa: F401
from fastsharp.curvature.rop.rule import RULES, Call, Part


def part_of(func: Any, *args: Any, active: Sequence[int] | None = None, **kwargs: Any) -> tuple[Call, Part]:
    """The call of `func` on these arguments and its part; `active` numbers the tensors that depend on parameters (default: all
    floating-point ones)."""
    leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    chosen = [i for i, t in enumerate(leaves) if t.is_floating_point()] if active is None else list(active)
    with torch.no_grad():
        call = Call(func, args, kwargs, func(*args, **kwargs), lambda t: any(t is leaves[i] for i in chosen))
    part = RULES[func](call)
    assert part is not None, f"the rule of {func} refuses these arguments"
    return call, part


def check_rule(
    func: Any,
    *args: Any,
    active: Sequence[int] | None = None,
    b: int = 3,
    seed: int = 0,
    outputs: Sequence[int] | None = None,
    **kwargs: Any,
) -> None:
    """tangent, adjoint, tangent of the adjoint and J' alone, for b vectors, against autograd; float64 inputs give <= 1e-12 relative.

    outputs   those that have an adjoint (default: all that autograd differentiates)
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    call, part = part_of(func, *args, active=active, **kwargs)
    on = [i for i, a in enumerate(call.active) if a]
    differentiable = [i for i, t in enumerate(call.outputs) if t.is_floating_point() and (outputs is None or i in outputs)]

    # the same call as a differentiable function of its active inputs
    leaves, spec = tree_flatten((args, kwargs))
    places = [k for k, t in enumerate(leaves) if isinstance(t, torch.Tensor)]
    xs = [call.inputs[i].detach().clone(memory_format=torch.preserve_format).requires_grad_() for i in on]
    for i, x in zip(on, xs, strict=True):
        leaves[places[i]] = x
    again_args, again_kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        results = [t for t in tree_flatten(func(*again_args, **again_kwargs))[0] if isinstance(t, torch.Tensor)]
    used = [i for i in differentiable if results[i].requires_grad]
    ys = [results[i] for i in used]
    y_g = [random(*y.shape).to(y.dtype) for y in ys]
    y_gt = [random(b, *y.shape).to(y.dtype) for y in ys]
    x_t = [random(b, *x.shape).to(x.dtype) for x in xs]

    grads = torch.autograd.grad(ys, xs, y_g, create_graph=True, allow_unused=True, materialize_grads=True)
    duals = [torch.zeros_like(y, requires_grad=True) for y in ys]
    linear = torch.autograd.grad(ys, xs, duals, create_graph=True, allow_unused=True, materialize_grads=True)

    tolerance = 1e-12 if all(x.dtype == torch.float64 for x in xs) else 1e-5
    if part.second_order is False:
        assert all(not g.requires_grad or not g.grad_fn or _is_constant(g, xs) for g in grads), "J depends on x, second_order is False"

    full_t: list[Any] = [None] * len(call.inputs)
    for i, t in zip(on, x_t, strict=True):
        full_t[i] = t.clone()
    got_y, kept = part.tangent(full_t)
    full_g: list[Any] = [None] * len(call.outputs)
    full_gt: list[Any] = [None] * len(call.outputs)
    for i, g, gt in zip(used, y_g, y_gt, strict=True):
        full_g[i], full_gt[i] = g, gt
    got_g = part.adjoint(full_g)
    got_gt = part.backward(full_gt, kept, [None] * len(call.inputs))
    got_j = part.backward(full_gt, None, [None] * len(call.inputs))
    for i, t in zip(on, x_t, strict=True):
        assert torch.equal(full_t[i], t), "tangent() wrote into its input"
    for k in range(b):
        want_y = torch.autograd.grad(linear, duals, [t[k] for t in x_t], retain_graph=True, allow_unused=True, materialize_grads=True)
        for i, want in zip(used, want_y, strict=True):
            _close(got_y[i], k, want, tolerance, f"tangent of output {i}")
        want_j = torch.autograd.grad(ys, xs, [g[k] for g in y_gt], retain_graph=True, allow_unused=True, materialize_grads=True)
        second = (
            torch.autograd.grad(
                [g for g in grads if g.requires_grad],
                xs,
                [t[k] for g, t in zip(grads, x_t, strict=True) if g.requires_grad],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if any(g.requires_grad for g in grads)
            else [torch.zeros_like(x) for x in xs]
        )
        for i, j, s in zip(on, want_j, second, strict=True):
            _close(got_j[i], k, j, tolerance, f"J' y_gt of input {i}")
            _close(got_gt[i], k, j + s, tolerance, f"tangent of the adjoint of input {i}")
    for i, want in zip(on, grads, strict=True):
        _close(None if got_g[i] is None else got_g[i].unsqueeze(0), 0, want.detach(), tolerance, f"adjoint of input {i}")
    for i, a in enumerate(call.active):
        if not a:
            assert got_gt[i] is None, f"input {i} is not active and got a result"


def _is_constant(g: torch.Tensor, xs: Sequence[torch.Tensor]) -> bool:
    again = torch.autograd.grad(g.sum(), xs, retain_graph=True, allow_unused=True)
    return all(a is None or not a.abs().max() > 0 for a in again)


def _close(got: torch.Tensor | None, k: int, want: torch.Tensor, tolerance: float, what: str) -> None:
    value = torch.zeros_like(want) if got is None else got[k]
    assert value.shape == want.shape, f"{what}: shape {tuple(value.shape)}, expected {tuple(want.shape)}"
    error = float((value - want).detach().abs().max()) if want.numel() else 0.0
    scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    assert error <= tolerance * scale, f"{what}, vector {k}: off by {error:.2e} (scale {scale:.1e})"
