"""Scaled dot-product attention as one part. The references are torch's products of matrices: the fused kernels have no second derivative."""

from __future__ import annotations

import math
from itertools import chain, combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.curvature.rop.memory import Unrecorded
from fastsharp.curvature.rop.rule import RULES, Call, Part
from fastsharp.curvature.rop.rules.attention import Attention, _softmax_

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
BIASED = aten._scaled_dot_product_efficient_attention.default

Tensor = torch.Tensor


def _random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        s = s + torch.full(s.shape[2:], -math.inf, dtype=s.dtype).triu(1)
    if mask is not None:
        s = s + (torch.zeros_like(s).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask)
    return torch.softmax(s, -1) @ v


def _part(func: Any, xs: list[Tensor], mask: Tensor | None, causal: bool, scale: float | None, active: tuple[int, ...], y: Tensor) -> Part:
    if func is FLASH:
        args: tuple[Any, ...] = (*xs[:3], 0.0, causal)
        kwargs: dict[str, Any] = {"attn_mask": mask, "scale": scale}
    else:
        args, kwargs = (*xs[:3], mask, True, 0.0, causal), {"scale": scale}
    call = Call(func, args, kwargs, (y, y[..., 0]), lambda t: any(t is xs[i] for i in active))
    part = RULES[func](call)
    assert part is not None
    return part


def _check(func: Any, xs: list[Tensor], mask: Tensor | None, causal: bool, scale: float | None, active: tuple[int, ...], b: int) -> None:
    """All that a part is asked for, against autograd through `_reference`; xs ends with the mask where that is active."""
    leaves = [x.clone().requires_grad_() if i in active else x for i, x in enumerate(xs)]
    y = _reference(*leaves[:3], leaves[3] if len(xs) > 3 else mask, causal, scale)
    on = [leaves[i] for i in active]
    part = _part(func, xs, mask, causal, scale, active, y.detach())
    y_g, y_gt, *x_t = _random(9, y.shape, (b, *y.shape), *((b, *x.shape) for x in on))
    count = 3 + (mask is not None)
    placed: list[Tensor | None] = [None] * count
    for i, t in zip(active, x_t, strict=True):
        placed[i] = t
    (got_y, _), kept = part.tangent(placed)
    got_g = part.adjoint([y_g, None])
    got_gt = part.backward([y_gt, None], kept, [None] * count)
    got_j = part.backward([y_gt, None], None, [None] * count)
    got_s = part.backward([None, None], kept, [None] * count)
    dual = torch.zeros_like(y, requires_grad=True)
    linear = torch.autograd.grad(y, on, dual, create_graph=True)
    want_g = torch.autograd.grad(y, on, y_g, create_graph=True)
    for k in range(b):
        t = [t[k] for t in x_t]
        _close(got_y, k, torch.autograd.grad(linear, dual, t, retain_graph=True)[0])
        first = torch.autograd.grad(y, on, y_gt[k], retain_graph=True)
        if any(w.requires_grad for w in want_g):
            second = torch.autograd.grad(want_g, on, t, retain_graph=True, allow_unused=True, materialize_grads=True)
        else:
            second = tuple(torch.zeros_like(x) for x in on)
        for i, j, s in zip(active, first, second, strict=True):
            _close(got_j[i], k, j)
            _close(got_gt[i], k, j + s)
            _close(got_s[i], k, s)
    for i, w in zip(active, want_g, strict=True):
        _close(None if got_g[i] is None else got_g[i].unsqueeze(0), 0, w.detach())  # type: ignore[union-attr]
    assert all(got_gt[i] is None for i in range(count) if i not in active)


def _close(got: Tensor | None, k: int, want: Tensor) -> None:
    value = torch.zeros_like(want) if got is None else got[k]
    assert value.shape == want.shape
    assert float((value - want).abs().max()) <= 1e-12 * max(1.0, float(want.abs().max()))


SHAPES = {
    "square": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
    "odd": ((2, 2, 3, 5), (2, 2, 7, 5), (2, 2, 7, 5)),
    "grouped": ((2, 6, 4, 3), (2, 2, 5, 3), (2, 2, 5, 3)),
}


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_products_are_autograds(shapes: str, causal: bool, b: int) -> None:
    xs = _random(1, *SHAPES[shapes])
    for active in chain.from_iterable(combinations(range(3), k) for k in (1, 2, 3)):
        _check(FLASH, xs, None, causal, 0.3 if shapes == "odd" else None, active, b)


