"""Peepholes: runs of calls that one fused part linearises in fewer passes over the activations."""

from __future__ import annotations

from collections.abc import Mapping

from fastsharp.curvature.rop.fold_loss import fold_softmax_ce
from fastsharp.curvature.rop.rule import Call


def fold(calls: list[Call], uses: Mapping[int, int]) -> list[Call]:
    """The same function of the same leaves by fewer calls, in an order in which each value comes before its uses.

    calls   the active calls from which the loss follows, in the order of their evaluation
    uses    {id(t): how often t is an active input of a call, and once more for the loss and for each output of the network}.
            A value may vanish inside a fused call where uses[id(t)] is 1. Tensors stand for values: the output of one call and the
            input of another are the same object, and a value that autograd holds constant is another object than the active one.
    """
    calls = fold_softmax_ce(calls, uses)
    return calls
