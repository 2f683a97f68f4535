"""Curvature of single samples: u'H_i u, and tr H_i by probes, for all samples of a batch at once.

With S(c) = sum_i c_i l_i the number u' (d^2 S / d theta^2) u is linear in c, and its derivative in c is the vector of all u'H_i u: three
reverse passes through the graph of a batch, however many samples it has. H_i is the Hessian of the loss of sample i in the parameters.

Their weighted mean is u'Hu (or tr H). None survives a rescaling of the layers. Per-sample curvature as a sign of memorised samples:
Garg, Ravikumar, Roy 2307.05831 (in the inputs); Merullo et al. 2510.24256 (in the weights).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fastsharp import rng
from fastsharp.measures.facts import BatchFacts, Need
from fastsharp.measures.statistic import SampleEstimate, Samples, ratio
from fastsharp.objective import Objective
from fastsharp.quantiles import normal, student

_STUDENT = 5


class SampleCurvature:
    """mean_i u'H_i u for a unit vector u (n,)."""

    layers: frozenset[str] = frozenset()
    needs = Need.GRAPH

    def __init__(self, objective: Objective, direction: torch.Tensor, confidence: float) -> None:
        self._parts = objective.selection.layout.views(direction)
        self._confidence = confidence
        self._samples = Samples()

    def update(self, facts: BatchFacts) -> None:
        losses, weights, owners = facts.example_losses()
        self._samples.add(curvatures(losses, facts.objective.selection.params, [self._parts])[0], weights, owners)

    def result(self) -> SampleEstimate:
        return self._samples.mean(self._confidence)


class LossTrace:
    """mean_i tr H_i by random signs z_k: the mean over k of z_k'H_i z_k. `per_sample` holds each sample's mean over the probes."""

    layers: frozenset[str] = frozenset()
    needs = Need.GRAPH

    def __init__(self, objective: Objective, probes: int, seed: int, confidence: float) -> None:
        layout = objective.selection.layout
        Z = torch.randint(0, 2, (probes, layout.n), generator=rng.generator(seed)).to(objective.device, objective.dtype)
        self._directions = [layout.views(z) for z in 2 * Z - 1]
        self._confidence = confidence
        self._samples = Samples()
        self._by_probe: list[torch.Tensor] = []

    def update(self, facts: BatchFacts) -> None:
        losses, weights, owners = facts.example_losses()
        values = curvatures(losses, facts.objective.selection.params, self._directions).double().cpu()
        self._by_probe.append(values)
        self._samples.add(values.mean(0), weights, owners)

    def result(self) -> SampleEstimate:
        over_samples = self._samples.mean(self._confidence)
        weights, owners = self._samples.weights, self._samples.owners
        means = torch.tensor([ratio(v, weights, owners)[0] for v in torch.cat(self._by_probe, 1)], dtype=torch.float64)
        k = means.numel()
        of_probes = float(means.std()) / math.sqrt(k) if k > 1 else math.inf
        p = (1 + self._confidence) / 2
        half_samples = over_samples.interval[1] - over_samples.value
        half = math.hypot(half_samples, (student(p, k - 1) if k > _STUDENT else normal(p)) * of_probes)
        return replace(
            over_samples,
            stderr=math.hypot(over_samples.stderr, of_probes),
            interval=(over_samples.value - half, over_samples.value + half),
            notes=(f"{k} probes: standard error {of_probes:.3g} of the trace for these samples",),
        )


def curvatures(losses: torch.Tensor, params: tuple[torch.Tensor, ...], directions: list[list[torch.Tensor]]) -> torch.Tensor:
    """(directions, losses): u'H_i u from losses (u,) with their graph to the parameters."""
    c = torch.ones_like(losses, requires_grad=True)
    gradients = torch.autograd.grad((c * losses).sum(), params, create_graph=True, allow_unused=True)
    rows = []
    for u in directions:
        second = _along(_along_parts(gradients, u), params, u)
        rows.append(torch.zeros_like(losses) if second is None else _derivative(second, c))
    return torch.stack(rows).detach()


def _along_parts(parts: tuple[torch.Tensor | None, ...], u: list[torch.Tensor]) -> torch.Tensor | None:
    terms = [(g * t).sum() for g, t in zip(parts, u, strict=True) if g is not None and g.requires_grad]
    return torch.stack(terms).sum() if terms else None


def _along(scalar: torch.Tensor | None, params: tuple[torch.Tensor, ...], u: list[torch.Tensor]) -> torch.Tensor | None:
    """<d scalar / d theta, u>, with its graph; None where there is no path."""
    if scalar is None:
        return None
    return _along_parts(torch.autograd.grad(scalar, params, create_graph=True, allow_unused=True), u)


def _derivative(scalar: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(scalar, c, retain_graph=True, allow_unused=True)
    return torch.zeros_like(c) if found is None else found