@pytest.mark.parametrize("shape", [(3, 7), (2, 1, 3, 7), (2, 2, 3, 7), (2, 2, 1, 7)])
def test_masks(shape: tuple[int, ...]) -> None:
    xs = _random(2, *SHAPES["odd"])
    (mask,) = _random(3, shape)
    chosen = mask > -0.5
    chosen[..., 0] = True
    for m in (mask, chosen, torch.zeros_like(mask).masked_fill(~chosen, -math.inf)):
        _check(FLASH, xs, m, False, None, (0, 1, 2), 2)
    for active in ((3,), (0, 3), (0, 1, 2, 3)):
        _check(BIASED, [*xs, mask], mask, False, None, active, 2)


def test_strided_heads_and_the_same_tensor_three_times() -> None:
    (x,) = _random(4, (2, 5, 3 * 2 * 4))
    q, k, v = x.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    _check(FLASH, [q, k, v], None, True, None, (0, 1, 2), 2)
    (x,) = _random(5, (2, 3, 5, 4))
    part = _part(FLASH, [x, x, x], None, False, None, (0,), x)
    together = _part(FLASH, [x, x.clone(), x.clone()], None, False, None, (0,), x)
    (t,) = _random(6, (2, *x.shape))
    alone = together.tangent([t, None, None])[0][0]
    both = part.tangent([t, t, t])[0][0]
    assert alone is not None and both is not None
    _, want = torch.func.jvp(lambda z: _reference(z, z, z, None, False, None), (x,), (t[0],))
    _close(both, 0, want)
    _, want = torch.func.jvp(lambda z: _reference(z, x, x, None, False, None), (x,), (t[0],))
    _close(alone, 0, want)


def test_a_row_that_sees_nothing_is_zero() -> None:
    xs = _random(7, *SHAPES["odd"])
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    y = F.scaled_dot_product_attention(*xs, attn_mask=mask)
    part = _part(FLASH, xs, mask, False, None, (0, 1, 2), y)
    t = _random(8, *((2, *x.shape) for x in xs))
    (y_t, _), kept = part.tangent(t)
    assert y_t is not None and not y_t[:, :, :, 1].any() and y_t.isfinite().all()
    part.adjoint([y, None])
    assert all(g is not None and g.isfinite().all() for g in part.backward([y_t, None], kept, [None] * 4)[:3])


def test_what_has_no_rule() -> None:
    xs = _random(1, *SHAPES["square"])
    y = xs[0]
    assert RULES[FLASH](Call(FLASH, (*xs, 0.1), {}, (y, y), lambda t: True)) is None
    with pytest.raises(Unrecorded, match="normaliser"):
        _part(FLASH, xs, None, False, None, (0,), y).adjoint([y, y[..., 0]])


def test_other_devices_softmax() -> None:
    """The formula that serves them, against the fused pass."""
    p, u = torch.rand(2, 3, 5).softmax(-1), torch.randn(4, 2, 3, 5)
    want = p * u - p * (p * u).sum(-1, keepdim=True)
    torch.testing.assert_close(_softmax_(u.clone(), p), want)
    torch.testing.assert_close(_softmax_(u.bfloat16(), p.bfloat16()).float(), want, rtol=0.05, atol=0.05)


class _Attending(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        out: Tensor = F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)
        return out


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.eye(5, dtype=torch.bool).logical_not()}], ids=str)
def test_the_engine_sees_one_call(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a model are autograd's, through this part and not through those of the MATH kernel."""
    torch.manual_seed(0)
    model = _Attending(**options).double()
    data = [(torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64))]
    v = torch.randn(60, dtype=torch.float64)
    parts = []
    make = Attention.__init__
    monkeypatch.setattr(Attention, "__init__", lambda self, *args: (parts.append(self), make(self, *args))[1])
    for operator in (fastsharp.Hessian, fastsharp.GGN):
        got, want = (operator(model, data, F.mse_loss, backend=backend) @ v for backend in ("rop", "autograd"))
        assert float((got - want).norm()) <= 1e-12 * float(want.norm())
    assert parts
