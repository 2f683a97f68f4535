"""Measures by name, at any weights of one network on the same frozen data, and how large a change of each can be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from fastsharp.api.eigenpairs import lanczos
from fastsharp.api.measures_closed import fisher_rao, relative_flatness
from fastsharp.api.measures_function import boundary_tightness, input_jacobian, logit_scale, margin, prediction_confidence
from fastsharp.api.sharpness import sharpness
from fastsharp.api.trace import frobenius, trace
from fastsharp.curvature import Hessian
from fastsharp.errors import FastsharpError, NonFiniteError, StaleOperatorError, in_a_line
from fastsharp.measures.statistic import SampleEstimate
from fastsharp.params import Selector
from fastsharp.quantiles import student
from fastsharp.results import Eigenpairs, Estimate, Sharpness

_FLOORS = 8.0  # rms changes by one unit in the last place: what rounding may do to a difference of losses
_SPECTRAL_TOL = 1e-3


@dataclass
class Subject:
    """The network at one set of weights, on the frozen data."""

    model: nn.Module
    data: Any
    loss_fn: Any
    options: Mapping[str, Any]  # reduction, bn, dropout, memory
    params: Selector
    backend: str
    preflight: str
    how: Mapping[str, Any]  # rtol, rho, ascent_rho, directions, confidence, seed

    @cached_property
    def hessian(self) -> Hessian:
        given: dict[str, Any] = {**self.options, "params": self.params, "backend": self.backend, "seed": self.how["seed"]}
        return Hessian(self.model, self.data, self.loss_fn, **given)

    def end(self, which: str) -> Estimate:
        """One end of the spectrum; the interval is the pair's bound."""
        seed = self.how["seed"]
        pair: Eigenpairs = lanczos(self.hessian, k=1, which=which, tol=_SPECTRAL_TOL, seed=seed, preflight=self.preflight, progress=False)
        value, bound = float(pair.eigenvalues[0]), float(pair.error_bounds[0])
        return Estimate.certain(value, (value - bound, value + bound), n_matvec=pair.n_matvec, converged=bool(pair.converged[0]))

    def probed(self, solve: Callable[..., Estimate]) -> Estimate:
        """Trace or norm by probes."""
        how = {name: self.how[name] for name in ("rtol", "confidence", "seed")}
        return solve(self.hessian, preflight=self.preflight, progress=False, **how)

    def perturbed(self, kind: str, scale: str) -> Sharpness:
        rho = self.how["rho" if kind == "sam" else "ascent_rho"]
        how = {"directions": self.how["directions"]} if kind == "sam" else {}
        return sharpness(
            self.model, self.data, self.loss_fn, kind=kind, rho=rho, scale=scale, params=self.params, progress=False,
            confidence=self.how["confidence"], seed=self.how["seed"], **how, **self.options,
        )  # fmt: skip

    def of_samples(self, call: Callable[..., Estimate], **given: Any) -> Estimate:
        return call(self.model, self.data, self.loss_fn, progress=False, confidence=self.how["confidence"], **given, **self.options)


MEASURES: dict[str, Callable[[Subject], Estimate]] = {
    "lambda_max": lambda s: s.end("LA"),
    "lambda_min": lambda s: s.end("SA"),
    "trace": lambda s: s.probed(trace),
    "frobenius": lambda s: s.probed(frobenius),
    "sam": lambda s: s.perturbed("sam", "none"),
    "layer_sam": lambda s: s.perturbed("sam", "layer"),
    "filter_sam": lambda s: s.perturbed("sam", "filter"),
    "ascent": lambda s: s.perturbed("ascent", "none"),
    "adaptive_ascent": lambda s: s.perturbed("ascent", "adaptive"),
    "fisher_rao": lambda s: s.of_samples(fisher_rao, params=s.params),
    "fisher_rao_closed": lambda s: s.of_samples(fisher_rao, form="closed"),
    "relative_flatness": lambda s: s.of_samples(relative_flatness),
    "margin": lambda s: s.of_samples(margin),
    "prediction_confidence": lambda s: s.of_samples(prediction_confidence),
    "logit_scale": lambda s: s.of_samples(logit_scale),
    "boundary_tightness": lambda s: s.of_samples(boundary_tightness),
    "input_jacobian": lambda s: s.of_samples(input_jacobian),
}
DEFAULT = (
    "lambda_max", "trace", "sam", "layer_sam", "adaptive_ascent", "fisher_rao", "relative_flatness",
    "margin", "logit_scale", "boundary_tightness", "input_jacobian",
)  # fmt: skip


def measured_at(subject: Subject, names: list[str]) -> tuple[dict[str, Estimate], dict[str, str]]:
    """(estimates, {name: why it has none}); what is not finite, and weights that changed on the way, are errors."""
    found: dict[str, Estimate] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            found[name] = MEASURES[name](subject)
        except (NonFiniteError, StaleOperatorError):
            raise
        except (FastsharpError, NotImplementedError) as e:
            skipped[name] = in_a_line(e)
    return found, skipped


def error_of_change(before: Estimate, after: Estimate, eps: float, unit: float, confidence: float) -> float:
    """How large a change has to be to be told from none; `unit` is eps times the loss."""
    if isinstance(before, Sharpness) and isinstance(after, Sharpness):
        k, per = before.samples, before.settings["rho"] if before.settings["kind"] == "sam" else 1.0
        rounding = _FLOORS * (before.noise_floor + after.noise_floor + unit / per)
        if not k:
            return rounding
        # the same directions on both sides: what counts is the spread of their differences
        differences = (after.changes.abs() - before.changes.abs()) / per
        return rounding + student((1 + confidence) / 2, k - 1) * float(differences.std()) / math.sqrt(k)
    if isinstance(before, SampleEstimate) and isinstance(after, SampleEstimate):
        # exact for these samples but for rounding; a mean that cancels is rounded at the size of its terms
        return math.sqrt(eps) * max(_size(before), _size(after))
    return sum((e.interval[1] - e.interval[0]) / 2 for e in (before, after))


def _size(e: SampleEstimate) -> float:
    spread = e.stderr * math.sqrt(e.samples)
    return max(abs(e.value), spread if math.isfinite(spread) else 0.0)
