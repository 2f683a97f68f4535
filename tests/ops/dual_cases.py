"""Inputs and checkers of the dual ops: odd shapes, strided tangents, NaN in everything nobody may read. The oracle is torch's own autograd.

Every checker builds its matrices in buffers that hold NaN elsewhere and asserts that nothing but its results was written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsharp.ops import dual
from tests.tolerance import EPS64, assert_close, eps, exact

CURVES: dict[str, tuple[str, tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "relu": ("relu", (), F.relu),
    "leaky_relu": ("relu", (0.1,), lambda x: F.leaky_relu(x, 0.1)),
    "gelu": ("gelu", (), F.gelu),
    "gelu_tanh": ("gelu_tanh", (), lambda x: F.gelu(x, approximate="tanh")),
    "silu": ("silu", (), F.silu),
    "tanh": ("tanh", (), torch.tanh),
    "sigmoid": ("sigmoid", (), torch.sigmoid),
    "softplus": ("softplus", (1.5, 2.0), lambda x: F.softplus(x, 1.5, 2.0)),
    "elu": ("elu", (0.7,), lambda x: F.elu(x, 0.7)),
}
SHAPES = [(1, 1, 1), (1, 5, 7), (3, 4, 33), (2, 300, 40), (2, 1, 9001), (8, 17, 64)]  # b, rows, columns


@dataclass
class Rooms:
    """Makes tensors with gaps of NaN between rows and vectors, and checks the gaps afterwards."""

    dtype: torch.dtype
    device: torch.device
    pad: int = 3

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.made: list[tuple[Tensor, Tensor]] = []

    def normal(self, *shape: int) -> Tensor:
        return self.place(torch.randn(*shape, generator=self.generator, dtype=torch.float64))

    def place(self, value: Tensor) -> Tensor:
        room = torch.full((*value.shape[:-1], value.shape[-1] + self.pad), torch.nan, dtype=self.dtype, device=self.device)
        view = room[..., : value.shape[-1]]
        view.copy_(value)
        self.made.append((room, view))
        return view

    def empty(self, *shape: int) -> Tensor:
        return self.place(torch.full(shape, torch.nan))

    def check(self) -> None:
        for room, view in self.made:
            assert bool(room[..., view.shape[-1] :].isnan().all()), "a gap between rows was written"


def products(f: Callable[..., Tensor], xs: list[Tensor], y_g: Tensor, x_t: list[Tensor], y_gt: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(y_t, tangents of all adjoints) of y = f(*xs) in float64 for one vector."""
    xs = [x.double().detach().requires_grad_() for x in xs]
    y = f(*xs)
    y_g = y_g.double().detach().requires_grad_()
    adjoints = torch.autograd.grad(y, xs, y_g, create_graph=True)
    dot = sum((a * t.double()).sum() for a, t in zip(adjoints, x_t, strict=True))
    assert isinstance(dot, Tensor)
    y_t, *x_gt = torch.autograd.grad(dot, [y_g, *xs], allow_unused=True, retain_graph=True, materialize_grads=True)
    plain = torch.autograd.grad(y, xs, y_gt.double())
    return y_t, [a + c for a, c in zip(x_gt, plain, strict=True)]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str, terms: int = 8) -> None:
    """Off by no more than `terms` roundings of the largest entry, and 128 float64 roundings of the oracle itself.

    Those of the oracle come from sums over up to 9001 columns, from e^x of a rounded x, and from 1 - tanh^2, which a^3 enlarges.
    """
    assert_close(got, exact(want), (terms * eps(dtype) + 128 * EPS64) * max(1.0, float(want.detach().abs().max())), what)


