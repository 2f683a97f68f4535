"""The dual ops of a native module: addresses, sizes and strides go in, and a workspace for the partial sums."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastsharp.ops._border import address, call
from fastsharp.ops._registry import Dual
from fastsharp.ops.reference.dual import Norm, Parameters, Second

_KINDS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "tanh": 4, "sigmoid": 5, "softplus": 6, "elu": 7}
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
Place = Callable[[torch.device], tuple[int, ...]]


def ops(module: ModuleType, place: Place) -> Dual:
    """Every dual op of `fastsharp._cpu` or `fastsharp._cuda`."""
    kernels = {op: {d: getattr(module, f"{op}_{s}") for d, s in _SUFFIX.items()} for op in Dual.__dataclass_fields__}

    def work(doubles: int, wanted: bool, device: torch.device) -> Tensor | None:
        return torch.empty(doubles, dtype=torch.float64, device=device) if wanted else None

    def activation_prepare(kind: str, parameters: Parameters, x: Tensor, bias: Tensor | None, d1: Tensor, d2: Tensor | None) -> None:
        curve = (_KINDS[kind], *parameters)
        call(
            kernels["activation_prepare"][x.dtype],
            curve,
            (1, *x.shape),
            _at(x, 1),
            _address(bias),
            _at(d1, 1),
            _at(d2, 1),
            *place(x.device),
        )

    def activation_tangent(d1: Tensor, x_t: Tensor, bias_t: Tensor | None, out: Tensor) -> None:
        call(
            kernels["activation_tangent"][d1.dtype],
            tuple(x_t.shape),
            _at(d1, 1),
            _at(x_t, 2),
            _at(bias_t, 1),
            _at(out, 2),
            *place(d1.device),
        )

    def activation_adjoint(d1: Tensor, y_gt: Tensor, q: Tensor | None, a_t: Tensor | None, out: Tensor, bias_gt: Tensor | None) -> None:
        sizes = tuple(y_gt.shape)
        partial = work(module.activation_workspace(sizes), bias_gt is not None, d1.device)
        terms = (_at(d1, 1), _at(y_gt, 2), _at(q, 1), _at(a_t, 2), _at(out, 2), _at(bias_gt, 1))
        call(kernels["activation_adjoint"][d1.dtype], sizes, *terms, _address(partial), *place(d1.device))

    def norm_prepare(x: Tensor, eps: float, center: bool, stats: Tensor) -> None:
        call(kernels["norm_prepare"][x.dtype], (1, *x.shape), _at(x, 1), eps, center, address(stats), *place(x.device))

    def norm_tangent(f: Norm, x_t: Tensor | None, w_t: Tensor | None, bias_t: Tensor | None, out: Tensor | None, sums: Tensor) -> None:
        sizes = (sums.shape[0], *f.x.shape)
        terms = (_at(x_t, 2), _at(w_t, 1), _at(bias_t, 1), _at(out, 2), address(sums))
        call(kernels["norm_tangent"][f.x.dtype], sizes, _norm(f), *terms, *place(f.x.device))

    def norm_adjoint(
        f: Norm,
        y_gt: Tensor | None,
        second: Second | None,
        out: Tensor | None,
        sums: Tensor | None,
        w_gt: Tensor | None,
        bias_gt: Tensor | None,
    ) -> None:
        b = second.x_sums.shape[0] if second is not None else 0 if y_gt is None else y_gt.shape[0]
        sizes = (b, *f.x.shape)
        partial = work(module.norm_workspace(sizes), w_gt is not None or bias_gt is not None, f.x.device)
        terms = (_at(y_gt, 2), _second(second), _at(out, 2), _address(sums), _at(w_gt, 1), _at(bias_gt, 1), _address(partial))
        call(kernels["norm_adjoint"][f.x.dtype], sizes, _norm(f), *terms, *place(f.x.device))

    def softmax_gradient(
        z: Tensor, target: Tensor | None, weight: Tensor | None, smoothing: float, p: Tensor | None, g: Tensor | None
    ) -> None:
        terms = (_address(target), _address(weight), smoothing, _at(p, 1), _at(g, 1))
        call(kernels["softmax_gradient"][z.dtype], (1, *z.shape), _at(z, 1), *terms, *place(z.device))

    def softmax_product(p: Tensor, weight: Tensor | None, u: Tensor, out: Tensor) -> None:
        call(kernels["softmax_product"][p.dtype], tuple(u.shape), _at(p, 1), _address(weight), _at(u, 2), _at(out, 2), *place(p.device))

    return Dual(
        activation_prepare,
        activation_tangent,
        activation_adjoint,
        norm_prepare,
        norm_tangent,
        norm_adjoint,
        softmax_gradient,
        softmax_product,
    )


def _address(t: Tensor | None) -> int:
    return 0 if t is None else address(t)


def _at(t: Tensor | None, strides: int) -> tuple[int, ...]:
    """The address of t and its first strides; zeros for what is not there."""
    return (0,) * (1 + strides) if t is None else (address(t), *t.stride()[:strides])


def _norm(f: Norm) -> tuple[object, ...]:
    return _at(f.x, 1), _address(f.w), address(f.stats), f.center


def _second(s: Second | None) -> tuple[object, ...]:
    if s is None:
        return (0, 0), 0, (0, 0, 0), 0, (0, 0)
    return _at(s.y_g, 1), address(s.g_sums), _at(s.x_t, 2), address(s.x_sums), _at(s.w_t, 1)
