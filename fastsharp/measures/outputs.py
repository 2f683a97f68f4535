"""Measures of the outputs alone: margin, confidence and logit scale of a classifier. Functions of the function, whatever its weights.

For logits f_i (C,) with label y and p_i = softmax(f_i):

    margin        f_i[y] - max over c != y of f_i[c]         larger: further from the boundary, in units of logits; negative: misclassified
    confidence    max over c of p_i[c]
    logit scale   ||f_i - mean_c f_i[c]||                    the softmax does not see the mean

None changes under a rescaling of layers that leaves the function as it is. All change with a temperature; of margin / logit scale only that cancels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fastsharp.errors import InputError
from fastsharp.measures.classes import Units
from fastsharp.measures.facts import BatchFacts, Need
from fastsharp.measures.statistic import SampleEstimate, Samples


class _OfUnits(ABC):
    """The mean over units of a number that the unit's logits and label decide."""

    layers: frozenset[str] = frozenset()
    needs = Need.NOTHING

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence
        self._samples = Samples()

    def update(self, facts: BatchFacts) -> None:
        self._samples.add(self.of(facts.units), facts.units.weights, facts.owners)

    def result(self) -> SampleEstimate:
        return self._samples.mean(self._confidence)

    @staticmethod
    @abstractmethod
    def of(units: Units) -> torch.Tensor:
        """(u,) the measure of each unit."""


class Margin(_OfUnits):
    """mean_i (f_i[y] - max over c != y of f_i[c])."""

    @staticmethod
    def of(units: Units) -> torch.Tensor:
        if units.logits.shape[1] < 2:
            raise InputError("margin needs two classes or more, the output has one column. Return one logit a class.")
        own = units.labels[:, None]
        return (units.logits.gather(1, own) - units.logits.scatter(1, own, -torch.inf).max(1, keepdim=True).values).squeeze(1)


class Confidence(_OfUnits):
    """mean_i max_c p_i[c]."""

    @staticmethod
    def of(units: Units) -> torch.Tensor:
        return units.logits.softmax(1).max(1).values


class LogitScale(_OfUnits):
    """mean_i ||f_i - mean_c f_i[c]||."""

    @staticmethod
    def of(units: Units) -> torch.Tensor:
        centred: torch.Tensor = units.logits - units.logits.mean(1, keepdim=True)
        norms: torch.Tensor = torch.linalg.vector_norm(centred, dim=1)
        return norms