def check_activation(name: str, b: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Derivatives at x + bias, tangent, tangent of the adjoint and of the bias, against double backward."""
    kind, parameters, f = CURVES[name]
    make = Rooms(dtype, device)
    x, y_g, bias = make.normal(rows, columns), make.normal(rows, columns), make.normal(columns)
    x_t, y_gt, bias_t, before = (make.normal(*shape) for shape in ((b, rows, columns), (b, rows, columns), (b, columns), (b, columns)))
    d1, d2, y_t, x_gt = make.empty(rows, columns), make.empty(rows, columns), make.empty(b, rows, columns), make.empty(b, rows, columns)
    bias_gt = make.place(before.double())
    dual.activation_prepare(kind, x, d1=d1, d2=d2, bias=bias, parameters=parameters)
    dual.activation_tangent(d1, x_t, bias_t=bias_t, out=y_t)
    a_t = x_t + bias_t[:, None]
    dual.activation_adjoint(d1, y_gt, q=d2 * y_g, a_t=a_t, out=x_gt, bias_gt=bias_gt)
    for k in range(b):
        want, (want_x, want_bias) = products(lambda x, c: f(x + c), [x, bias], y_g, [x_t[k], bias_t[k]], y_gt[k])
        close(y_t[k], want, dtype, f"{name}: tangent")
        close(x_gt[k], want_x, dtype, f"{name}: tangent of the adjoint", 16)
        close(bias_gt[k], before[k].double() + want_bias, dtype, f"{name}: bias", 16 + rows)
    plain, in_place = torch.empty_like(x_gt), make.place(y_gt.double())
    dual.activation_adjoint(d1, y_gt, out=plain)
    close(plain, d1.double() * y_gt.double(), dtype, f"{name}: J' alone", 2)
    dual.activation_adjoint(d1, in_place, out=in_place)
    assert torch.equal(in_place, plain), "in place gives other bits"
    make.check()


def norm_of(center: bool, epsilon: float) -> Callable[..., Tensor]:
    """The function in torch: layer norm, or RMS norm with a bias."""

    def f(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        if center:
            return F.layer_norm(x, x.shape[-1:], w, bias, epsilon)
        return F.rms_norm(x, x.shape[-1:], w, epsilon) + bias

    return f


def check_norm(center: bool, b: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, mean: float = 0.5) -> None:
    """Tangent, adjoint, tangent of the adjoint and of the gradients of weight and bias, against double backward."""
    epsilon = 1e-2 if columns < 4 else 1e-5
    make = Rooms(dtype, device)
    x, y_g, w, bias = (
        make.place(make.normal(rows, columns).double() + mean),
        make.normal(rows, columns),
        make.normal(columns),
        make.normal(columns),
    )
    x_t, y_gt, w_t, bias_t = (make.normal(*s) for s in ((b, rows, columns), (b, rows, columns), (b, columns), (b, columns)))
    w_gt, bias_gt = make.normal(b, columns), make.normal(b, columns)
    before = w_gt.double().clone(), bias_gt.double().clone()

    def pairs(n: int) -> Tensor:
        return torch.full((n, rows, 2), torch.nan, dtype=torch.float64, device=device)

    f = dual.Norm(x, w, dual.norm_prepare(x, eps=epsilon, center=center, stats=pairs(1)[0]), center)
    y_t, x_g, x_gt = make.empty(b, rows, columns), make.empty(1, rows, columns), make.empty(b, rows, columns)
    x_sums, g_sums, w_g = pairs(b), pairs(1), make.place(torch.zeros(1, columns))
    dual.norm_tangent(f, x_t, w_t=w_t, bias_t=bias_t, out=y_t, sums=x_sums)
    dual.norm_adjoint(f, y_g[None], out=x_g, sums=g_sums, w_gt=w_g)
    dual.norm_adjoint(f, y_gt, second=dual.Second(y_g, g_sums, x_t, x_sums, w_t), out=x_gt, w_gt=w_gt, bias_gt=bias_gt)
    torchs = norm_of(center, epsilon)
    xs = [x, w, bias]
    leaves = [t.double().detach().requires_grad_() for t in xs]
    want_g = torch.autograd.grad(torchs(*leaves), leaves, y_g.double())
    close(x_g[0], want_g[0], dtype, "adjoint")
    close(w_g[0], want_g[1], dtype, "adjoint of the weight")
    for k in range(b):
        want, (want_x, want_w, want_bias) = products(torchs, xs, y_g, [x_t[k], w_t[k], bias_t[k]], y_gt[k])
        close(y_t[k], want, dtype, "tangent")
        close(x_gt[k], want_x, dtype, "tangent of the adjoint")
        close(w_gt[k], before[0][k] + want_w, dtype, "weight")
        close(bias_gt[k], before[1][k] + want_bias, dtype, "bias")
    missing = make.empty(b, rows, columns)
    dual.norm_adjoint(f, None, second=dual.Second(y_g, g_sums, x_t, x_sums, None), out=missing)
    for k in range(b):
        zero = torch.zeros_like(w)
        close(missing[k], products(torchs, xs, y_g, [x_t[k], zero, zero], torch.zeros_like(y_g))[1][0], dtype, "second term alone")
    make.check()


def check_softmax(b: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, scale: float = 3.0) -> None:
    """Probabilities, gradient and Hessian product of the weighted cross-entropy with an ignored row, against double backward."""
    make = Rooms(dtype, device)
    z, u, p, g, out = (
        make.normal(rows, columns),
        make.normal(b, rows, columns),
        *(make.empty(rows, columns) for _ in range(2)),
        make.empty(b, rows, columns),
    )
    z.mul_(scale)
    weight = torch.linspace(0.5, 2, rows, dtype=dtype, device=device)
    target = torch.arange(rows, device=device) * 5 % columns
    if rows > 2:
        weight[2], target[2], z[2, 0], u[:, 2] = 0, -100, torch.nan, torch.nan
    dual.softmax_gradient(z, target, weight=weight, smoothing=0.1, p=p, g=g)
    dual.softmax_product(p, u, weight=weight, out=out)
    live = weight != 0

    def loss(z: Tensor) -> Tensor:
        each = F.cross_entropy(z, target[live], reduction="none", label_smoothing=0.1)
        return (each * weight[live].double()).sum()

    leaf = z[live].double().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    close(p[live], torch.softmax(leaf, 1), dtype, "probabilities", 2)
    close(g[live], want, dtype, "gradient", 2)
    for k in range(b):
        (want_out,) = torch.autograd.grad(want, leaf, u[k][live].double(), retain_graph=True)
        close(out[k][live], want_out, dtype, "Hessian product", 4)
    assert not bool(p[~live].any() or g[~live].any() or out[:, ~live].any()), "a row of weight zero is not zero"
    plain = make.empty(rows, columns)
    dual.softmax_gradient(z[live], p=plain[live] if bool(live.all()) else plain[: int(live.sum())])
    make.check()
