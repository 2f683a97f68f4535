"""Measures of the outputs' dependence on the inputs: the input Jacobian, and how near the decision boundary is.

    input Jacobian        ||d f_i / d x_i||_F of logits, or of probabilities: C reverse passes for all samples at once
    boundary tightness    1 / mean_i |m_i| / ||d m_i / d x_i||: the reciprocal of the mean distance to the boundary to first order,
                          m_i the margin of sample i. One reverse pass

They are those of the function: a rescaling of layers that leaves it as it is leaves them too. The tightness does not change with a
temperature either, the Jacobian of logits does. Samples must not interact in the network (no batch statistics).

Sources: Novak et al., "Sensitivity and generalization in neural networks" (ICLR 2018); Elsayed et al., "Large margin deep networks for
classification" (NeurIPS 2018), the distance to first order.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fastsharp.errors import DisconnectedLossError, InputError, ShapeError
from fastsharp.measures.facts import BatchFacts, Need
from fastsharp.measures.outputs import Margin
from fastsharp.measures.statistic import SampleEstimate, Samples

OF = ("logits", "probabilities")


class InputJacobian:
    """mean_i ||d f_i / d x_i||_F over examples; `of` "probabilities" takes softmax(f_i) over the classes in place of f_i."""

    layers: frozenset[str] = frozenset()
    needs = Need.INPUTS

    def __init__(self, of: str, confidence: float) -> None:
        self._of, self._confidence = of, confidence
        self._samples = Samples()

    def update(self, facts: BatchFacts) -> None:
        output = facts.output
        if output.shape[:1] != (facts.count,):
            raise ShapeError(f"{facts.what}: the output {tuple(output.shape)} has no row for each of the {facts.count} examples.")
        if self._of == "probabilities":
            output = output.softmax(1 if output is facts.value.output else -1)
        columns = output.reshape(facts.count, -1).sum(0)
        total = torch.zeros(facts.count, dtype=torch.float64, device=output.device)
        for k in range(columns.numel()):
            total += squared_norms(columns[k], facts)
        self._samples.add(total.sqrt(), torch.ones(facts.count), facts.example_owners())

    def result(self) -> SampleEstimate:
        return self._samples.mean(self._confidence)


class BoundaryTightness:
    """1 / mean_i |d_i| with d_i = m_i / ||d m_i / d x_i||; `per_sample` holds the signed distances d_i."""

    layers: frozenset[str] = frozenset()
    needs = Need.INPUTS

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence
        self._samples = Samples()

    def update(self, facts: BatchFacts) -> None:
        units = facts.units
        if bool((units.owners.bincount() > 1).any()):
            raise InputError(f"{facts.what}: an example has several labels, as tokens have. It needs one label an example.")
        margins = Margin.of(units)
        norms = squared_norms(margins.sum(), facts).sqrt()[units.owners]
        self._samples.add(margins.detach().double() / norms, units.weights, facts.owners)

    def result(self) -> SampleEstimate:
        self._samples.require_any()
        distances = self._samples.values
        seen = distances.isfinite()
        if not bool(seen.any()):
            raise InputError(
                "boundary_tightness: no sample's margin depends on its input, so there is no distance. Check the network for dead units."
            )
        weights, owners = self._samples.weights[seen], self._samples.owners[seen]
        counted = Samples()
        counted.add(distances[seen].abs(), weights, owners)
        mean = counted.mean(self._confidence)
        lo, hi = mean.interval
        result = replace(
            mean,
            value=reciprocal(mean.value),
            stderr=mean.stderr * reciprocal(mean.value) ** 2,
            interval=(reciprocal(hi), reciprocal(max(lo, 0.0))),
            per_sample=distances,
        )
        left_out = int((~seen).sum())
        note = f"{left_out} samples left out: their margin does not depend on the input to first order"
        return replace(result, notes=(note,)) if left_out else result


def reciprocal(value: float) -> float:
    return 1 / value if value else math.inf


def squared_norms(scalar: torch.Tensor, facts: BatchFacts) -> torch.Tensor:
    """(count,) float64: ||d scalar / d x_i||^2 over the floating-point inputs of each example."""
    if not scalar.requires_grad:
        raise DisconnectedLossError(
            f"{facts.what}: the output has no path to the inputs. Remove .detach() or torch.no_grad() from the forward pass."
        )
    total = torch.zeros(facts.count, dtype=torch.float64, device=scalar.device)
    for x, g in zip(facts.inputs, torch.autograd.grad(scalar, facts.inputs, retain_graph=True, allow_unused=True), strict=True):
        if g is not None:
            if x.shape[:1] != (facts.count,):
                raise ShapeError(
                    f"{facts.what}: an input has shape {tuple(x.shape)}, the batch {facts.count} examples. Give each example its row."
                )
            total += g.double().square().reshape(facts.count, -1).sum(1)
    return total
