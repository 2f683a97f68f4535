"""Which dual ops a product runs, on a CPU and, where there is one, on a GPU, and that it is autograd's there too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsharp
from fastsharp.curvature.rop.rules import loss
from fastsharp.ops import _registry, dual, force


class _Block(nn.Module):
    """Layer norm, attention of two heads, and a head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rules_reach_the_kernels_of_the_device(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _registry.available()[device]
    if isinstance(found, str):
        pytest.skip(found)
    torch.manual_seed(0)
    model = _Block().to(device, dtype)
    data = [(torch.randn(6, 5, 4, dtype=dtype, device=device), torch.arange(6, device=device) % 3)]
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=dtype, device=device)
    called: set[str] = set()

    def recorded(op: str) -> Any:
        def run(*args: Any) -> None:
            called.add(op)
            getattr(found.dual, op)(*args)

        return run

    monkeypatch.setattr(loss, "FUSED_CLASSES", 3)
    with force(replace(found, dual=_registry.Dual(**{op: recorded(op) for op in _registry.Dual.__dataclass_fields__}))):
        got = fastsharp.Hessian(model, data, F.cross_entropy, backend="rop") @ v
    assert called == {"norm_prepare", "norm_tangent", "norm_adjoint", "softmax_product"}
    theirs = fastsharp.Hessian(model, data, F.cross_entropy, backend="autograd") @ v
    model, data = model.double(), [(x.double(), y) for x, y in data]
    want = fastsharp.Hessian(model, data, F.cross_entropy, backend="autograd") @ v.double()
    ours, torchs = (float((h.double() - want).norm()) for h in (got, theirs))
    assert ours <= 2 * torchs + 32 * torch.finfo(dtype).eps * float(want.norm())


def test_without_kernels_for_the_device_torchs_own_formulas_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a dual op was called")

    for op in ("norm_prepare", "softmax_product"):
        monkeypatch.setattr(dual, op, never)
    monkeypatch.setattr(dual, "fused", lambda t: False)
    model = _Block().double()
    data = [(torch.randn(6, 5, 4, dtype=torch.float64), torch.arange(6) % 3)]
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    got, want = (fastsharp.Hessian(model, data, F.cross_entropy, backend=backend) @ v for backend in ("rop", "autograd"))
    assert float((got - want).norm()) <= 1e-12 * float(want.norm())
