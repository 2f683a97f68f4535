"""sharpness: how much the loss changes when the weights are moved, on average or at worst."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastsharp.api.subject import first_steps
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.measures.ball import Ball
from fastsharp.measures.landscape import Landscape, check_m
from fastsharp.measures.logits import normalised
from fastsharp.measures.perturbation import check_arguments, random_sharpness, worst_sharpness
from fastsharp.objective import Objective
from fastsharp.params import Selector
from fastsharp.preflight import check_data
from fastsharp.progress import Progress
from fastsharp.results.sharpness import Sharpness


def sharpness(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    kind: str = "sam",
    rho: float = 0.005,
    directions: int = 100,
    norm: str = "l2",
    scale: str = "none",
    m: int | None = None,
    steps: int = 20,
    normalize_logits: bool = False,
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    strict_data: bool = False,
) -> Sharpness:
    """L(theta + delta) - L(theta) for perturbations delta = D u of the weights, by forward passes on the same frozen data.

        result = fastsharp.sharpness(model, loader, kind="sam", rho=0.005)
        float(result), result.interval, result.noise_floor

    kind        "sam"      mean_k |L(theta + rho D z_k / sqrt(n)) - L(theta)| / rho, z_k standard normal: the SAM-sharpness of the
                           function-centric paper (arXiv:2510.12451), average-case and isotropic; loss per unit length
                "average"  mean_k L(theta + rho D z_k) - L(theta), signed, rho is the standard deviation of a coordinate (norm "linf":
                           uniform in [-rho, rho]). Andriushchenko et al. 2023
                "worst"    max of L(theta + D u) - L(theta) over ||u|| <= rho by projected ascent (a lower bound). Keskar et al. 2017
                "ascent"   the same after one step along the gradient, which is what the SAM optimiser sees. Foret et al. 2021
    rho         radius, or standard deviation of a coordinate for "average"; positive
    directions  random directions of "sam" and "average", at least 6. The same seed gives every model the same directions
    norm        "l2", or "linf" for "average", "worst" and "ascent"
    scale       D: "none"; "adaptive": |theta|, as in ASAM (Kwon et al. 2021); "layer", "filter": each module's (each row's) perturbation has
                norm rho ||w|| of its own (Li et al. 2018; rows: biases and norms stay)
    m           "worst" and "ascent": m-sharpness, the mean over parts of m samples, each with a maximum of its own
    steps       of the ascent
    normalize_logits  cross-entropy of f / ||f - mean f||, which no rescaling of the logits changes
    confidence  of the interval, which speaks of the random directions (or parts), not of the sampling of the data
    loader, loss_fn, params, reduction, bn, dropout, memory, progress, strict_data   as in `fastsharp.lanczos`

    Returns Sharpness, an Estimate with `changes` (signed, by direction or part), `signed`, `noise_floor`. Larger is sharper; a mean
    over samples whatever the batches. A rescaling of ReLU layers against each other changes it for scale "none"; with "adaptive" and
    "filter", which measure relative to the weights, it does not, with "layer" it does not where layers have no biases.
    Cost: one forward pass over the data for each direction and 9 more; (3 steps + 1) passes for "worst", 5 for "ascent", and 8.
    Weights of several directions are evaluated together where that pays (small nets on a CPU, GPUs).
    Raises subclasses of FastsharpError: InputError for arguments, NonFiniteError where a perturbed loss is not finite,
    NondeterministicOperatorError where the same weights give two losses; Interrupted on Ctrl-C, with `.partial`.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"sharpness: model is a {type(model).__name__}, expected a torch.nn.Module: a matrix has no loss to perturb."
        )
    arguments: dict[str, Any] = {"kind": kind, "rho": rho, "norm": norm, "scale": scale, "m": m, "steps": steps, "confidence": confidence}
    check_arguments(directions=directions, **arguments)
    if kind in ("sam", "average") and steps != 20:
        raise InputError(f"sharpness: steps= belongs to kind='worst', kind={kind!r} takes directions=.")
    with first_steps():
        loss = normalised(loss_fn) if normalize_logits else loss_fn
        options: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout}
        objective = Objective(model, loader, loss, memory=memory, seed=seed, **options)
        check_m(objective, m)
        check_data(objective.batches, "fast", strict_data)
        landscape = Landscape(objective)
    ball = Ball(landscape.theta, objective.selection.layout, rho, scale=scale, norm=norm)
    shown = Progress(progress, "sharpness", "change")
    with shown, torch.inference_mode(False):
        solve = random_sharpness if kind in ("sam", "average") else worst_sharpness
        how: dict[str, Any] = {"directions": directions} if kind in ("sam", "average") else {"m": m, "steps": steps}
        result = solve(landscape, ball, kind=kind, confidence=confidence, seed=seed, on_step=shown.on_step, **how)
        objective.check_values()
    return result
