"""Sharpness along the way: directional, critical and batch sharpness, the gradient's share of the top eigenspace, lambda lr / 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastsharp.api.subject import checked, first_steps
from fastsharp.curvature import Hessian
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.measures import trajectory as measures
from fastsharp.measures.landscape import Landscape
from fastsharp.objective import Objective
from fastsharp.params import Selector
from fastsharp.results import Eigenpairs, Estimate


def directional_sharpness(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    direction: Any = None,
    form: str = "rayleigh",
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> Estimate:
    """u'Hu / ||u||^2 (form "rayleigh") or u'Hu / g'u (form "critical") along a direction u, by one product.

    direction   a flat tensor, {parameter name: tensor} or a list of tensors: an update that is subtracted, as the gradient is; None: the gradient
    form        "rayleigh": curvature along u (Pan and Li 2023). "critical": 2 over the step at which the second-order model of the loss along
                -u is back at its start (Kalra et al. 2026); for u = g both are the same
    others      as in `fastsharp.lanczos`

    Returns Estimate without chance (stderr 0), settings["slope"] = g'u / ||u||. Raises InputError for a zero direction or one with g'u = 0.
    """
    if form not in ("rayleigh", "critical"):
        raise InputError(f"form={form!r} is none of 'rayleigh', 'critical'.")
    operator, landscape = _prepared(
        model, loader, loss_fn, params, reduction, bn, dropout, memory, seed, preflight, "directional_sharpness"
    )
    with torch.inference_mode(False), torch.no_grad():
        _, gradient = _gradient(landscape)
        u = gradient if direction is None else measures.flat_direction(direction, operator.layout, landscape.theta)
        slope = measures.slope_along(operator, gradient, _nonzero(u))
        operator.check_unchanged()
    below = slope.squared if form == "rayleigh" else slope.slope
    if below == 0.0:
        raise InputError(
            "form='critical': the direction is orthogonal to the gradient, so no step along it changes the loss to first order."
        )
    value = slope.curvature / below
    settings = {**operator.settings, "form": form, "slope": slope.slope / math.sqrt(slope.squared)}
    return Estimate.certain(value, n_matvec=1, notes=operator.notes, settings=settings, provenance=operator.provenance)


def critical_sharpness(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    direction: Any = None,
    rtol: float = 0.01,
    start: float | None = None,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    seed: int = 0,
) -> Estimate:
    """2 / eta_c: eta_c is the smallest step found at which L(theta - eta u) > L(theta), by forward passes on frozen data.

    direction   u as in `directional_sharpness`; None: the gradient, for one gradient more
    rtol        relative width of the bracket around eta_c at the end
    start       step to begin with, such as the learning rate in use; None: 1 / ||u||
    others      as in `fastsharp.lanczos`

    On a quadratic it is u'Hu / g'u (g'Hg / ||g||^2 for the gradient). Invariant under u -> c u for the gradient only up to 1/c: it is in units
    of 1 / step. 0 where the loss never rises. Cost: settings["losses"] forward passes, about 8 from a start within 2 of eta_c, rtol 0.01.
    Raises InputError where u is no descent direction. Source: Kalra et al. 2026, arXiv:2601.16979.
    """
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < 1.0):
        raise InputError(f"rtol={rtol!r}, expected a number between 0 and 1.")
    if start is not None and not (start > 0 and math.isfinite(start)):
        raise InputError(f"start={start!r}, expected a positive step.")
    _check_model(model, "critical_sharpness")
    with first_steps(), torch.inference_mode(False), torch.no_grad():
        options: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout}
        objective = Objective(model, loader, loss_fn, memory=memory, seed=seed, **options)
        landscape = Landscape(objective)
        if direction is None:
            u = _nonzero(_gradient(landscape)[1])
        else:
            u = measures.flat_direction(direction, objective.selection.layout, landscape.theta)
        eta, losses = measures.critical_step(landscape, u, rtol, start or 1.0 / float(u.norm()))
        objective.check_values()
    notes = [*objective.notes(), *(() if math.isfinite(eta) else ("the loss never rises along this direction",))]
    settings = {"rtol": rtol, "step": eta if math.isfinite(eta) else None, "losses": losses, "reduction": objective.reduction}
    return Estimate.certain(2.0 / eta, notes=tuple(notes), settings=settings, provenance=objective.provenance())


def batch_sharpness(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    kind: str = "batch",
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> Estimate:
    """E_B[g_B' H_B g_B] / E_B[||g_B||^2] over the loader's mini-batches B, or with kind "noise" E_B[g_B' H g_B] / ||g||^2.

    kind        "batch": batch sharpness, the curvature of each mini-batch's loss along its own gradient; SGD rests where it is 2 / lr.
                "noise": gradient-noise interaction, with the Hessian and gradient of the whole loss; above 2 / lr the loss rises in expectation
    loader      the mini-batches of training, equal in weight; a shuffled loader's first pass is frozen
    confidence  of the interval, to first order, over the draw of mini-batches
    others      as in `fastsharp.lanczos`

    Cost: a gradient and one product of each mini-batch; for "noise" one product of the whole data for each mini-batch.
    Source: Andreyev and Beneventano, arXiv:2412.20553.
    """
    if kind not in ("batch", "noise"):
        raise InputError(f"kind={kind!r} is none of 'batch', 'noise'.")
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence={confidence!r}, expected a number between 0 and 1.")
    operator, landscape = _prepared(model, loader, loss_fn, params, reduction, bn, dropout, memory, seed, preflight, "batch_sharpness")

    def products(index: Any, batch: Any, v: torch.Tensor) -> torch.Tensor:
        with operator.objective.quiet():
            made = operator.minibatch_products(batch, index)
            out = torch.zeros_like(v)[None]
            made.products.add_products(v[None], out, made.scale)
        return out[0]

    with torch.inference_mode(False), torch.no_grad():
        result = measures.batch_sharpness(landscape, operator, products, kind=kind, confidence=confidence)
        operator.check_unchanged()
    return result


def gradient_overlap(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    pairs: Eigenpairs,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    seed: int = 0,
) -> Estimate:
    """||P g||^2 / ||g||^2: the share of the squared gradient that lies in the span of eigenvectors found before.

    pairs     Eigenpairs of the same model and parameters
    others    as in `fastsharp.lanczos`

    In [0, 1]; k / n for a random direction. Cost: one gradient. Raises InputError where the pairs are of other parameters, or the gradient is 0.
    Source: Gur-Ari, Roberts and Dyer 2018, "Gradient descent happens in a tiny subspace".
    """
    if not isinstance(pairs, Eigenpairs):
        raise ArgumentTypeError(f"pairs is a {type(pairs).__name__}, expected the Eigenpairs that fastsharp.lanczos returns.")
    _check_model(model, "gradient_overlap")
    with first_steps(), torch.inference_mode(False), torch.no_grad():
        options: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout}
        objective = Objective(model, loader, loss_fn, memory=memory, seed=seed, **options)
        n = objective.selection.layout.n
        if pairs.eigenvectors.shape[1] != n:
            raise InputError(
                f"pairs have vectors of {pairs.eigenvectors.shape[1]} numbers, the chosen parameters {n}. Choose the same params=."
            )
        _, gradient = _gradient(Landscape(objective))
        value = measures.overlap(pairs.eigenvectors.to(gradient.device), gradient)
    notes = [*objective.notes()]
    if pairs.provenance.get("weights_hash") not in (None, objective.provenance()["weights_hash"]):
        notes.append("the eigenvectors are of other weights than the gradient")
    return Estimate.certain(value, notes=tuple(notes), settings={"k": len(pairs.eigenvalues)}, provenance=objective.provenance())


def edge_of_stability(result: Eigenpairs | float, optimizer: torch.optim.Optimizer | float, *, momentum: float = 0.0) -> float:
    """lambda_max over the largest eigenvalue at which gradient descent is stable, lambda lr / 2 without momentum: 1 is the edge.

    result     Eigenpairs (its largest value), or a number
    optimizer  torch.optim.SGD with one learning rate (its momentum and Nesterov flag are read), or the learning rate
    momentum   beside a learning rate

    Threshold 2 (1 + m) / lr with momentum m, divided by 1 + 2 m for Nesterov's. Other optimisers have a preconditioned edge: measure that matrix.
    Raises InputError for several learning rates or another optimiser. Source: Cohen et al. 2021, appendix B.
    """
    value = float(result.eigenvalues.max()) if isinstance(result, Eigenpairs) else float(result)
    if isinstance(optimizer, (int, float)):
        return measures.stability(value, float(optimizer), momentum)
    if not isinstance(optimizer, torch.optim.SGD):
        raise InputError(
            f"{type(optimizer).__name__} scales its steps, so its edge is not that of the Hessian. Pass an SGD optimiser or a learning rate."
        )
    settings = {(float(g["lr"]), float(g["momentum"]), bool(g["nesterov"])) for g in optimizer.param_groups}
    if len(settings) != 1:
        raise InputError(
            f"the optimiser has {len(settings)} different settings of lr and momentum: there is no one edge. Pass a learning rate."
        )
    lr, mass, nesterov = settings.pop()
    return measures.stability(value, lr, mass, nesterov=nesterov)


def _check_model(model: Any, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{call}: model is a {type(model).__name__}, expected a torch.nn.Module: a matrix has no loss.")


def _prepared(
    model: Any,
    loader: Any,
    loss_fn: Any,
    params: Selector,
    reduction: str,
    bn: str | None,
    dropout: str | None,
    memory: str | int,
    seed: int,
    preflight: str,
    call: str,
) -> tuple[Hessian, Landscape]:
    """The checked Hessian and the loss around its weights, on the same frozen data."""
    _check_model(model, call)
    options: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout}
    with first_steps():
        operator = Hessian(model, loader, loss_fn, memory=memory, seed=seed, **options)
        checked(operator, preflight=preflight, seed=seed)
        return operator, Landscape(operator.objective)


def _gradient(landscape: Landscape) -> tuple[float, torch.Tensor]:
    return landscape.ascent(torch.zeros_like(landscape.theta))


def _nonzero(gradient: torch.Tensor) -> torch.Tensor:
    if not bool(gradient.any()):
        raise InputError("the gradient is zero: a stationary point has no direction of its own. Pass direction=.")
    return gradient
