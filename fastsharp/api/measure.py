"""`fastsharp.measure`: every measure in one call, on one frozen copy of the data, nothing computed twice."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from fastsharp.api.layer_spectra import layer_spectra
from fastsharp.api.measure_function import function_side
from fastsharp.api.measure_job import GGN_MEASURES, NAMES, Job
from fastsharp.api.samples_of import label_forms
from fastsharp.api.subject import basis_memory, checked, first_steps, frozen
from fastsharp.curvature import GGN, Hessian
from fastsharp.errors import ArgumentTypeError, InputError, NotConvergedError, NotConvergedWarning, listing, stacklevel
from fastsharp.krylov import trace as solvers
from fastsharp.krylov.plan import whole_bytes
from fastsharp.krylov.radau import RadauQuadrature
from fastsharp.krylov.spectrum import check_arguments
from fastsharp.krylov.spectrum import spectrum as krylov_spectrum
from fastsharp.measures import trajectory
from fastsharp.measures.ball import Ball
from fastsharp.measures.eigen import hessian_measures
from fastsharp.measures.landscape import Landscape
from fastsharp.measures.lines import around
from fastsharp.measures.perturbation import check_arguments as check_perturbation
from fastsharp.measures.perturbation import random_sharpness, worst_sharpness
from fastsharp.measures.statistic import check_confidence
from fastsharp.objective import Objective
from fastsharp.operator import CountingOperator
from fastsharp.params import Selector
from fastsharp.results import Estimate, Report, Spectrum

PARTS = tuple(NAMES)
_DAMPING = 1e-3  # c of the soft rank, in units of lambda_max
_LINES = 2  # eigenvectors that the loss is drawn along
_GGN_STEPS = 40  # of the Gauss-Newton matrix, which has no part in the density
_SOFT_RANK_PRODUCTS = 160  # at most: the interval grows with what is left out, the call should not
_ASSEMBLED = 512  # n up to which the soft rank is exact: no more products than its probes would take, and all of them together


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
    Cost: that of `spectrum` for H and with fewer steps for G, and at most 160 products for the soft rank; a pass for each direction;
    2 x 21 + grid^2 passes for the landscape; one pass of tangents and a few reverse passes for all measures of the function together.
    Where the Hessian's part misses a tolerance, one NotConvergedWarning; the flag is `report[name].converged`, the reason a note.
    Raises subclasses of FastsharpError where the spectrum cannot be had; Interrupted on Ctrl-C. Both carry `.partial`, a Report of what there
    is, from the first Krylov step on.
    """
    chosen = _chosen(parts)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"measure: model is a {type(model).__name__}, expected a torch.nn.Module. For a matrix use fastsharp.spectrum."
        )
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 0 or grid == 1:
        raise InputError(f"measure: grid={grid!r}, expected 0 or an integer of at least 2: points a side of the plane.")
    for name, number in (("rho", rho), ("ascent_rho", ascent_rho), ("damping", damping)):
        if isinstance(number, bool) or not (isinstance(number, (int, float)) and 0 < number < math.inf):
            raise InputError(f"measure: {name}={number!r}, expected a positive number.")
    check_confidence("measure", confidence)
    check_perturbation(kind="sam", rho=rho, directions=directions, norm="l2", scale="none", m=None, steps=1, confidence=confidence)
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
    settings = {"parts": list(chosen), "rho": rho, "ascent_rho": ascent_rho, "directions": directions, "grid": grid, "damping": damping}
    job = Job(chosen, settings, progress)
    with job.carrying(), torch.inference_mode(False), torch.no_grad():
        with first_steps(), label_forms("measure"), job.part("preflight"):
            hessian = Hessian(model, loader, loss_fn, **build)
            request = check_arguments(hessian.n, tol=1e-3, criterion="residual", max_iter=None, max_products=2000, **how)
            budget: dict[str, Any] = basis_memory(hessian, memory, whole_bytes(hessian.n, hessian.dtype, request))
            check = checked(hessian, preflight=preflight, strict_data=strict_data, seed=seed)
            landscape = Landscape(hessian.objective)
        H = CountingOperator(hessian)
        job.counts |= {"products": lambda: float(H.count), "passes": lambda: landscape.passes}
        with job.part("curvature"), job.keeping(job.set_spectrum):
            spectrum = krylov_spectrum(H, check=check, on_step=job.shown.on_step, warn=False, **budget, **how)
            job.set_spectrum(spectrum)
        order = spectrum.eigenpairs.eigenvalues.argsort(descending=True)[:_LINES]
        top = spectrum.eigenpairs.eigenvectors[order.to(spectrum.eigenpairs.eigenvectors.device)]
        if "gauss-newton" in chosen:
            with job.part("gauss-newton"), job.may_skip(*NAMES["gauss-newton"]):
                _gauss_newton(job, model, hessian.objective, loader, loss_fn, build, how, budget, damping, preflight)
        if "perturbation" in chosen:
            with job.part("perturbation"):
                _perturbation(job, landscape, rho=rho, ascent_rho=ascent_rho, directions=directions, confidence=confidence, seed=seed)
        if "trajectory" in chosen:
            with job.part("trajectory"):
                _trajectory(job, landscape.gradient(), H, spectrum.eigenpairs.eigenvectors)
        if "function" in chosen:
            with job.part("function"):
                function_side(job, hessian.objective, top[0], confidence)
        if "layers" in chosen:
            with job.part("layers"), job.may_skip("layers"), job.keeping(job.set_layers):
                # no coupling: it takes products with the whole matrix; the preflight has seen this model and its data
                given = {**build, "reduction": hessian.objective.reduction, "preflight": "off", "progress": False}
                job.set_layers(layer_spectra(model, frozen(hessian.objective, loader), loss_fn, k=1, coupling=None, **given))
        if "landscape" in chosen:
            with job.part("landscape"), job.may_skip("landscape"), job.keeping(job.set_landscape):
                values = spectrum.eigenpairs.eigenvalues[order]
                job.set_landscape(around(landscape, hessian.layout, values, top, landscape.gradient(), grid=grid, seed=seed))
        hessian.check_unchanged()
    report = job.report()
    if missed := [name for name in NAMES["curvature"] if name in report.measures and not report.measures[name].converged]:
        message = (
            f"measure: {listing(missed)} did not reach the tolerance; their intervals say what is known.\n"
            "Raise steps= or rtol=, or call fastsharp.spectrum with more products."
        )
        warnings.warn(NotConvergedWarning(message, report), stacklevel=stacklevel())
    return report


