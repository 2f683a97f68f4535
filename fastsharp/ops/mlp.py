"""Hessian-vector products of fully connected nets: what a primal pass leaves behind, and products of tangents alone.

    z_l = W_l a_{l-1} + b_l,  a_l = phi(z_l),  l = 1..L,  L(theta) = sum_i w_i loss(z_L,i, target_i)

`prepare` computes a_l, phi'(z_l), c_l = phi''(z_l) W'y, the adjoints y_l of z_l and the loss Hessian's probabilities, once for E nets
of one architecture by batched matrix products; `Prepared.product` then costs six such passes a vector (four for Gauss-Newton) minus
those that the first layer does not need, in one native call. Its formulas stand in csrc/include/fastsharp/mlp.hpp.

Note on numerical properties. The primal is torch's own in the dtype of the weights. A product sums over widths and over tiles of 32 or
64 samples in registers, then tile by tile, leaving out terms that are exactly zero (`fastsharp.ops._mlp_tiles`): at most the error of torch's double backward. At kinks of ReLU phi' is 0, as in autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsharp.errors import InputError, ShapeError
from fastsharp.ops import _border, _registry

ACTIVATIONS = ("relu", "tanh", "gelu", "gelu_tanh", "identity")
LOSSES = ("cross_entropy", "squared")
MOST_LAYERS = 32


@dataclass(frozen=True)
class Net:
    """The architecture: widths d_0..d_L, one activation between layers, and where W_l and b_l (None: none) lie in a flat vector."""

    widths: tuple[int, ...]
    weights: tuple[int, ...]
    biases: tuple[int | None, ...]
    activation: str
    loss: str
    n: int

    @property
    def layers(self) -> int:
        """L."""
        return len(self.weights)

    @property
    def curved(self) -> bool:
        """Whether phi'' is not zero."""
        return self.activation not in ("relu", "identity") and self.layers > 1

    def weight(self, flat: Tensor, l: int) -> Tensor:  # noqa: E741
        """W_l (..., d_l, d_{l-1}) for l = 1..L as a view of flat (..., n)."""
        start, shape = self.weights[l - 1], (self.widths[l], self.widths[l - 1])
        return flat[..., start : start + shape[0] * shape[1]].view(*flat.shape[:-1], *shape)

    def bias(self, flat: Tensor, l: int) -> Tensor | None:  # noqa: E741
        """b_l (..., d_l) as a view, None where there is none."""
        start = self.biases[l - 1]
        return None if start is None else flat[..., start : start + self.widths[l]]


@dataclass(frozen=True)
class Primal:
    """What a primal pass of E nets leaves for products; each entry (E, N, d_l), indexed from l = 0, empty where not needed."""

    net: Net
    theta: Tensor  # (E, n)
    a: tuple[Tensor, ...]  # l = 0..L-1
    slope: tuple[Tensor, ...]  # phi'(z_l), l = 1..L-1
    bend: tuple[Tensor, ...]  # c_l, l = 1..L-1 of a curved net
    y: tuple[Tensor, ...]  # l = 1..L
    p: Tensor | None  # cross-entropy: softmax of z_L
    w: Tensor  # (E, N): of a sample's loss Hessian
    value: Tensor  # (E,): the loss

    @property
    def samples(self) -> int:
        """N."""
        return self.w.shape[1]

    def gradient(self) -> Tensor:
        """dL / dtheta, (E, n)."""
        out = torch.zeros_like(self.theta)
        for l in range(1, self.net.layers + 1):  # noqa: E741
            y = self.y[l - 1]
            self.net.weight(out, l).copy_(y.mT @ self.a[l - 1])
            bias = self.net.bias(out, l)
            if bias is not None:
                bias.copy_(y.sum(1))
        return out


def native(device: torch.device) -> bool:
    """Whether products on this device are computed by a kernel of ours, not by the reference."""
    return _registry.choose(device).name == device.type


Product = Callable[[Tensor, Tensor, Tensor, bool, float, float], None]  # V (r, n), member (r,), out (r, n), gauss, scale, divisor: checked


@dataclass(frozen=True)
class Prepared:
    """E nets, ready for products."""

    primal: Primal
    _product: Product
    nbytes: int

    def product(
        self,
        V: Tensor,
        *,
        out: Tensor,
        member: Tensor | None = None,
        gauss: bool = False,
        scale: float = 1.0,
        divisor: float = 1.0,
    ) -> Tensor:
        """Row r of out = the Hessian (or, with `gauss`, the Gauss-Newton matrix) of net member[r] times row r of V, times scale / divisor.

        V, out  (r, n) in the dtype and on the device of the weights; rows contiguous, out outside of V; written and returned
        member  (r,) int64 on the host; None: row r belongs to net r, or all rows to the only net
        """
        net, E = self.primal.net, self.primal.theta.shape[0]
        theta = self.primal.theta
        for name, t in (("V", V), ("out", out)):
            _border.check("mlp_product", name, t, 2, (theta.dtype,), theta.device)
            if t.shape[1] != net.n or t.shape[0] != V.shape[0]:
                raise ShapeError(f"mlp_product: {name} has shape {tuple(t.shape)}, expected ({V.shape[0]}, {net.n}).")
            _border.check_rows("mlp_product", name, t)
        rows = V.shape[0]
        if member is None:
            if E not in (1, rows):
                raise ShapeError(f"mlp_product: V has {rows} rows for {E} nets. Pass member=, the number of the net of each row.")
            member = _own(rows, E)
        else:
            _border.check("mlp_product", "member", member, 1, (torch.int64,), torch.device("cpu"))
            _border.check_length("mlp_product", "member", member, rows, "as V has rows")
            if rows and (int(member.min()) < 0 or int(member.max()) >= E):
                raise InputError(f"mlp_product: member holds {int(member.min())} to {int(member.max())}, expected 0 to {E - 1}.")
        if rows == 0:
            return out
        _border.check_apart("mlp_product", "out", _border.span(out), V=_border.span(V), theta=_border.span(theta))
        self._product(V, member, out, gauss, scale, divisor)
        _border.wrote(out)
        return out


@lru_cache(maxsize=16)
def _own(rows: int, E: int) -> Tensor:
    """The nets of the rows where none are named: row r of net r, or all of the only net."""
    return torch.arange(rows) if rows == E else torch.zeros(rows, dtype=torch.int64)


def prepare(net: Net, theta: Tensor, x: Tensor, target: Tensor, weight: Tensor) -> Prepared:
    """The primal pass of E nets, each on N samples of its own.

    theta   (E, n) float32 or float64, copied
    x       (E, N, d_0) in the same dtype
    target  cross-entropy: (E, N) int64, classes 0..d_L-1 wherever the weight is not 0; squared: (E, N, d_L) in the dtype
    weight  (E, N) in the dtype: L = sum_i w_i ce(z_i, target_i), or sum_i w_i |z_i - target_i|^2 / 2
    """
    _check(net, theta, x, target, weight)
    with torch.no_grad():
        primal = _primal(net, theta.detach().clone(), x.detach(), target, weight.detach())
        made, nbytes = _registry.choose(theta.device).mlp(primal)
    return Prepared(primal, made, nbytes)


def _check(net: Net, theta: Any, x: Any, target: Any, weight: Any) -> None:
    _check_net(net)
    _border.check("mlp_prepare", "theta", theta.detach(), 2, _border.VECTOR_DTYPES)
    _border.check_nonempty("mlp_prepare", "theta", theta)
    E, dtype, device = theta.shape[0], (theta.dtype,), theta.device
    _border.check("mlp_prepare", "x", x, 3, dtype, device, contiguous=False)
    _border.check_nonempty("mlp_prepare", "x", x)
    N = x.shape[1]
    labels = net.loss == "cross_entropy"
    _border.check("mlp_prepare", "target", target, 2 if labels else 3, (torch.int64,) if labels else dtype, device, contiguous=False)
    _border.check("mlp_prepare", "weight", weight, 2, dtype, device, contiguous=False)
    wanted = {
        "theta": (theta, (E, net.n)),
        "x": (x, (E, N, net.widths[0])),
        "target": (target, (E, N) if labels else (E, N, net.widths[-1])),
        "weight": (weight, (E, N)),
    }
    for name, (t, shape) in wanted.items():
        if tuple(t.shape) != shape:
            raise ShapeError(f"mlp_prepare: {name} has shape {tuple(t.shape)}, expected {shape}.")
    if labels:
        used = target[weight != 0]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= net.widths[-1]):
            raise InputError(
                f"mlp_prepare: target holds classes {int(used.min())} to {int(used.max())}, expected 0 to {net.widths[-1] - 1}."
            )


def _check_net(net: Net) -> None:
    if net.activation not in ACTIVATIONS or net.loss not in LOSSES:
        raise InputError(f"mlp_prepare: activation {net.activation!r} of {ACTIVATIONS}, loss {net.loss!r} of {LOSSES}.")
    if not 1 <= net.layers <= MOST_LAYERS or len(net.widths) != net.layers + 1 or len(net.biases) != net.layers or min(net.widths) < 1:
        raise ShapeError(
            f"mlp_prepare: widths {net.widths}, {net.layers} weights and {len(net.biases)} biases are no net of 1 to 32 layers."
        )
    parts = [(s, net.widths[i] * net.widths[i + 1]) for i, s in enumerate(net.weights)]
    parts += [(s, net.widths[i + 1]) for i, s in enumerate(net.biases) if s is not None]
    end = 0
    for start, size in sorted(parts):
        if start != end:
            raise ShapeError(f"mlp_prepare: weights and biases must fill a flat vector of {net.n}; {end} is followed by {start}.")
        end = start + size
    if end != net.n:
        raise ShapeError(f"mlp_prepare: weights and biases take {end} entries, the flat vector has n = {net.n}.")


def _primal(net: Net, theta: Tensor, x: Tensor, target: Tensor, weight: Tensor) -> Primal:
    a, slope, curve = [x], [], []
    for l in range(1, net.layers + 1):  # noqa: E741
        bias = net.bias(theta, l)
        W = net.weight(theta, l).mT
        z = a[-1] @ W if bias is None else torch.baddbmm(bias[:, None], a[-1], W)
        if l < net.layers:
            value, first, second = _activation(net.activation, z)
            a.append(value)
            slope.append(first)
            curve.append(second)
    p: Tensor | None = None
    if net.loss == "cross_entropy":
        p = z.softmax(-1)
        label = target.clamp(0, net.widths[-1] - 1)[..., None]
        losses = -z.log_softmax(-1).gather(-1, label).squeeze(-1)
        others = p.scatter(-1, label, 0.0)  # p_y - 1 as minus the sum of the other p: no digits are lost where the net is sure
        last = weight[..., None] * others.scatter(-1, label, -others.sum(-1, keepdim=True))
    else:
        losses = (z - target).square().sum(-1) / 2
        last = weight[..., None] * (z - target)
    y, bend = [last], []
    for l in range(net.layers - 1, 0, -1):  # noqa: E741
        back = y[-1] @ net.weight(theta, l + 1)
        y.append(slope[l - 1] * back)
        if net.curved:
            bend.append(curve[l - 1] * back)
    return Primal(net, theta, tuple(a), tuple(slope), tuple(bend[::-1]), tuple(y[::-1]), p, weight, (weight * losses).sum(-1))


def _activation(name: str, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi, phi' and phi'' at z; the latter is not used where it is zero."""
    if name == "identity":
        return z, torch.ones_like(z), z
    if name == "relu":
        return z.relu(), (z > 0).to(z.dtype), z
    if name == "tanh":
        t = z.tanh()
        first = 1 - t * t
        return t, first, -2 * t * first
    if name == "gelu":
        density = (-0.5 * z * z).exp() * (1 / math.sqrt(2 * math.pi))
        share = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return torch.nn.functional.gelu(z), share + z * density, density * (2 - z * z)
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    t = (k * (z + cubic * z**3)).tanh()
    inner, more = k * (1 + 3 * cubic * z * z), k * 6 * cubic * z
    first = 1 - t * t
    slope = 0.5 * (1 + t) + 0.5 * z * first * inner
    return 0.5 * z * (1 + t), slope, first * inner + 0.5 * z * (first * more - 2 * t * first * inner * inner)
