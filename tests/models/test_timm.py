"""timm's networks, small and with random weights: products against double backward and against J' H_L J."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from tests.models.double import double_backward, gap, spread
from tests.unchanged import unchanged

timm = pytest.importorskip("timm", reason="timm is not installed: pip install -e '.[models]'")
pytestmark = pytest.mark.usefixtures("one_thread")
NETS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 3},
    "resnet10t": {"channels": (4, 4, 8, 8), "stem_width": 4},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)},
}


@pytest.mark.parametrize("name", NETS)
def test_products(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, in_chans=1, **NETS[name])
    spread(model)
    model = model.double().eval()
    x, y = torch.randn(3, 1, 32, 32, dtype=torch.float64), torch.arange(3)
    V, HV = double_backward(model, lambda: F.cross_entropy(model(x), y))
    with unchanged(model):
        hessian, ggn = (kind(model, [(x, y)], nn.CrossEntropyLoss()) for kind in (fastsharp.Hessian, fastsharp.GGN))
        assert gap(hessian.apply(V), HV) <= 1e-10
        assert gap(ggn.apply(V), _ggn(model, x, V)) <= 1e-10
    assert fastsharp.explain(model, (x, y), nn.CrossEntropyLoss()).backend == "rop"


def _ggn(model: nn.Module, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """V J' H_L J, J row by row; H_L = sum over i < j of p_i p_j (e_i - e_j)(e_i - e_j)', in which nothing cancels."""
    z, params = model(x), list(model.parameters())
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in z.flatten()]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    p = z.detach().softmax(1)
    H = -p[:, :, None] * p[:, None, :]
    H.diagonal(dim1=1, dim2=2).zero_()
    H -= torch.diag_embed(H.sum(2))
    return V @ J.T @ torch.block_diag(*H) @ J / len(x)
