"""Folded calls inside whole networks: the matrices are autograd's, and what must not be folded is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.curvature.rop.linearise import Linearised
from tests.curvature.rop.engine import dense, gauss_newton, hessian, linearised, rows, same

SMALL = 1e-12  # relative: some hundred terms of float64


def cross_entropy(z: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


def folded(lin: Linearised) -> dict[str, int]:
    """How many calls folding made, by name, and how many norms and transposes are left."""
    counts: dict[str, int] = {}
    for row in lin.table():
        name = row.op.split(".")[0]
        if name in ("linear", "convolution_norm", "t", "convolution") or "batch_norm" in name:
            counts[name] = counts.get(name, 0) + row.calls
    return counts


def settled(model: nn.Module) -> nn.Module:
    """Float64, eval mode, all parameters and statistics away from where they start."""
    torch.manual_seed(1)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2.0)
    return model


def verify(forward: Callable[[], torch.Tensor], params: list[torch.Tensor], model: nn.Module | None = None) -> Linearised:
    def fn() -> tuple[Any, torch.Tensor]:
        z = forward()
        return z, cross_entropy(z)

    lin = linearised(fn, params, model)
    H = hessian(fn, params)
    same(dense(lin, params), H, SMALL)
    G = gauss_newton(fn, params, cross_entropy)
    same(dense(lin, params, gauss=True), G, SMALL)
    assert float((H - G).abs().max()) > 1e-4, "no second derivative of the network: the case would pass without its terms"
    return lin


class Residual(nn.Module):
    """Convolutions with and without bias, with and without ReLU after the norm, strided, grouped; a skip; a head."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine)
        self.a, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=affine)
        self.b, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4, affine=affine)
        self.c = nn.Conv2d(4, 3, 2, stride=2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm0(self.stem(x)), inplace=True)
        y = self.norm1(self.a(x)).relu()
        x = F.relu(x + self.norm2(self.b(y)))
        out: torch.Tensor = self.head(torch.tanh(self.c(x)).mean((2, 3)))
        return out


IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_residual_network(affine: bool, layout: torch.memory_format) -> None:
    model = settled(Residual(affine)).to(memory_format=layout)
    lin = verify(lambda: model(IMAGES.contiguous(memory_format=layout)), list(model.parameters()), model)
    assert folded(lin) == {"convolution_norm": 3, "convolution": 1, "linear": 1}
    assert lin.table()[0].op == "convolution_norm"
    assert not {"relu.default", "add.Tensor"} & {row.op for row in lin.table()}


def test_frozen_parameters() -> None:
    model = settled(Residual())
    for p in (model.stem.weight, model.norm0.weight, model.norm0.bias, model.a.weight, model.norm2.weight, model.head.weight):
        p.requires_grad_(False)
    lin = verify(lambda: model(IMAGES), [p for p in model.parameters() if p.requires_grad], model)
    # the stem is a constant and so is the turned weight of the head
    assert folded(lin) == {"convolution_norm": 2, "convolution": 1}


def test_linear_layers() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)))
    x = IMAGES.reshape(-1, 4)[:6]
    assert folded(verify(lambda: model(x), list(model.parameters()), model)) == {"linear": 2}


def test_relu_of_a_linear_layer() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)))
    x = IMAGES.reshape(-1, 4)[:6]
    lin = verify(lambda: model(x), list(model.parameters()), model)
    assert folded(lin) == {"linear": 3}
    assert "relu.default" not in {row.op for row in lin.table()}

    def read_twice() -> torch.Tensor:
        y = model[0](x)
        z: torch.Tensor = model[2:](y.relu() * y)
        return z

    lin = verify(read_twice, list(model.parameters()), model)
    assert sum(row.calls for row in lin.table() if row.op == "relu.default") == 1


@pytest.mark.parametrize("turn", [lambda w: w.t(), lambda w: w.transpose(-1, 0), lambda w: w.permute(-1, 0)])
def test_every_way_to_turn_a_weight(turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, w, c = IMAGES.reshape(-1, 4)[:5], *(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (3,)))
    lin = verify(lambda: torch.addmm(c, x, turn(w)).sin(), [w, c])
    assert next(row.op for row in lin.table()) == "linear"
    assert not {"t.default", "transpose.int", "permute.default"} & {row.op for row in lin.table()}


def test_one_turned_weight_in_two_products() -> None:
    """Its call goes only with its last use, and another use keeps it."""
    x, w = IMAGES.reshape(-1, 4)[:4], torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def twice(extra: float) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            turned = w.t()
            y = (torch.mm(x, turned)).tanh() @ turned
            return y + turned.sin() if extra else y

        return forward

    assert folded(verify(twice(0.0), [w])) == {"linear": 2}
    assert folded(verify(twice(1.0), [w])) == {"linear": 2, "t": 1}


