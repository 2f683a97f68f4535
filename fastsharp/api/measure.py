"""`fastsharp.measure`: every measure in one call, on one frozen copy of the data, nothing computed twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastsharp.api.layer_spectra import layer_spectra
from fastsharp.api.samples_of import label_forms
from fastsharp.api.subject import basis_memory, checked, first_steps
from fastsharp.batches import tensors_of
from fastsharp.curvature import GGN, Hessian
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.krylov import trace as solvers
from fastsharp.krylov.plan import whole_bytes
from fastsharp.krylov.spectrum import check_arguments
from fastsharp.krylov.spectrum import spectrum as krylov_spectrum
from fastsharp.losses import BatchLoss, split
from fastsharp.measures import trajectory
from fastsharp.measures.ball import Ball
from fastsharp.measures.classes import needs_cross_entropy
from fastsharp.measures.eigen import hessian_measures
from fastsharp.measures.facts import Accumulator, one_pass
from fastsharp.measures.fisher_rao import FisherRaoClosed, FisherRaoIdentity, weight_layers
from fastsharp.measures.guarded import Guarded
from fastsharp.measures.head import HeadFinder
from fastsharp.measures.inputs import BoundaryTightness, InputJacobian
from fastsharp.measures.landscape import Landscape
from fastsharp.measures.lines import around
from fastsharp.measures.outputs import Confidence, LogitScale, Margin
from fastsharp.measures.perturbation import random_sharpness, worst_sharpness
from fastsharp.measures.relative_flatness import HeadFlatness
from fastsharp.measures.sample_curvature import SampleCurvature
from fastsharp.objective import Objective
from fastsharp.operator import CountingOperator
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Estimate, Landscape2D, LayerSpectra, Report, Spectrum

PARTS = ("curvature", "gauss-newton", "perturbation", "trajectory", "function", "layers", "landscape")
_JACOBIAN_COLUMNS = 32  # reverse passes that the input Jacobian may take
_DAMPING = 1e-3  # c of the soft rank, in units of lambda_max
_LINES = 2  # eigenvectors that the loss is drawn along


def measure(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    parts: Any = PARTS,
    k: int = 5,
    steps: int = 80,
    rtol: float = 0.05,
    rho: float = 0.005,
    ascent_rho: float = 0.05,
    directions: int = 100,
    grid: int = 15,
    damping: float = _DAMPING,
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
) -> Report:
    """Sharpness by every measure of the literature, and what it is to be compared with: {name: value with its error}.

        report = fastsharp.measure(model, loader)
        print(report["lambda_max"].value, report.table())
        report.to_html("sharpness.html")

    parts      which of "curvature" (always: the spectrum of H), "gauss-newton", "perturbation", "trajectory", "function", "layers",
               "landscape"
    k, steps, rtol   eigenpairs at each end, fewest Krylov steps, and tolerance of trace and norm, as in `fastsharp.spectrum`
    rho, directions  of SAM-sharpness, as in `fastsharp.sharpness`; ascent_rho: of the one-step ascents, in the l2 norm
    grid       points a side of the plane of the loss, 0 for none
    damping    c of the soft rank tr G (G + cI)^-1, in units of lambda_max(G)
    confidence of the intervals
    others     as in `fastsharp.lanczos`; the preflight is run once for H and once for G

    Returns Report. A measure that does not apply (no classifier head, a loss that is no cross-entropy, integer inputs) is in `.skipped` with
    the reason, and stops nothing. `.cost` counts products, gradients and passes, by part in seconds.
    Cost: that of `spectrum` for H and with fewer steps for G; a pass for each direction; 2 x 21 + grid^2 passes for the landscape; one pass of
    tangents and a few reverse passes for all measures of the function together.
    Raises subclasses of FastsharpError where the spectrum cannot be had; Interrupted on Ctrl-C.
    """
    chosen = _chosen(parts)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"measure: model is a {type(model).__name__}, expected a torch.nn.Module. For a matrix use fastsharp.spectrum."
        )
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 0 or grid == 1:
        raise InputError(f"measure: grid={grid!r}, expected 0 or an integer of at least 2: points a side of the plane.")
    for name, number in (("rho", rho), ("ascent_rho", ascent_rho), ("damping", damping)):
        if not (isinstance(number, (int, float)) and 0 < number < float("inf")):
            raise InputError(f"measure: {name}={number!r}, expected a positive number.")
    build: dict[str, Any] = {
        "params": params,
        "reduction": reduction,
        "bn": bn,
        "dropout": dropout,
        "backend": backend,
        "memory": memory,
        "seed": seed,
    }
    how: dict[str, Any] = {"k": k, "steps": steps, "rtol": rtol, "confidence": confidence, "seed": seed}
    job = _Job(progress)
    with job, torch.inference_mode(False), torch.no_grad():
        with first_steps(), label_forms("measure"), job.part("preflight"):
            hessian = Hessian(model, loader, loss_fn, **build)
            request = check_arguments(hessian.n, tol=1e-3, criterion="residual", max_iter=None, max_products=2000, **how)
            budget: dict[str, Any] = basis_memory(hessian, memory, whole_bytes(hessian.n, hessian.dtype, request))
            check = checked(hessian, preflight=preflight, strict_data=strict_data, seed=seed)
            landscape = Landscape(hessian.objective)
        H = CountingOperator(hessian)
        notes: tuple[str, ...] = ()
        with job.part("curvature"):
            spectrum = krylov_spectrum(H, check=check, on_step=job.shown.on_step, **budget, **how)
            job.add("curvature", hessian_measures(spectrum))
        order = spectrum.eigenpairs.eigenvalues.argsort(descending=True)[:_LINES]
        top = spectrum.eigenpairs.eigenvectors[order.to(spectrum.eigenpairs.eigenvectors.device)]
        if "gauss-newton" in chosen:
            with job.part("gauss-newton"):
                _gauss_newton(job, model, hessian.objective, loader, loss_fn, build, how, budget, damping, preflight)
        if "perturbation" in chosen:
            with job.part("perturbation"):
                _perturbation(job, landscape, rho=rho, ascent_rho=ascent_rho, directions=directions, confidence=confidence, seed=seed)
        _, gradient = landscape.ascent(torch.zeros_like(landscape.theta))
        if "trajectory" in chosen:
            with job.part("trajectory"):
                _trajectory(job, landscape, H, gradient, spectrum.eigenpairs.eigenvectors)
        if "function" in chosen:
            with job.part("function"):
                notes += _function(job, hessian.objective, top[0], confidence)
        layers: LayerSpectra | None = None
        if "layers" in chosen:
            with job.part("layers"), job.may_skip("layers"):
                # no coupling: it takes products with the whole matrix; the preflight has seen this model and its data
                given = {**build, "reduction": hessian.objective.reduction}
                layers = layer_spectra(
                    model, _frozen(hessian.objective, loader), loss_fn, k=1, coupling=None, preflight="off", progress=False, **given
                )
        drawn: Landscape2D | None = None
        if "landscape" in chosen:
            with job.part("landscape"):
                drawn = around(landscape, hessian.layout, spectrum.eigenpairs.eigenvalues[order], top, gradient, grid=grid, seed=seed)
        hessian.check_unchanged()
    job.cost |= {"products": float(H.count), "passes": landscape.passes}
    settings = {"parts": list(chosen), "rho": rho, "ascent_rho": ascent_rho, "directions": directions, "grid": grid, "damping": damping}
    return Report(
        job.measures,
        job.groups,
        job.skipped,
        spectrum,
        layers,
        drawn,
        job.cost,
        (*spectrum.notes, *notes),
        {**spectrum.settings, **settings},
        spectrum.provenance,
    )


def _frozen(objective: Objective, loader: Any) -> Any:
    """The frozen batches themselves, so that they are read once and held once; a stream is read again."""
    return loader if objective.batches.streamed else [batch for _, batch in objective.batches]


def _chosen(parts: Any) -> tuple[str, ...]:
    given = (parts,) if isinstance(parts, str) else tuple(parts)
    wrong = [p for p in given if p not in PARTS]
    if wrong:
        raise InputError(f"measure: parts has {wrong[0]!r}, which is none of {', '.join(map(repr, PARTS))}.")
    return tuple(p for p in PARTS if p in given or p == "curvature")


class _Job:
    """What has been measured so far."""

    def __init__(self, progress: bool | None) -> None:
        self.shown = Progress(progress, "measure", "value")
        self.measures: dict[str, Estimate] = {}
        self.groups: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.cost: dict[str, float] = {}

    def __enter__(self) -> _Job:
        self.shown.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.shown.__exit__(*exc)

    def add(self, group: str, found: dict[str, Estimate]) -> None:
        self.measures |= found
        self.groups |= dict.fromkeys(found, group)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self.shown.label(name)
        yield
        self.cost[f"seconds.{name}"] = time.perf_counter() - began

    @contextmanager
    def may_skip(self, *names: str) -> Iterator[None]:
        """A refusal of what does not apply is a reason, not an end."""
        try:
            yield
        except (InputError, NotImplementedError) as e:
            self.skipped |= dict.fromkeys((n for n in names if n not in self.measures), " ".join(str(e).split("\n")))


def _gauss_newton(
    job: _Job,
    model: nn.Module,
    objective: Objective,
    loader: Any,
    loss_fn: Any,
    build: dict[str, Any],
    how: dict[str, Any],
    budget: dict[str, Any],
    damping: float,
    preflight: str,
) -> None:
    names = ("ggn_lambda_max", "ggn_trace", "ggn_effective_rank", "soft_rank")
    with job.may_skip(*names):
        ggn = GGN(model, _frozen(objective, loader), loss_fn, **{**build, "reduction": objective.reduction})
        check = checked(ggn, preflight=preflight, seed=build["seed"])
        G = CountingOperator(ggn)
        of_g: Spectrum = krylov_spectrum(
            G, check=check, on_step=job.shown.on_step, **budget, **{**how, "k": 1, "steps": min(how["steps"], 40)}
        )
        found = hessian_measures(of_g)
        job.add("gauss-newton", {f"ggn_{name}": found[name] for name in ("lambda_max", "trace", "effective_rank") if name in found})
        c = damping * max(float(found["lambda_max"]), 0.0)
        if c == 0.0:
            raise InputError("the Gauss-Newton matrix is zero, so there is no scale for the damping of the soft rank.")
        options: dict[str, Any] = {"rtol": how["rtol"], "confidence": how["confidence"], "seed": build["seed"], "check": "off"}
        rank = solvers.trace_function(G, f=lambda x: x.clamp_min(0.0) / (x.clamp_min(0.0) + c), on_step=job.shown.on_step, **options)
        job.add("gauss-newton", {"soft_rank": rank})
        job.cost["products.gauss-newton"] = float(G.count)


def _perturbation(job: _Job, landscape: Landscape, *, rho: float, ascent_rho: float, directions: int, confidence: float, seed: int) -> None:
    layout = landscape.objective.selection.layout
    common: dict[str, Any] = {"confidence": confidence, "seed": seed, "on_step": job.shown.on_step}
    ball = Ball(landscape.theta, layout, rho, scale="none", norm="l2")
    job.add("perturbation", {"sam": random_sharpness(landscape, ball, kind="sam", directions=directions, **common)})
    for scale, name in (("none", "ascent"), ("adaptive", "adaptive_ascent")):
        # |theta| is of order 1 / sqrt(width): the same share of the weights' own norm needs no smaller radius
        ball = Ball(landscape.theta, layout, ascent_rho, scale=scale, norm="l2")
        job.add("perturbation", {name: worst_sharpness(landscape, ball, kind="ascent", m=None, steps=1, **common)})


def _trajectory(job: _Job, landscape: Landscape, H: CountingOperator, gradient: torch.Tensor, vectors: torch.Tensor) -> None:
    size = float(gradient.double().norm())
    job.add("trajectory", {"gradient_norm": _exact(size, H)})
    with job.may_skip("directional", "gradient_overlap"):
        if size == 0.0:
            raise InputError("the gradient is zero: a stationary point has no direction of its own.")
        slope = trajectory.slope_along(H, gradient, gradient)
        job.add("trajectory", {"directional": _exact(slope.curvature / slope.squared, H)})
        job.add("trajectory", {"gradient_overlap": _exact(trajectory.overlap(vectors, gradient), H)})


def _exact(value: float, H: CountingOperator) -> Estimate:
    return Estimate(value, 0.0, (value, value), 1.0, 0, 0, True, settings=H.settings, provenance=H.provenance)


def _function(job: _Job, objective: Objective, u: torch.Tensor, confidence: float) -> tuple[str, ...]:
    finder = HeadFinder(objective.model)
    columns = 0
    with job.may_skip("relative_flatness"):
        one_pass(objective, [finder], what="measure", first_only=True)
        columns = finder.classes[-1] if len(finder.classes) == 2 else 0

    def classifier(make: Any) -> Any:
        def checked_first() -> Accumulator:
            needs_cross_entropy(objective.loss, "the measure", "It has no value for other losses.")
            made: Accumulator = make()
            return made

        return checked_first

    def jacobian() -> Accumulator:
        if not 0 < columns <= _JACOBIAN_COLUMNS:
            raise InputError(
                f"the output has {columns or 'several dimensions of'} columns, one reverse pass each, and measure() takes at most {_JACOBIAN_COLUMNS}. "
                "Call fastsharp.input_jacobian."
            )
        return InputJacobian("logits", confidence)

    def flatness() -> Accumulator:
        return HeadFlatness(
            finder.head("relative_flatness"), kind="trace", normalize=True, confidence=confidence, room=objective.graph_budget
        )

    shared = [
        Guarded("fisher_rao", lambda: FisherRaoIdentity(objective, confidence)),
        Guarded("fisher_rao_closed", classifier(lambda: FisherRaoClosed(weight_layers(objective.model), confidence))),
        Guarded("relative_flatness", classifier(flatness)),
        Guarded("margin", classifier(lambda: Margin(confidence))),
        Guarded("prediction_confidence", classifier(lambda: Confidence(confidence))),
        Guarded("logit_scale", classifier(lambda: LogitScale(confidence))),
        Guarded("boundary_tightness", classifier(lambda: BoundaryTightness(confidence))),
        Guarded("input_jacobian", jacobian),
        Guarded("top_curvature", lambda: SampleCurvature(objective, u, confidence)),
    ]
    if not _floating_inputs(objective):  # it would stop the pass that all of them share
        for guarded in shared:
            if guarded.name in ("boundary_tightness", "input_jacobian"):
                guarded.refuse("it differentiates by the inputs, and none is floating-point")
    notes = one_pass(objective, shared, what="measure", on_batch=lambda done, count: job.shown.on_step(done, (done,), count))
    for guarded in shared:
        found = guarded.result()
        if found is not None:
            job.add("function", {guarded.name: found})
        else:
            job.skipped[guarded.name] = guarded.reason
    return notes


def _floating_inputs(objective: Objective) -> bool:
    """Whether the model takes a floating-point tensor; a loss of the whole batch does not show what it takes."""
    if isinstance(objective.loss.loss_fn, BatchLoss):
        return False
    args, kwargs, _ = split(objective.batches.first())
    return any(t.is_floating_point() for t in tensors_of([args, kwargs]))
