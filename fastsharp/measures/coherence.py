"""m-coherence of the samples' gradients: N ||mean_i g_i||^2 / mean_i ||g_i||^2.

0 where the N gradients cancel, 1 where they are orthogonal, N where they are equal: how many samples, in effect, one step serves.
It does not survive a rescaling of the layers.

Source: Chatterjee and Zielinski 2008.01217.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fastsharp.batches import head
from fastsharp.errors import BatchFormatError, InputError
from fastsharp.measures.facts import BatchFacts, Need
from fastsharp.measures.fisher_rao import needs_of_slopes, slopes
from fastsharp.measures.statistic import SampleEstimate, Samples, quantile
from fastsharp.objective import Objective


class Coherence:
    """||g_i||^2 of every example and the mean gradient: one gradient an example, each evaluated by itself."""

    layers: frozenset[str] = frozenset()
    needs = Need.NOTHING

    def __init__(self, objective: Objective) -> None:
        if objective.modes.by_batch():
            raise InputError(
                "coherence evaluates samples one by one, and batch statistics or masks belong to whole batches. Choose bn='eval', dropout='eval'."
            )
        self._objective = objective
        self._total = torch.zeros(objective.selection.layout.n, dtype=torch.float64, device=objective.device)
        self._squares: list[float] = []

    def update(self, facts: BatchFacts) -> None:
        params = self._objective.selection.params
        for i in range(facts.count):
            example = head(facts.batch, i, i + 1)
            if example is None:
                raise BatchFormatError(f"coherence: batch {facts.index} cannot be cut into samples. Give every tensor a batch dimension.")
            value = self._objective.evaluate(facts.index, example)
            gradients = torch.autograd.grad(value.loss, params, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]
            flat = torch.cat([g.reshape(-1) for g in parts]).double() * value.scale
            self._total += flat
            self._squares.append(float(flat.square().sum()))

    @property
    def mean_gradient(self) -> torch.Tensor:
        """(n,) float64, the mean over examples."""
        return self._total / len(self._squares)

    def finished(self, along: torch.Tensor, confidence: float) -> SampleEstimate:
        """The result, given <g_i, mean gradient> (examples,) for its standard error: the delta method of a ratio of means."""
        squares = torch.tensor(self._squares, dtype=torch.float64)
        n, mean_square = squares.numel(), float(squares.mean())
        if mean_square == 0:
            raise InputError("coherence: every gradient is zero, so their coherence is 0/0. Measure before the loss is exactly flat.")
        length = float(self.mean_gradient.square().sum())
        value = n * length / mean_square
        influence = n * (2 * along - length) / mean_square - value * squares / mean_square
        stderr = float(influence.std()) / math.sqrt(n) if n > 1 else math.inf
        half = quantile(confidence, n) * stderr
        counted = Samples()
        counted.add(squares, torch.ones(n), torch.arange(n))
        return replace(counted.mean(confidence), value=value, stderr=stderr, interval=(max(0.0, value - half), value + half))


class Along:
    """<g_i, u> of every example, u the direction of the pass."""

    layers: frozenset[str] = frozenset()

    def __init__(self, objective: Objective) -> None:
        self.needs = needs_of_slopes(objective)
        self._parts: list[torch.Tensor] = []

    def update(self, facts: BatchFacts) -> None:
        values, weights, owners = slopes(facts)
        own = torch.zeros(facts.count, dtype=torch.float64)
        self._parts.append(own.index_add_(0, owners.cpu() - facts.start, (values * weights).double().cpu()))

    @property
    def values(self) -> torch.Tensor:
        """(examples,) float64."""
        return torch.cat(self._parts)
