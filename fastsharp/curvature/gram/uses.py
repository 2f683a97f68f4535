"""Calls in which the chosen parameters are used, and what each contributes to the Jacobian of a sample: rows from layer inputs and adjoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

# positions of (weight, bias) among the arguments; a call has them there or as keywords
_LINEAR = {F.linear: (1, 2)}
_CONV = {f: (1, 2) for f in (F.conv1d, F.conv2d, F.conv3d)}
_NORM: dict[Any, tuple[int, int | None]] = {F.layer_norm: (2, 3), F.group_norm: (2, 3), F.batch_norm: (3, 4), F.rms_norm: (2, None)}
_EMBEDDING = {F.embedding: (1, None)}
_KNOWN: dict[Any, tuple[int, int | None]] = {**_LINEAR, **_CONV, **_NORM, **_EMBEDDING}
_NAMES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(_CONV, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}


@dataclass(frozen=True)
class Use:
    """One call y = f(x; weight, bias): x without graph, y as an edge of the graph, which later writes in place do not move."""

    x: Tensor
    y: GradientEdge
    weight: int | None  # numbers of the chosen parameters; None: not chosen
    bias: int | None
    shared: bool  # the weight serves several positions of a sample, or the call is no matrix product
    macs: int  # multiply-adds of the call, 0 for an elementwise one
    rows: Callable[[Tensor], tuple[Tensor, Tensor]]  # adjoints (r, N, ...) of y -> per-sample gradients of weight and bias, (r, N, *shape)


class Record(TorchFunctionMode):
    """Notes the calls that use chosen parameters: `uses` by rule, `others` are numbers of parameters used in another way."""

    def __init__(self, params: Sequence[Tensor], samples: int) -> None:
        super().__init__()
        self._number = {id(p): i for i, p in enumerate(params)}
        self._samples = samples
        self._inputs: list[tuple[Use, Tensor, int]] = []
        self.others: set[int] = set()

    @property
    def uses(self) -> list[Use]:
        """Those whose input has not been written to since."""
        return [use for use, x, version in self._inputs if x._version == version]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        chosen = {self._number[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._number}
        if chosen and any(t.requires_grad for t in _tensors(out)):
            named = dict(zip(_NAMES.get(func, ()), args, strict=False)) | kwargs
            use = self._use(func, named, out) if func in _KNOWN else None
            known = set() if use is None else {use.weight, use.bias}
            self.others |= chosen - known
            if use is not None:
                self._inputs.append((use, named["input"], named["input"]._version))
        return out

    def _use(self, func: Any, named: dict[str, Any], out: Tensor) -> Use | None:
        x, weight, bias = named["input"], named.get("weight"), named.get("bias")
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] == 0 or x.shape[0] % self._samples or out.shape[0] != x.shape[0]:
            return None
        rule = _rule(func, named, self._samples, tuple(out.shape))
        if rule is None:
            return None
        numbers = [self._number.get(id(t)) for t in (weight, bias)]
        shared = func is not F.linear or x.numel() != self._samples * x.shape[-1]
        product = func is F.linear or func in _CONV
        macs = out.numel() * (named["weight"].numel() // named["weight"].shape[0]) if product else 0
        return Use(x.detach(), get_gradient_edge(out), numbers[0], numbers[1], shared, macs, rule)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, (tuple, list)) else []


def _rule(func: Any, named: dict[str, Any], N: int, shape: tuple[int, ...]) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    x = named["input"].detach()
    if func is F.linear:
        return lambda B: _linear_rows(x.reshape(N, -1, x.shape[-1]), B.reshape(len(B), N, -1, shape[-1]))
    if func in _CONV:
        return _conv_rule(named, x, N, shape)
    if func is F.embedding:
        if named.get("max_norm") is not None or named.get("scale_grad_by_freq"):
            return None
        V, padding = named["weight"].shape[0], named.get("padding_idx")
        index = x.reshape(N, -1)
        return lambda B: _embedding_rows(index, B.reshape(len(B), N, index.shape[1], -1), V, padding)
    if func is F.batch_norm and named.get("training"):
        return None  # samples are coupled
    return _norm_rule(func, named, x, N, shape)


def _linear_rows(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, S, i), B (r, N, S, o) -> (r, N, o, i), (r, N, o)."""
    return torch.einsum("rnso,nsi->rnoi", B, x), B.sum(2)


def _embedding_rows(index: Tensor, B: Tensor, V: int, padding: int | None) -> tuple[Tensor, Tensor]:
    """index (N, S), B (r, N, S, d) -> (r, N, V, d)."""
    if padding is not None:
        B = B * (index != padding % V)[None, :, :, None]
    rows = B.new_zeros((*B.shape[:2], V, B.shape[-1]))
    rows.scatter_add_(2, index[None, :, :, None].expand(B.shape), B)
    return rows, B.sum(2)


def _conv_rule(named: dict[str, Any], x: Tensor, N: int, shape: tuple[int, ...]) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    weight, dims = named["weight"], named["weight"].ndim - 2
    if x.ndim != dims + 2 or x.shape[0] != N:
        return None
    kernel, groups = weight.shape[2:], int(named.get("groups", 1))

    def each(name: str, default: int) -> tuple[int, ...]:
        value = named.get(name, default)
        values: tuple[int, ...] = (value,) if isinstance(value, int) else tuple(value)
        return tuple(values[i % len(values)] for i in range(dims))

    stride, dilation, padding = each("stride", 1), each("dilation", 1), named.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(0, 0)] * dims if padding == "valid" else [(p, p) for p in each("padding", 0)]
    out, width = shape[2:], weight.shape[0]

    def rows(B: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the kernels from patches of the padded input: (r, N, o, i / groups, *kernel), (r, N, o)."""
        padded = F.pad(x, [side for pair in reversed(pads) for side in pair]).contiguous()
        steps = padded.stride()[2:]
        size = (N, x.shape[1], *kernel, *out)
        strides = (*padded.stride()[:2], *(s * d for s, d in zip(steps, dilation, strict=True)))
        strides += tuple(s * t for s, t in zip(steps, stride, strict=True))
        patches = padded.as_strided(size, strides).reshape(N, groups, -1, math.prod(out))
        b = B.reshape(len(B), N, groups, width // groups, -1)
        return torch.einsum("rngos,ngks->rngok", b, patches).reshape(len(B), N, *weight.shape), B.reshape(len(B), N, width, -1).sum(3)

    return rows


def _norm_rule(
    func: Any, named: dict[str, Any], x: Tensor, N: int, shape: tuple[int, ...]
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    eps = {k: named[k] for k in ("eps",) if k in named}
    if func is F.batch_norm:
        if x.shape[0] != N or named.get("running_mean") is None:
            return None

        def plain() -> Tensor:
            return F.batch_norm(x, named["running_mean"], named["running_var"], **eps)

    elif func is F.group_norm:
        if x.shape[0] != N:
            return None

        def plain() -> Tensor:
            return F.group_norm(x, named["num_groups"], **eps)

    else:

        def plain() -> Tensor:
            result: Tensor = func(x, named["normalized_shape"], **eps)
            return result

    def rows(B: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of scale and shift: sums over the positions that share them."""
        if func in (F.batch_norm, F.group_norm):
            b = B.reshape(len(B), N, shape[1], -1)
            return (b * plain().reshape(N, shape[1], -1)).sum(3), b.sum(3)
        own = tuple(named["normalized_shape"])
        b = B.reshape(len(B), N, -1, *own)
        return (b * plain().reshape(N, -1, *own)).sum(2), b.sum(2)

    return rows