def test_tied_weights() -> None:
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    lin = verify(lambda: F.linear(F.linear(IMAGES.reshape(-1, 4)[:4], w).tanh(), w), [w])
    assert folded(lin) == {"linear": 2}


def test_products_that_are_no_linear_layer() -> None:
    x, w, c = IMAGES.reshape(-1, 4)[:5], *(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 3)))
    for forward in (
        lambda: torch.addmm(c[0], x, w.t(), alpha=2.0).sin(),
        lambda: torch.addmm(c[0], x, w.t(), beta=0.5).sin(),
        lambda: torch.addmm(c, x, w.t()).sin(),
        lambda: (torch.mm(w, x.t()).t()[:, :3]).sin(),
        lambda: torch.mm(x, w.t().clone()).sin() + c,
    ):
        assert "linear" not in folded(verify(forward, [w, c]))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.conv(x)).sin().mean((2, 3)))
        return out


class _Twice(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        out: torch.Tensor = self.head((self.norm(y).sin() + y).mean((2, 3)))
        return out


class _NormTwice(_Net):
    """The norm is read beside its ReLU: the norm is folded, the ReLU is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        out: torch.Tensor = self.head((y.relu() * y).mean((2, 3)))
        return out


class _Transposed(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv: nn.Module = nn.ConvTranspose2d(2, 3, 3)


def test_what_must_not_fold() -> None:
    plain = settled(_Net())
    params = list(plain.parameters())
    assert folded(verify(lambda: plain(IMAGES), params))["convolution_norm"] == 1

    for model in (settled(_Twice()), settled(_Transposed())):
        counts = folded(verify(lambda m=model: m(IMAGES), list(model.parameters())))
        assert "convolution_norm" not in counts and counts["convolution"] == 1

    model = settled(_NormTwice())
    lin = verify(lambda: model(IMAGES), list(model.parameters()))
    assert folded(lin)["convolution_norm"] == 1
    assert "relu.default" in {row.op for row in lin.table()}

    plain.train()
    assert "convolution_norm" not in folded(verify(lambda: plain(IMAGES), params))
    plain.eval()

    assert plain.norm.running_mean is not None
    plain.norm.running_mean.add_(500.0)  # activations that the norm brings down from afar: W' x and c' would cancel
    assert "convolution_norm" not in folded(verify(lambda: plain(IMAGES), params))


def test_a_hook_that_reads_the_convolution() -> None:
    model = settled(_Net())
    seen: list[torch.Tensor] = []
    handle = model.conv.register_forward_hook(lambda module, args, y: seen.append(y))

    def fn() -> tuple[Any, torch.Tensor]:
        seen.clear()
        z = model(IMAGES)
        return z, cross_entropy(z) + 0.1 * seen[0].pow(3).mean()

    params = list(model.parameters())
    lin = linearised(fn, params, model)
    same(dense(lin, params), hessian(fn, params), SMALL)
    assert "convolution_norm" not in folded(lin)
    handle.remove()


def test_the_output_of_the_network_does_not_vanish() -> None:
    """Where the norm, or the convolution before it, is what the model returns, the loss begins there."""
    model = settled(_Net())
    params = [*model.conv.parameters(), *model.norm.parameters()]

    def fn(inside: bool) -> tuple[Any, torch.Tensor]:
        y = model.conv(IMAGES)
        z = model.norm(y).relu()
        return (y if inside else z), z.pow(2).mean()

    for inside in (False, True):
        lin = linearised(lambda inside=inside: fn(inside), params if not inside else params[:2])
        assert ("convolution_norm" in folded(lin)) is not inside
        same(dense(lin, params if not inside else params[:2]), hessian(lambda i=inside: fn(i), params if not inside else params[:2]), SMALL)


def test_float32_is_as_exact_as_double_backward() -> None:
    double = settled(Residual())
    single = copy.deepcopy(double).float()
    n = sum(p.numel() for p in double.parameters())
    V = torch.randn(8, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def fn(model: nn.Module, x: torch.Tensor) -> Callable[[], tuple[Any, torch.Tensor]]:
        return lambda: ((z := model(x)), cross_entropy(z))

    exact = V @ hessian(fn(double, IMAGES), list(double.parameters()))
    params = list(single.parameters())
    theirs = V.float() @ hessian(fn(single, IMAGES.float()), params)
    lin = linearised(fn(single, IMAGES.float()), params, single)
    assert folded(lin)["convolution_norm"] == 3
    ours = torch.zeros(8, n)
    lin.product(rows(V.float(), params), rows(ours, params))
    bound = 2 * float((theirs.double() - exact).norm())
    assert float((ours.double() - exact).norm()) <= bound
