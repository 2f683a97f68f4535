"""`fastsharp.invariance`: which measures move under rescalings of the weights that leave the decisions of the network as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastsharp.api.measures_named import DEFAULT, MEASURES, Subject, error_of_change, measured_at
from fastsharp.api.samples_of import label_forms
from fastsharp.api.subject import first_steps, frozen
from fastsharp.curvature.backends import check_backend
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, in_a_line
from fastsharp.krylov import trace as probes
from fastsharp.measures import perturbation
from fastsharp.measures.landscape import Landscape
from fastsharp.measures.rescaling import Outputs, Scaling, layer_scalings, temperature_scaling
from fastsharp.measures.statistic import check_confidence
from fastsharp.objective import Objective
from fastsharp.params import Selector
from fastsharp.preflight import LEVELS
from fastsharp.progress import Progress
from fastsharp.results import Estimate, Invariance


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

    measures     names out of `fastsharp.api.measures_named.MEASURES`; the default leaves out lambda_min, frobenius, filter_sam, ascent,
                 fisher_rao_closed, prediction_confidence
    factor       positive, not 1; a power of two rounds nothing
    temperature  positive, not 1, or None for none
    pairs        how many of the layer rescalings found are measured, evenly spread over the network; None: all
    rtol, confidence   of the trace and the norm, as in `fastsharp.trace`
    rho, ascent_rho, directions   of the perturbations, as in `fastsharp.measure`; the same directions every time
    params, reduction, bn, dropout, backend, memory, seed, progress, preflight   as in `fastsharp.lanczos`

    Returns Invariance, of what was measured so far in `.partial` of an Interrupted. A change counts as a move (`.moved`) where it exceeds its error: the sum of both bounds or half intervals of eigenvalues
    and probes, the interval of the paired differences of random directions, and sqrt(eps) of the measure's spread over samples, plus rounding.
    Cost: a few forward passes a layer, then (1 + rescalings) times the measures; memory: one copy of the model and the outputs on the data.
    Raises InputError where nothing can be rescaled, or for arguments; ArgumentTypeError; what the data and the model raise.
    Source: Dinh et al. 2017, "Sharp minima can generalize for deep nets".
    """
    names = _names(measures)
    _check(factor, temperature, pairs, confidence)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"invariance: model is a {type(model).__name__}, expected a torch.nn.Module: a matrix has no layers.")
    how: dict[str, Any] = {
        "rtol": rtol, "rho": rho, "ascent_rho": ascent_rho, "directions": directions, "confidence": confidence, "seed": seed,
    }  # fmt: skip
    check_backend(backend)
    _check_how(how, preflight)
    own = _copied(model)
    options: dict[str, Any] = {"reduction": reduction, "bn": bn, "dropout": dropout, "memory": memory}
    shown = Progress(progress, "invariance", "rescaling")
    with shown, torch.inference_mode(False):
        with first_steps(), label_forms("invariance"):
            objective = Objective(own, loader, loss_fn, params=params, seed=seed, **options)
            found, kinds, refused, outputs = _found(objective, factor, temperature, seed)
            chosen = _chosen(found, kinds, refused, pairs, temperature, type(model).__name__)
            unit = torch.finfo(objective.dtype).eps * abs(Landscape(objective).loss())
        data = frozen(objective, loader)
        options["reduction"] = objective.reduction

        def at_present() -> tuple[dict[str, Estimate], dict[str, str]]:
            return measured_at(Subject(own, data, loss_fn, options, params, backend, preflight, how), names)

        settings = {**how, "factor": factor, "temperature": temperature, "pairs": pairs, "reduction": objective.reduction, "bn": bn}
        rows = _Rows(objective, [s.name for s in found], refused, settings, unit)
        try:
            rows.begin(*at_present())
            for number, i in enumerate(chosen):
                shown.on_step(number + 1, (float(number),), len(chosen))
                with found[i].applied(own):
                    off = _off(outputs, kinds[i], temperature)
                    rows.add(found[i].name, kinds[i], off, *at_present())
        except KeyboardInterrupt as e:
            partial = rows.result() if rows.kinds else None
            raise Interrupted(f"invariance: interrupted after {len(rows.kinds)} of {len(chosen)} rescalings.", partial) from e
    if len(chosen) < len(found):
        rows.notes.append(f"{len(found) - len(chosen)} of {len(found)} rescalings found were not measured: pairs={pairs}")
    return rows.result()


