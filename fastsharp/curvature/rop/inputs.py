"""Parts seen from some of their inputs alone: whether they are linear in these, the part for these alone, gradients sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import singledispatch

import torch
import torch.nn.functional as F

from fastsharp.curvature.rop.channel_norm import ChannelNorm
from fastsharp.curvature.rop.parts import Chain, Pointwise
from fastsharp.curvature.rop.rule import Part
from fastsharp.curvature.rop.rules.conv import Convolution
from fastsharp.curvature.rop.rules.conv_norm import ConvolutionNorm
from fastsharp.curvature.rop.rules.matmul import Linear, Product
from fastsharp.curvature.rop.rules.norm import RowNorm

Tensor = torch.Tensor
On = Sequence[bool]  # for each input of a part, whether it is meant


@singledispatch
def bends(part: Part, on: On) -> bool:
    """Whether d^2 y / dx_i dx_j may be other than zero for two of the inputs meant, i = j included. False is certain, True need not be."""
    return part.second_order


@bends.register
def _(part: Pointwise, on: On) -> bool:
    return part.second_order and any(on[i] and on[j] for i, j in part.bends or part.weights)


@bends.register(Convolution)
@bends.register(Linear)
def _(part: Convolution | Linear, on: On) -> bool:
    return on[0] and on[1]


@bends.register
def _(part: Product, on: On) -> bool:
    return on[part.first] and on[part.first + 1]


_MEET = (("x", "weight"), ("x", "gamma"), ("weight", "gamma"), ("bias", "gamma"))  # factors of one product


@bends.register
def _(part: ConvolutionNorm, on: On) -> bool:
    meant = {name for name, i in part.places.items() if on[i]}
    return any(meant >= set(pair) for pair in _MEET)


@bends.register
def _(part: ChannelNorm, on: On) -> bool:
    x, w = ((i >= 0 and on[i]) for i in part.places.at[:2])
    return x and (w or part.groups > 0)  # groups of 0 channels: the statistics are constants


@bends.register
def _(part: RowNorm, on: On) -> bool:
    return on[part.places.at[0]]


@bends.register
def _(part: Chain, on: On) -> bool:
    return bends(part.parts[0], on) or any(p.second_order for p in part.parts[1:])


@singledispatch
def only(part: Part, on: On) -> Part:
    """The same part differentiated by the inputs meant alone: it shares all tensors, and `backward` without `kept` does not compute
    what nobody asked for. Parts that save nothing that way are returned as they are."""
    return part


@only.register
def _(part: Convolution, on: On) -> Part:
    twin = copy.copy(part)
    twin.on = [a and b for a, b in zip(part.on, (*on, False), strict=False)]
    return twin


@only.register
def _(part: Linear, on: On) -> Part:
    twin = copy.copy(part)
    twin.on = [a and b for a, b in zip(part.on, (*on, False), strict=False)]
    return twin


@only.register
def _(part: Product, on: On) -> Part:
    twin = copy.copy(part)
    twin.on = [a and b for a, b in zip(part.on, on[part.first :], strict=True)]
    twin.c_shape = part.c_shape if part.first and on[0] else None
    return twin


@only.register
def _(part: ConvolutionNorm, on: On) -> Part:
    twin = copy.copy(part)
    twin.places = {name: i for name, i in part.places.items() if on[i]}
    meant = twin.places.keys()
    twin.conv = copy.copy(part.conv)
    twin.conv.on = ("x" in meant, bool(meant & {"weight", "gamma"}), bool(meant & {"bias", "gamma", "beta"}))
    return twin


@only.register(ChannelNorm)
@only.register(RowNorm)
def _(part: ChannelNorm | RowNorm, on: On) -> Part:
    twin = copy.copy(part)
    twin.places = copy.copy(part.places)
    twin.places.on = [there and on[i] for there, i in zip(part.places.on, part.places.at, strict=True)]
    return twin


@singledispatch
def by_sample(part: Part, samples: int) -> bool:
    """Whether `sample_gradients` knows this part, with x of so many samples."""
    return False


@by_sample.register
def _(part: Linear, samples: int) -> bool:
    return part.rows % samples == 0


@by_sample.register
def _(part: Convolution, samples: int) -> bool:
    transposed, groups = part.options[3], part.options[5]
    return part.x.dim() == 4 and len(part.x) == samples and not transposed and groups == 1


@by_sample.register
def _(part: ConvolutionNorm, samples: int) -> bool:
    return by_sample(part.conv, samples)


@singledispatch
def sample_gradients(part: Part, g: Tensor, samples: int) -> list[Tensor | None]:
    """J_s' g_s for each sample s by itself: g (b, samples, ...) an adjoint of y -> (b, samples, *shape) for each input that is a parameter.

    The part is one that `only` made for parameters, and `by_sample` knows it: the products are as many as those of a batch's gradient, where
    one sample after the other would start `samples` kernels.
    """
    raise NotImplementedError(type(part).__name__)


@sample_gradients.register
def _(part: Linear, g: Tensor, samples: int) -> list[Tensor | None]:
    b, places = len(g), part.rows // samples
    g = g.reshape(b, samples, places, -1)
    if part.mask is not None:
        g = g * part.mask.view(samples, places, -1)
    out: list[Tensor | None] = [None] * part.inputs
    if part.on[1] and part.x is not None:
        x = part.x.view(samples, places, -1)
        if places == 1:
            out[1] = g.transpose(2, 3) * x
        else:
            joined = g.permute(1, 0, 3, 2).reshape(samples, -1, places) @ x
            out[1] = joined.view(samples, b, -1, x.shape[2]).transpose(0, 1)
    if part.on[2]:
        out[2] = g.sum(2)
    return out


@sample_gradients.register
def _(part: Convolution, g: Tensor, samples: int) -> list[Tensor | None]:
    stride, padding, dilation = part.options[:3]
    b = len(g)
    g = g.reshape(b, *part.y_shape)
    out: list[Tensor | None] = [None] * part.inputs
    if part.on[1]:
        x = part.x.contiguous()  # unfold is 8 times slower on channels-last memory
        patches = F.unfold(x, part.weight.shape[2:], dilation=dilation, padding=padding, stride=stride)  # (samples, in kh kw, places)
        joined = g.transpose(0, 1).reshape(samples, -1, patches.shape[2]) @ patches.mT
        out[1] = joined.view(samples, b, *part.weight.shape).transpose(0, 1)
    if part.on[2]:
        out[2] = g.sum((3, 4))
    return out


@sample_gradients.register
def _(part: ConvolutionNorm, g: Tensor, samples: int) -> list[Tensor | None]:
    b = len(g)
    if part.mask is not None:
        g = g.reshape(b, *part.mask.shape) * part.mask
    inner = sample_gradients(part.conv, g, samples)
    W_g, c_g = (None if t is None else t.flatten(0, 1) for t in (inner[1], inner[2]))
    return [None if t is None else torch.unflatten(t, 0, (b, samples)) for t in part.gradients(W_g, c_g)]
