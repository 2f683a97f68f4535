"""Weight norm, both of torch's: the second derivatives of g v / ||v||, not those of torch's fused kernel, which are not symmetric."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastsharp
from tests.oracles.dense import dense_hessian
from tests.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 3


class Plain(nn.Module):
    """The same function of (v, g) with the norm written out; parameters in the order of `names`."""

    def __init__(self, model: nn.Sequential, dim: int) -> None:
        super().__init__()
        self.dim = dim
        for name, p in model.named_parameters():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(p.detach().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = dict(self.named_parameters())
        v = next(p for n, p in own.items() if n.endswith(("original1", "weight_v")))
        g = next(p for n, p in own.items() if n.endswith(("original0", "weight_g")))
        W = g * v / v.square().sum(1 - self.dim, keepdim=True).sqrt()
        return F.linear(torch.tanh(F.linear(x, W, own["0_bias"])), own["2_weight"], own["2_bias"])


@pytest.mark.parametrize("backend", ["rop", "autograd"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_weight_norm(form: str, dim: int, backend: str) -> None:
    torch.manual_seed(1)
    first = nn.Linear(6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = parametrizations.weight_norm(first, dim=dim) if form == "parametrization" else nn.utils.weight_norm(first, dim=dim)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3)).double()
    H = dense_hessian(Plain(model, dim), lambda call, b: F.cross_entropy(call(b[0]), b[1]), (X, Y))
    with unchanged(model):
        operator = fastsharp.Hessian(model, [(X, Y)], nn.CrossEntropyLoss(), backend=backend)
        got = operator.apply(torch.eye(operator.n, dtype=torch.float64))
        assert float((got - H).norm() / H.norm()) <= 1e-12
        assert fastsharp.lanczos(model, [(X, Y)], nn.CrossEntropyLoss(), k=1, backend=backend).converged
