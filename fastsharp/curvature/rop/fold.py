"""Peepholes: runs of calls that one fused part linearises in fewer passes over the activations.

t, addmm or mm, (relu)                  linear: the parameter's adjoint goes straight to its place in the flat result
convolution, batch norm, (add), (relu)  convolution_norm: the norm, on constant statistics, becomes part of the weight
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.fold_loss import fold_softmax_ce
from fastsharp.curvature.rop.rule import Call
from fastsharp.curvature.rop.rules.conv_norm import convolution_norm
from fastsharp.curvature.rop.rules.matmul import linear

aten = torch.ops.aten

Uses = Mapping[int, int]
Makers = Mapping[int, Call]  # {id(t): the call that made it}

CANCELLATION = 100.0  # the largest |mean - bias| / sigma that the folded norm may have to take off again, two digits of seven


def fold(calls: list[Call], uses: Uses) -> list[Call]:
    """The same function of the same leaves by fewer calls, in an order in which each value comes before its uses.

    calls   the active calls from which the loss follows, in the order of their evaluation
    uses    {id(t): how often t is an active input of a call, and once more for the loss and for each output of the network}.
            A value may vanish inside a fused call where uses[id(t)] is 1. Tensors stand for values: the output of one call and the
            input of another are the same object, and a value that autograd holds constant is another object than the active one.
    """
    calls = fold_softmax_ce(calls, uses)
    for peephole in (_linear, _norm, _skip, _relu):
        calls = _replaced(calls, uses, peephole)
    return calls


def _replaced(calls: list[Call], uses: Uses, peephole: Callable[[Call, Makers, Uses], tuple[Call, Call] | None]) -> list[Call]:
    """Each call for which the peephole answers (call that goes into it, fused call), replaced; what went into all its uses, dropped."""
    makers = {id(t): call for call in calls for t in call.outputs}
    taken: Counter[int] = Counter()  # by value
    kept: list[Call] = []
    for call in calls:
        found = peephole(call, makers, uses)
        if found is not None:
            taken[id(found[0].outputs[0])] += 1
            call = found[1]
            makers.update((id(t), call) for t in call.outputs)
        kept.append(call)
    return [call for call in kept if not 0 < taken[id(call.outputs[0])] == uses[id(call.outputs[0])]]


def _fused(func: Any, args: Sequence[Any], outputs: Any, calls: Sequence[Call]) -> Call:
    active = {id(t) for call in calls for t, a in zip(call.inputs, call.active, strict=True) if a}
    return Call(func, args, {}, outputs, lambda t: id(t) in active, calls[-1].module)


def _linear(call: Call, makers: Makers, uses: Uses) -> tuple[Call, Call] | None:
    """x W' by mm, or c + x W' by addmm."""
    bias: torch.Tensor | None = None
    if call.func is aten.mm.default:
        x, factor = call.args
    elif call.func is aten.addmm.default and call.kwargs.get("beta", 1) == 1 and call.kwargs.get("alpha", 1) == 1:
        bias, x, factor = call.args
        if bias.shape != factor.shape[1:]:
            return None
    else:
        return None
    turned = makers.get(id(factor))
    if turned is None or not _transposes(turned):
        return None
    args = [x, turned.inputs[0], *([] if bias is None else [bias])]
    return turned, _fused(linear, args, call.outputs, [turned, call])


def _transposes(call: Call) -> bool:
    if call.inputs[0].dim() != 2:
        return False
    if call.func is aten.transpose.int:
        return bool((call.args[1] - call.args[2]) % 2)
    return bool(call.func is aten.t.default or (call.func is aten.permute.default and [d % 2 for d in call.args[1]] == [1, 0]))


_NORMS = (
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_no_update.default,
)


def _named(call: Call) -> dict[str, Any]:
    """The arguments by the names of the schema."""
    given = dict(zip((a.name for a in call.func._schema.arguments), call.args, strict=False))
    return given | call.kwargs


def _norm(call: Call, makers: Makers, uses: Uses) -> tuple[Call, Call] | None:
    """Batch norm on running statistics of a convolution that nothing else sees."""
    conv = makers.get(id(call.inputs[0])) if call.func in _NORMS else None
    if conv is None or conv.func is not aten.convolution.default:
        return None
    inner, outer = _named(conv), _named(call)
    mean, var = outer["running_mean"], outer["running_var"]
    if inner["transposed"] or outer.get("training") or mean is None or var is None:
        return None
    if uses[id(conv.outputs[0])] != 1 or any(uses.get(id(t)) for t in call.outputs[1:]):
        return None
    if any(a and (t is mean or t is var) for t, a in zip(call.inputs, call.active, strict=True)):
        return None
    weight, bias, gamma, beta = inner["weight"], inner["bias"], outer["weight"], outer["bias"]
    dtypes = {t.dtype for t in (inner["input"], weight, bias, gamma, beta, mean, var) if t is not None}
    if dtypes not in ({torch.float32}, {torch.float64}):
        return None
    eps = outer["eps"] if "eps" in outer else outer["epsilon"]
    if not _pays(weight, conv.outputs[0]) or _cancels(mean, var, bias, eps):
        return None
    options = [inner[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    args = [inner["input"], weight, bias, gamma, beta, mean, var, None, eps, False, *options]
    return conv, _fused(convolution_norm, args, call.outputs[:1], [conv, call])


def _pays(weight: torch.Tensor, y: torch.Tensor) -> bool:
    """The fused norm passes over the weight where one by itself passes over the activations."""
    return weight.numel() <= y.numel()


def _cancels(mean: torch.Tensor, var: torch.Tensor, bias: torch.Tensor | None, eps: float) -> bool:
    """Whether the two terms of the adjoint of gamma, <W'_g, W> and (c - mean) c'_g, are much larger than their sum."""
    shift = mean if bias is None else mean - bias
    return bool((shift.abs() > CANCELLATION * (var + eps).sqrt()).any())


def _skip(call: Call, makers: Makers, uses: Uses) -> tuple[Call, Call] | None:
    """The sum of a convolution with its norm and a skip connection of the same shape."""
    if call.func is not aten.add.Tensor or call.kwargs.get("alpha", 1) != 1 or len(call.inputs) != 2:
        return None
    for y, skip in (call.inputs, call.inputs[::-1]):
        made = makers.get(id(y))
        alone = uses.get(id(y)) == 1 and y.shape == skip.shape and y.dtype == skip.dtype
        if alone and made is not None and made.func is convolution_norm and made.args[7] is None:
            args = [*made.args]
            args[7] = skip
            return made, _fused(convolution_norm, args, call.outputs, [made, call])
    return None


def _relu(call: Call, makers: Makers, uses: Uses) -> tuple[Call, Call] | None:
    """The activation of a linear layer, or of a convolution with its norm."""
    if call.func is not aten.relu.default or uses[id(call.inputs[0])] != 1:
        return None
    made = makers.get(id(call.inputs[0]))
    if made is None:
        return None
    if made.func is linear:
        args = [*made.args, *[None] * (3 - len(made.args)), True]
    elif made.func is convolution_norm:
        args = [*made.args]
        args[9] = True
    else:
        return None
    return made, _fused(made.func, args, call.outputs, [made])