@dataclass
class _Rows:
    """What has been measured so far."""

    objective: Objective
    applicable: list[str]
    refused: dict[str, str]
    settings: dict[str, Any]
    unit: float  # eps times the loss
    base: dict[str, Estimate] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    errors: list[list[float]] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def begin(self, base: dict[str, Estimate], skipped: dict[str, str]) -> None:
        """The measures at the weights as they are."""
        if not base:
            raise InputError(f"invariance: none of the measures has a value. {_listed(skipped)}")
        self.base, self.skipped = base, skipped
        self.notes += [*self.objective.notes(), *(f"{name} is not converged" for name, e in base.items() if not e.converged)]

    def add(self, name: str, kind: str, off: float, after: dict[str, Estimate], lost: dict[str, str]) -> None:
        """The measures after a rescaling."""
        eps, confidence = torch.finfo(self.objective.dtype).eps, self.settings["confidence"]
        pairs = [(before, after.get(measure)) for measure, before in self.base.items()]
        self.names.append(name)
        self.outputs.append(off)
        self.values.append([math.nan if e is None else float(e) for _, e in pairs])
        self.errors.append([math.nan if e is None else error_of_change(b, e, eps, self.unit, confidence) for b, e in pairs])
        self.notes += [f"{name}: {measure} has no value: {reason}" for measure, reason in lost.items() if measure in self.base]
        self.notes += [f"{name}: {measure} is not converged" for measure, e in after.items() if not e.converged]
        self.kinds.append(kind)  # last: a row counts once it is whole

    def result(self) -> Invariance:
        r = len(self.kinds)
        return Invariance(
            measures=tuple(self.base),
            rescalings=tuple(self.names[:r]),
            kinds=tuple(self.kinds),
            base=_f64([float(e) for e in self.base.values()]),
            values=_f64(self.values[:r]),
            errors=_f64(self.errors[:r]),
            outputs=_f64(self.outputs[:r]),
            applicable=tuple(self.applicable),
            refused=self.refused,
            skipped=self.skipped,
            notes=tuple(dict.fromkeys(self.notes)),
            settings=self.settings,
            provenance=self.objective.provenance(),
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


def _check_how(how: dict[str, Any], preflight: str) -> None:
    """Arguments of single measures: wrong ones are errors, not reasons why a measure has no value."""
    for rho in (how["rho"], how["ascent_rho"]):
        perturbation.check_arguments(
            kind="sam", rho=rho, directions=how["directions"], norm="l2", scale="none", m=None, steps=1, confidence=how["confidence"]
        )
    given: dict[str, Any] = {"rtol": how["rtol"], "confidence": how["confidence"], "seed": how["seed"]}
    probes.check_arguments("invariance", atol=None, method="auto", max_products=2000, pairs=None, check="auto", **given)
    if preflight not in LEVELS:
        raise InputError(f"preflight={preflight!r} is none of {', '.join(map(repr, LEVELS))}.")


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
            refused["temperature"] = in_a_line(e)
    layers, others = layer_scalings(outputs, factor)
    objective.record_weights()
    return layers + head, ["layers"] * len(layers) + ["temperature"] * len(head), others | refused, outputs


def _chosen(
    found: list[Scaling], kinds: list[str], refused: dict[str, str], pairs: int | None, temperature: float | None, model: str
) -> list[int]:
    """Places of those to measure."""
    if not found:
        raise InputError(f"invariance: no rescaling leaves the decisions of {model} as they are. {_listed(refused)}")
    chosen = _spread([i for i, kind in enumerate(kinds) if kind == "layers"], pairs)
    chosen += [i for i, kind in enumerate(kinds) if kind == "temperature"]
    if not chosen:
        raise InputError(f"invariance: with pairs={pairs} and temperature={temperature} nothing is left to measure. Raise pairs.")
    return chosen


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


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


def _f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
