"""A net that is sure: 1 - p_max down to 1e-15. diag(p) - p p' must not lose its digits there, nor p - e_target.

Reference: H_L = sum over i < j of p_i p_j (e_i - e_j)(e_i - e_j)', in which nothing cancels, with p from float64 logits.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.curvature.predictive import Categorical
from fastsharp.curvature.rop.rules.loss import FUSED_CLASSES

pytestmark = pytest.mark.usefixtures("one_thread")


def sure(classes: int, margin: float, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """One linear layer, whose J is the data; every row but the last is predicted rightly, by `margin`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    y = torch.arange(6) % classes
    model = nn.Linear(7, classes, bias=False)
    z = torch.randn(6, classes, generator=generator, dtype=torch.float64)
    z[torch.arange(6), y] += margin
    with torch.no_grad():
        model.to(dtype).weight.copy_((torch.linalg.pinv(x) @ z).T)
    return model, x.to(dtype), y


def product(model: nn.Module, x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """(sum_s H_s (x) x_s x_s' / samples) v for each row v, in float64."""
    x, W, V = x.double(), model.weight.detach().double(), V.double().reshape(len(V), *model.weight.shape)
    p = (x @ W.T).softmax(1)
    H = -p[:, :, None] * p[:, None, :]
    H.diagonal(dim1=1, dim2=2).zero_()
    H -= torch.diag_embed(H.sum(2))  # rows sum to zero: the diagonal is minus the sum of the others
    return torch.einsum("sij,bja,sa,sc->bic", H, V, x, x).reshape(len(V), -1) / len(x)


# in float32 logits of size m are rounded by eps m / 2, and with them p, twice over; eps of the products comes on top
@pytest.mark.parametrize(("dtype", "margin", "gate"), [(torch.float64, 34.0, 1e-12), (torch.float32, 13.0, 64 * 1.2e-7 * 13)])
@pytest.mark.parametrize("classes", [6, FUSED_CLASSES + 3])
@pytest.mark.parametrize("backend", ["rop", "mlp"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_keep_their_digits(kind: str, backend: str, classes: int, dtype: torch.dtype, margin: float, gate: float) -> None:
    model, x, y = sure(classes, margin, dtype)
    operator = {"hessian": fastsharp.Hessian, "ggn": fastsharp.GGN}[kind](model, [(x, y)], nn.CrossEntropyLoss(), backend=backend)
    V = torch.randn(3, operator.n, dtype=dtype, generator=torch.Generator().manual_seed(1))
    want = product(model, x, V)
    assert float((operator.apply(V).double() - want).norm() / want.norm()) <= gate


def test_the_gradient_at_a_sure_target_keeps_its_digits() -> None:
    """H of two layers contains W'' r: its part in the first layer's activation is exact only if r = p - e_target is."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    with torch.no_grad():
        net[2].bias[1] += 33.0
    operator = fastsharp.Hessian(net, [(x, y)], nn.CrossEntropyLoss(), backend="rop")
    got = operator.apply(torch.eye(operator.n, dtype=torch.float64))

    def loss() -> torch.Tensor:  # log(1 + sum of e^(z_j - z_y)), without cancellation
        z = net(x)[0]
        return torch.log1p((z[[0, 2]] - z[1]).exp().sum())

    params = list(net.parameters())
    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), params, create_graph=True)])
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True) for e in flat]
    H = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert float((got - H).norm() / H.norm()) <= 1e-11


def test_expected_scores_keep_their_digits() -> None:
    z = torch.tensor([[36.0, 0.5, -1.0]], dtype=torch.float64)
    u = torch.tensor([[0.3, 1.7, -2.0]], dtype=torch.float64)
    got = Categorical(z, torch.ones(1, 1, dtype=torch.float64), 1).curvature(u)
    p, want = z.softmax(1)[0], torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            want[i] += p[i] * p[j] * (u[0, i] - u[0, j])
    assert float((got[0] - want).norm() / want.norm()) <= 1e-14


@pytest.mark.parametrize("backend", ["rop", "mlp"])
def test_a_run_on_a_sure_net_is_not_stopped_by_a_reference_that_has_no_digits(backend: str) -> None:
    """In float32 autograd's product is off by its own size at 1 - p = 1e-9, ours is right: the check must not blame ours."""
    model, x, y = sure(6, 20.0, torch.float32)
    x, y = x[:5], y[:5]
    result = fastsharp.lanczos(model, [(x, y)], nn.CrossEntropyLoss(), k=1, backend=backend)
    dense = product(model, x, torch.eye(model.weight.numel()))
    assert float(result.eigenvalues[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-4)
    assert bool(result.converged[0])