def _chosen(parts: Any) -> tuple[str, ...]:
    if not isinstance(parts, (str, list, tuple, set, frozenset)):
        raise ArgumentTypeError(f"measure: parts is a {type(parts).__name__}, expected names among {', '.join(map(repr, PARTS))}.")
    given = (parts,) if isinstance(parts, str) else tuple(parts)
    wrong = [p for p in given if p not in PARTS]
    if wrong:
        raise InputError(f"measure: parts has {wrong[0]!r}, which is none of {', '.join(map(repr, PARTS))}.")
    return tuple(p for p in PARTS if p in given or p == "curvature")


def _gauss_newton(
    job: Job,
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
    ggn = GGN(model, frozen(objective, loader), loss_fn, **{**build, "reduction": objective.reduction})
    check = checked(ggn, preflight=preflight, seed=build["seed"])
    G = CountingOperator(ggn)
    job.counts["products.gauss-newton"] = lambda: float(G.count)

    def read(of_g: Spectrum) -> None:
        found = hessian_measures(of_g)
        job.add("gauss-newton", {f"ggn_{name}": found[name] for name in GGN_MEASURES if name in found})

    with job.keeping(read):
        steps = min(how["steps"], _GGN_STEPS)
        read(krylov_spectrum(G, check=check, on_step=job.shown.on_step, warn=False, **budget, **{**how, "k": 1, "steps": steps}))
    c = damping * max(job.measures["ggn_lambda_max"].value, 0.0)
    if c == 0.0:
        raise InputError("the Gauss-Newton matrix is zero, so there is no scale for the damping of the soft rank.")

    def keep(rank: Estimate) -> None:
        job.add("gauss-newton", {"soft_rank": rank})

    options: dict[str, Any] = {"rtol": how["rtol"], "confidence": how["confidence"], "seed": build["seed"], "check": "off"}
    options |= {
        "max_products": _SOFT_RANK_PRODUCTS,
        "assembled": _ASSEMBLED,
        "quadrature": RadauQuadrature,
        "strict": True,
        "name": "soft_rank",
    }
    try:
        with job.keeping(keep):
            keep(solvers.trace_function(G, f=lambda x: x.clamp_min(0.0) / (x.clamp_min(0.0) + c), on_step=job.shown.on_step, **options))
    except NotConvergedError:  # kept, with its flag
        pass


def _perturbation(job: Job, landscape: Landscape, *, rho: float, ascent_rho: float, directions: int, confidence: float, seed: int) -> None:
    layout = landscape.objective.selection.layout
    common: dict[str, Any] = {"confidence": confidence, "seed": seed, "on_step": job.shown.on_step}

    def keep(sam: Estimate) -> None:
        job.add("perturbation", {"sam": sam})

    with job.may_skip("sam"), job.keeping(keep):
        keep(
            random_sharpness(
                landscape, Ball(landscape.theta, layout, rho, scale="none", norm="l2"), kind="sam", directions=directions, **common
            )
        )
    for scale, name in (("none", "ascent"), ("adaptive", "adaptive_ascent")):
        with job.may_skip(name):
            ball = Ball(landscape.theta, layout, ascent_rho, scale=scale, norm="l2")
            job.add("perturbation", {name: worst_sharpness(landscape, ball, kind="ascent", m=None, steps=1, **common)})


def _trajectory(job: Job, gradient: torch.Tensor, H: CountingOperator, vectors: torch.Tensor) -> None:
    size = float(gradient.double().norm())
    job.add("trajectory", {"gradient_norm": Estimate.certain(size, settings=H.settings, provenance=H.provenance)})
    with job.may_skip("directional", "gradient_overlap"):
        if size == 0.0:
            raise InputError("the gradient is zero: a stationary point has no direction of its own.")
        job.add(
            "trajectory",
            {"gradient_overlap": Estimate.certain(trajectory.overlap(vectors, gradient), settings=H.settings, provenance=H.provenance)},
        )
        slope = trajectory.slope_along(H, gradient, gradient)
        job.add(
            "trajectory", {"directional": Estimate.certain(slope.curvature / slope.squared, settings=H.settings, provenance=H.provenance)}
        )
