"""The operator of a part of another's parameters, on the same data and weights."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TypeVar

import torch

from fastsharp.curvature.backends import against
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.params import select

Sum = TypeVar("Sum", bound=FiniteSum)


def narrowed(operator: Sum, names: Collection[str]) -> Sum:
    """The diagonal block of these parameters as an operator of its own, differentiated by them alone.

    Its tangents begin where the first of them enters, and its adjoints end there. Data, modes and the watch over weights are shared, and so
    is the memory budget; the preflight is that of the whole.
    """
    twin = copy.copy(operator)
    twin.objective = copy.copy(operator.objective)
    twin.objective.selection = select(operator.objective.model, lambda name, p: name in names)
    twin.n = twin.objective.selection.layout.n
    if len(operator._candidates) > 1:
        twin._candidates = [name for name in operator._candidates if against(name, twin.objective) is None]
    twin._refusals = []
    twin._reset()
    return twin


def unused(operator: FiniteSum) -> tuple[str, ...]:
    """Names of the parameters to which the loss has no path in any batch; one product, where none was computed yet."""
    if operator._denominator is None:
        operator.apply(torch.zeros(1, operator.n, dtype=operator.dtype, device=operator.device))
    return operator._unused
