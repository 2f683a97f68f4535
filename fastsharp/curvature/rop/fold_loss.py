"""Cross-entropy with class targets: log-softmax of rows and negative log-likelihood as one call."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastsharp.curvature.rop.rule import Call
from fastsharp.curvature.rop.rules.loss import softmax_ce

aten = torch.ops.aten


def fold_softmax_ce(calls: list[Call], uses: Mapping[int, int]) -> list[Call]:
    """log-probabilities that nothing but the loss uses vanish; the logits stay a value. Arguments as those of `fold.fold`."""
    made = {id(call.outputs[0]): call for call in calls if call.func is aten._log_softmax.default and _rows(call)}
    folded: dict[int, Call] = {}  # the loss's call by that of its log-softmax
    for call in calls:
        if call.func is not aten.nll_loss_forward.default or any(call.active[1:]):
            continue
        source = made.get(id(call.args[0]))
        if source is not None and uses[id(call.args[0])] == 1:
            folded[id(call)] = source
    gone = {id(source) for source in folded.values()}
    return [_fused(folded[id(call)], call) if id(call) in folded else call for call in calls if id(call) not in gone]


def _rows(call: Call) -> bool:
    x, y = call.inputs[0], call.outputs[0]
    return x.dim() == 2 and call.argument(1, "dim") in (1, -1) and x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64)


def _fused(source: Call, loss: Call) -> Call:
    x = source.inputs[0]
    options = (loss.argument(2, "weight"), loss.argument(3, "reduction", 1), loss.argument(4, "ignore_index", -100))
    return Call(softmax_ce, (x, loss.args[1], *options), {}, loss.outputs, lambda t: t is x, loss.module)
