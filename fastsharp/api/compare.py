"""`fastsharp.compare`: two checkpoints of one architecture on the same frozen data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastsharp.api.checkpoints import must_match, second
from fastsharp.api.measure import measure
from fastsharp.api.samples_of import label_forms
from fastsharp.api.subject import first_steps, frozen
from fastsharp.errors import ArgumentTypeError, FastsharpError, InputError, Interrupted
from fastsharp.measures.classes import needs_cross_entropy
from fastsharp.measures.facts import BatchFacts, Need, one_pass
from fastsharp.measures.interpolation import barrier, grid, losses
from fastsharp.measures.statistic import Samples, check_confidence
from fastsharp.measures.subspace import overlap_error, principal_angles, space_error, w1
from fastsharp.objective import Objective
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Comparison, Estimate, Report

PARTS = ("curvature", "perturbation", "function")
_REPEAT = 64.0  # units of eps by which the loss of b may differ from that of a with the weights of b


def compare(
    a: nn.Module,
    b: nn.Module | Mapping[str, torch.Tensor],
    loader: Any,
    loss_fn: Any = None,
    *,
    k: int = 5,
    points: int = 31,
    parts: Any = PARTS,
    steps: int = 80,
    rtol: float = 0.05,
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    strict_data: bool = False,
    preflight: str = "fast",
) -> Comparison:
    """||P_a P_b||_F^2 / k, W_1(spectra), L((1 - t) a + t b) and b / a of every measure, for two checkpoints a, b of one architecture.

        found = fastsharp.compare(before, after, loader)
        found.table(); found.overlap, found.barrier, found["lambda_max"].interval

    b         a model, or a state dict: a copy of `a` takes it
    k         dimension of the top eigenspaces; the reports hold one pair more at each end, for the gap
    points    on the line, from t = -0.25 to 1.25; 0 and 1 are added
    parts, steps, rtol, confidence   of both reports, as in `fastsharp.measure`
    others    as in `fastsharp.measure`; bn="frozen-batch-stats" is refused, since statistics frozen at a are not those of b

    Both are measured with the same data and seed. All parameters are interpolated, those outside `params` too, and floating-point buffers
    (BatchNorm statistics) with them; beyond an end buffers stay as they are there.

    Returns Comparison, which holds both Reports. Cost: two reports, `points` passes over the data and four more.
    Raises InputError where a and b are not of one architecture (modules, names, shapes, buffers), ParamError, ShapeError, DtypeError,
    DeviceError with the first name that differs, NonFiniteError for weights with NaN, each saying whether it is a or b; those of `measure`;
    Interrupted, with the report of a in `.partial` where there is one.
    Sources: eigenspace overlap as in Gur-Ari, Roberts, Dyer 2018; barrier: Frankle et al. 2020, Entezari et al. 2022.
    """
    if not isinstance(a, nn.Module):
        raise ArgumentTypeError(f"compare: a is a {type(a).__name__}, expected a torch.nn.Module.")
    check_confidence("compare", confidence)
    for name, value, least in (("k", k, 1), ("points", points, 3)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"compare: {name}={value!r}, expected an integer of at least {least}.")
    if bn == "frozen-batch-stats":
        raise InputError("compare: bn='frozen-batch-stats' holds the statistics of a, which are not those of b. Choose bn='eval'.")
    other = second(a, b)
    must_match(a, other)
    options: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout, "memory": memory, "seed": seed}
    notes: list[str] = []
    with torch.inference_mode(False), first_steps(), label_forms("compare"):
        with _named("a"):
            objective = Objective(a, loader, loss_fn, **options)
        data = frozen(objective, loader)
        options["reduction"] = objective.reduction
        with _named("b"):
            of_b = Objective(other, data, loss_fn, **options)
        n = _same_choice(objective, of_b)
        if k > n:
            raise InputError(f"compare: k={k} eigenvectors, and the chosen parameters have {n} coordinates. Choose k of at most {n}.")
        if objective.batches.digest() != of_b.batches.digest():
            raise InputError("compare: a second pass over the loader saw other samples. Switch off augmentation, or raise memory=.")
        disagreement = _disagreement(objective, of_b, confidence, notes)
        with Progress(progress, "line", "point") as shown:
            t = grid(points)
            line = losses(objective, other, t, lambda done: shown.on_step(done, (float(done),), len(t)))
        _check_end(t, line, objective, of_b)
    del of_b
    how: dict[str, Any] = {
        "parts": parts, "k": min(k + 1, n), "steps": steps, "rtol": rtol, "confidence": confidence, "backend": backend,
        "progress": progress, "preflight": preflight, "strict_data": strict_data, **options,
    }  # fmt: skip
    first: Report | None = None
    try:
        with _named("a"):
            first = measure(a, data, loss_fn, **how)
        with _named("b"):
            last = measure(other, data, loss_fn, **how)
    except KeyboardInterrupt as e:
        which = "b; .partial is the report of a" if first else "a"
        raise Interrupted(f"compare: interrupted in the report of {which}.", first) from e
    return _compared(first, last, k, n, t, line, disagreement, notes, {"k": k, "points": points, "seed": seed, "confidence": confidence})


def _compared(
    a: Report,
    b: Report,
    k: int,
    n: int,
    t: torch.Tensor,
    line: torch.Tensor,
    disagreement: Estimate | None,
    notes: list[str],
    settings: dict[str, Any],
) -> Comparison:
    pairs = (a.spectrum.eigenpairs, b.spectrum.eigenpairs)
    angles = principal_angles(*(p.eigenvectors[:k] for p in pairs))
    error = overlap_error(space_error(pairs[0], k, n), space_error(pairs[1], k, n), k)
    if error >= 1.0:
        notes.append(
            f"the {k}-th and the next eigenvalue of a or b are not told apart, so that its top eigenspace of dimension {k} is not known"
        )
    distance, bound, joint = w1(a.spectrum.density, b.spectrum.density)
    height, at = barrier(t, line)
    if not bool(line.isfinite().all()):
        notes.append("the loss is not finite at some points of the line")
    ratios, skipped = _ratios(a, b)
    return Comparison(
        a=a, b=b, k=k, overlap=float(angles.cos().square().mean()), overlap_error=error, angles=angles, random_overlap=k / n,
        w1=distance, w1_bound=bound, w1_confidence=joint, t=t, losses=line, barrier=height, barrier_at=at, disagreement=disagreement,
        measures=ratios, skipped=skipped, notes=tuple(dict.fromkeys((*notes, *a.notes, *b.notes))), settings={**a.settings, **settings},
        provenance={**a.provenance, "weights_hash_b": b.provenance.get("weights_hash")},
    )  # fmt: skip


def _ratios(a: Report, b: Report) -> tuple[dict[str, Estimate], dict[str, str]]:
    ratios: dict[str, Estimate] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys((*a.measures, *a.skipped, *b.measures, *b.skipped)):
        for which, report in (("a", a), ("b", b)):
            if name not in report.measures:
                skipped[name] = f"in {which}: {report.skipped.get(name, 'not measured')}"
            elif not math.isfinite(report.measures[name].value):
                skipped[name] = f"it has no value in {which}"
        if name not in skipped and a.measures[name].value == 0:
            skipped[name] = "it is 0 in a"
        if name not in skipped:
            ratios[name] = ratio(a.measures[name], b.measures[name])
    return ratios, skipped


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """b / a; the interval by both ends of both, unbounded where that of a holds 0; the standard error to first order."""
    value = b.value / a.value
    (lo, hi), ends = a.interval, b.interval
    if math.isnan(lo + hi + sum(ends)):
        interval = (math.nan, math.nan)
    elif lo <= 0 <= hi:
        interval = (-math.inf, math.inf)
    else:
        quotients = [y / x for x in (lo, hi) for y in ends]
        interval = (min(quotients), max(quotients))
    stderr = math.hypot(b.stderr / a.value, value * a.stderr / a.value)
    confidence = max(0.0, a.confidence + b.confidence - 1.0)
    count = min(a.samples, b.samples)
    return Estimate(value, stderr, interval, confidence, count, a.n_matvec + b.n_matvec, a.converged and b.converged)


@contextmanager
def _named(which: str) -> Iterator[None]:
    """Errors from in here say which of the two they belong to."""
    try:
        yield
    except FastsharpError as error:
        error.args = (f"checkpoint {which}: {error.args[0]}", *error.args[1:])
        raise


def _same_choice(a: Objective, b: Objective) -> int:
    """n; InputError where `params` chooses others in b."""
    mine, yours = a.selection.layout, b.selection.layout
    if mine != yours:
        odd = sorted(set(mine.names) ^ set(yours.names))
        raise InputError(
            f"compare: params= and requires_grad choose other parameters in a than in b: {', '.join(map(repr, odd[:4]))}.\n"
            "Freeze the same ones in both."
        )
    return mine.n


class _Predictions:
    """The likeliest class of each label that counts."""

    needs = Need.NOTHING
    layers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.classes: list[torch.Tensor] = []
        self.rest: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, facts: BatchFacts) -> None:
        self.classes.append(facts.units.logits.argmax(1).cpu())
        self.rest.append((facts.units.weights, facts.owners))


def _disagreement(a: Objective, b: Objective, confidence: float, notes: list[str]) -> Estimate | None:
    try:
        needs_cross_entropy(a.loss, "the disagreement of predictions", "Other losses have no classes.")
    except InputError as e:
        notes.append(" ".join(str(e.args[0]).split("\n")))
        return None
    seen = _Predictions(), _Predictions()
    for which, objective, predictions in zip("ab", (a, b), seen, strict=True):
        objective.batches.ordered = True
        with _named(which):
            one_pass(objective, [predictions], what="compare")
    samples = Samples()
    for x, y, (weights, owners) in zip(seen[0].classes, seen[1].classes, seen[0].rest, strict=True):
        samples.add((x != y).double(), weights, owners)
    return samples.mean(confidence)


def _check_end(t: torch.Tensor, line: torch.Tensor, a: Objective, b: Objective) -> None:
    """b itself and a with the weights of b are one function, or something that is no parameter and no buffer differs."""
    own = float(losses(b, b.model, torch.zeros(1, dtype=torch.float64), lambda _: None)[0])
    here = float(line[t == 1.0][0])
    room = _REPEAT * torch.finfo(a.dtype).eps * max(abs(own), abs(here))
    if math.isfinite(own) and not abs(own - here) <= room:
        raise InputError(
            f"compare: a with the weights of b has the loss {here:.6g}, b itself {own:.6g}: the two differ in something that is neither\n"
            "parameter nor buffer (an attribute, a mode, a hook). Build both by the same code and settings."
        )
