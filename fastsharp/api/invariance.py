"""`fastsharp.invariance`: which measures move under rescalings of the weights that leave the decisions of the network as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastsharp.api.eigenpairs import lanczos
from fastsharp.api.measures_closed import fisher_rao, relative_flatness
from fastsharp.api.measures_function import boundary_tightness, input_jacobian, logit_scale, margin, prediction_confidence
from fastsharp.api.samples_of import label_forms
from fastsharp.api.sharpness import sharpness
from fastsharp.api.subject import first_steps
from fastsharp.api.trace import frobenius, trace
from fastsharp.curvature import Hessian
from fastsharp.errors import ArgumentTypeError, FastsharpError, InputError, NonFiniteError, StaleOperatorError
from fastsharp.measures.landscape import Landscape
from fastsharp.measures.rescaling import Outputs, Scaling, layer_scalings, temperature_scaling
from fastsharp.measures.statistic import SampleEstimate, check_confidence
from fastsharp.objective import Objective
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.quantiles import student
from fastsharp.results import Eigenpairs, Estimate, Invariance, Sharpness

_FLOORS = 8.0  # rms changes by one unit in the last place: what rounding may do to a difference of losses
_SPECTRAL_TOL = 1e-3


@dataclass
class _Subject:
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
        return Estimate(value, 0.0, (value - bound, value + bound), 1.0, 0, pair.n_matvec, bool(pair.converged[0]))

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


MEASURES: dict[str, Callable[[_Subject], Estimate]] = {
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


def invariance(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    measures: str | Iterable[str] = DEFAULT,
    factor: float = 4.0,
    temperature: float | None = 2.0,
    pairs: int | None = 3,
    rtol: float = 0.05,
    rho: float = 0.005,
    ascent_rho: float = 0.05,
    directions: int = 50,
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    preflight: str = "fast",
) -> Invariance:
    """m(theta') / m(theta) for measures m and rescaled weights theta' under which the network decides as before.

        found = fastsharp.invariance(model, loader)
        found.table(); found.survives("lambda_max", "layers"); found.refused

    Layers: weight and bias of one layer times `factor`, the weight of the next divided by it, for neighbours in the order of their calls. Which
    of these leave the outputs as they are is found by trying them on a copy of the model, on all the data, to the rounding of the outputs; the
    model itself is never written to. The others are in `.refused` with the reason. Temperature: weight and bias of the head divided by it.

    measures     names out of `fastsharp.api.invariance.MEASURES`; the default leaves out lambda_min, frobenius, filter_sam, ascent,
                 fisher_rao_closed, prediction_confidence
    factor       positive, not 1; a power of two rounds nothing
    temperature  positive, not 1, or None for none
    pairs        how many of the layer rescalings found are measured, evenly spread over the network; None: all
    rtol, confidence   of the trace and the norm, as in `fastsharp.trace`
    rho, ascent_rho, directions   of the perturbations, as in `fastsharp.measure`; the same directions every time
    params, reduction, bn, dropout, backend, memory, seed, progress, preflight   as in `fastsharp.lanczos`

    Returns Invariance. A change counts as a move (`.moved`) where it exceeds its error: the sum of both bounds or half intervals of eigenvalues
    and probes, the interval of the paired differences of random directions, and sqrt(eps) of the measure's spread over samples, plus rounding.
    Cost: a few forward passes a layer, then (1 + rescalings) times the measures; memory: one copy of the model and the outputs on the data.
    Raises InputError where nothing can be rescaled, or for arguments; ArgumentTypeError; what the data and the model raise.
    Source: Dinh et al. 2017, "Sharp minima can generalize for deep nets".
    """
    names = _names(measures)
    _check(factor, temperature, pairs, confidence)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"invariance: model is a {type(model).__name__}, expected a torch.nn.Module: a matrix has no layers.")
    own = _copied(model)
    options: dict[str, Any] = {"reduction": reduction, "bn": bn, "dropout": dropout, "memory": memory}
    how: dict[str, Any] = {
        "rtol": rtol, "rho": rho, "ascent_rho": ascent_rho, "directions": directions, "confidence": confidence, "seed": seed,
    }  # fmt: skip
    shown = Progress(progress, "invariance", "rescaling")
    with shown, torch.inference_mode(False), first_steps():
        with label_forms("invariance"):
            objective = Objective(own, loader, loss_fn, params=params, seed=seed, **options)
        found, kinds, refused, outputs = _found(objective, factor, temperature, seed)
        if not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise InputError(f"invariance: no rescaling leaves the decisions of {type(model).__name__} as they are. {reasons}")
        chosen = _spread([i for i, kind in enumerate(kinds) if kind == "layers"], pairs)
        chosen += [i for i, kind in enumerate(kinds) if kind == "temperature"]
        if not chosen:
            raise InputError(f"invariance: with pairs={pairs} and temperature={temperature} nothing is left to measure. Raise pairs.")
        data = loader if objective.batches.streamed else [batch for _, batch in objective.batches]
        options["reduction"] = objective.reduction

        def at_present() -> tuple[dict[str, Estimate], dict[str, str]]:
            return _measured(_Subject(own, data, loss_fn, options, params, backend, preflight, how), names)

        base, skipped = at_present()
        if not base:
            raise InputError(f"invariance: none of the measures has a value. {'; '.join(f'{n}: {r}' for n, r in skipped.items())}")
        columns = [name for name in names if name in base]
        eps = torch.finfo(objective.dtype).eps
        unit = eps * abs(Landscape(objective).loss())
        values, errors, moves, notes = [], [], [], list(objective.notes())
        for number, i in enumerate(chosen):
            shown.on_step(number + 1, (float(number),), len(chosen))
            with found[i].applied(own):
                moves.append(_off(outputs, kinds[i], temperature))
                after, lost = at_present()
            notes += [f"{found[i].name}: {name} has no value: {reason}" for name, reason in lost.items() if name in base]
            values.append([float(after[c]) if c in after else math.nan for c in columns])
            errors.append([_error(base[c], after[c], eps, unit, confidence) if c in after else math.nan for c in columns])
            notes += [f"{found[i].name}: {name} is not converged" for name, e in after.items() if not e.converged]
    if len(chosen) < len(found):
        notes.append(f"{len(found) - len(chosen)} of {len(found)} rescalings found were not measured: pairs={pairs}")
    return Invariance(
        measures=tuple(columns),
        rescalings=tuple(found[i].name for i in chosen),
        kinds=tuple(kinds[i] for i in chosen),
        base=_f64([float(base[c]) for c in columns]),
        values=_f64(values),
        errors=_f64(errors),
        outputs=_f64(moves),
        applicable=tuple(s.name for s in found),
        refused=refused,
        skipped=skipped,
        notes=tuple(dict.fromkeys(notes)),
        settings={**how, "factor": factor, "temperature": temperature, "pairs": pairs, "reduction": objective.reduction, "bn": bn},
        provenance=objective.provenance(),
    )


def _names(measures: str | Iterable[str]) -> list[str]:
    names = [measures] if isinstance(measures, str) else list(dict.fromkeys(measures))
    wrong = [name for name in names if name not in MEASURES]
    if wrong or not names:
        what = f"has {wrong[0]!r} in it" if wrong else "is empty"
        raise InputError(f"invariance: measures {what}, expected names out of {', '.join(MEASURES)}.")
    return names


def _check(factor: Any, temperature: Any, pairs: Any, confidence: float) -> None:
    check_confidence("invariance", confidence)
    for name, value in (("factor", factor), ("temperature", temperature)):
        if name == "temperature" and value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf) or value == 1:
            raise InputError(f"invariance: {name}={value!r}, expected a positive number other than 1.")
    if pairs is not None and (isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 0):
        raise InputError(f"invariance: pairs={pairs!r}, expected an integer of at least 0, or None for all.")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as e:
        raise InputError(
            f"invariance: {type(model).__name__} cannot be copied ({type(e).__name__}: {e}), and the model itself is never rescaled.\n"
            "Remove what copy.deepcopy refuses, such as tensors with a graph kept as attributes."
        ) from e


def _found(
    objective: Objective, factor: float, temperature: float | None, seed: int
) -> tuple[list[Scaling], list[str], dict[str, str], Outputs]:
    refused: dict[str, str] = {}
    head: list[Scaling] = []
    outputs = Outputs(objective, seed)
    objective.record_weights()  # written to and put back, which leaves a mark
    if temperature is not None:
        try:
            head = [temperature_scaling(outputs, temperature)]
        except InputError as e:
            refused["temperature"] = _reason(e)
    layers, others = layer_scalings(outputs, factor)
    objective.record_weights()
    return layers + head, ["layers"] * len(layers) + ["temperature"] * len(head), others | refused, outputs


def _off(outputs: Outputs, kind: str, temperature: float | None) -> float:
    by = 1.0 / temperature if kind == "temperature" and temperature is not None else 1.0
    return outputs.distance(by) / (by * outputs.size) if outputs.size else 0.0


def _spread(found: list[int], most: int | None) -> list[int]:
    """At most so many, evenly spaced, both ends among them."""
    if most is None or len(found) <= most:
        return found
    if most < 2:
        return found[:most]
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def _measured(subject: _Subject, names: list[str]) -> tuple[dict[str, Estimate], dict[str, str]]:
    measured: dict[str, Estimate] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            measured[name] = MEASURES[name](subject)
        except (NonFiniteError, StaleOperatorError):
            raise
        except (FastsharpError, NotImplementedError) as e:
            skipped[name] = _reason(e)
    return measured, skipped


def _reason(e: Exception) -> str:
    return " ".join(str(e).split("\n"))


def _error(before: Estimate, after: Estimate, eps: float, unit: float, confidence: float) -> float:
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


def _f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
