"""soft_rank and tic: how many directions the Gauss-Newton matrix has above a damping, and gradient noise in units of its curvature."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastsharp.api.subject import checked, first_steps, frozen
from fastsharp.curvature import GGN, Fisher
from fastsharp.errors import ArgumentTypeError, InputError, NotConvergedWarning
from fastsharp.krylov import trace as solvers
from fastsharp.krylov.lanczos import lanczos as krylov_lanczos
from fastsharp.krylov.radau import RadauQuadrature
from fastsharp.measures.information import check_damping
from fastsharp.measures.information import tic as tic_by_probes
from fastsharp.params import Selector
from fastsharp.results import Estimate


def soft_rank(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    damping: float = 1e-3,
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_products: int = 2000,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> Estimate:
    """tr G (G + cI)^-1 = sum_i lambda_i / (lambda_i + c), c = damping lambda_max(G): the directions in which G is above c, softly counted.

    damping    c in units of the largest eigenvalue; settings["c"] says what it came to
    rtol, confidence, max_products   of the estimate, as in `fastsharp.trace_function`; few samples times outputs have an exact answer in
               `fastsharp.ggn_spectrum(...).effective_dimension(c)`
    others     as in `fastsharp.lanczos`; G is `fastsharp.GGN`

    Returns Estimate, in [0, n]. Cost: a Lanczos run for lambda_max, and one of some 40 steps for each of a few probes. With the network's layers
    rescaled against each other it changes. Raises InputError where G is zero. Source: MacKay 1992, effective number of parameters.
    """
    check_damping("soft_rank", damping)
    build: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout, "backend": backend}
    G, check, c, spent = _damped("soft_rank", model, loader, loss_fn, damping, {**build, "memory": memory, "seed": seed}, preflight)
    options: dict[str, Any] = {"rtol": rtol, "confidence": confidence, "max_products": max_products, "seed": seed, "check": check}
    options["quadrature"] = RadauQuadrature
    with torch.inference_mode(False), torch.no_grad():
        found = solvers.trace_function(G, f=lambda x: x.clamp_min(0.0) / (x.clamp_min(0.0) + c), **options)
    return replace(found, n_matvec=found.n_matvec + spent, settings={**found.settings, "damping": damping, "c": c})


def tic(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    damping: float = 1e-3,
    probes: int = 16,
    rtol: float = 1e-4,
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> Estimate:
    """tr (G + cI)^-1 C, C = mean_i g_i g_i' (not centred), c = damping lambda_max(G): the Takeuchi information criterion's penalty.

    damping    c in units of the largest eigenvalue of the Gauss-Newton matrix G
    probes     normal vectors z, at least 6; samples are z'(G + cI)^-1 C z
    rtol       of the solves by conjugate gradients
    others     as in `fastsharp.lanczos`; C is `fastsharp.Fisher(kind="empirical")`

    Returns Estimate; divided by the number of examples it estimates the generalisation gap of a mean loss at a minimum. Where the model's
    distribution is that of the data C is G, and it is the soft rank. Cost: products of the solves, sqrt(1 / damping) steps a probe at most, eight
    probes at once; data are frozen once for both matrices. Raises InputError where G is zero or the loss is no sum over examples.
    Source: Thomas et al. 2020, "On the interplay between noise and curvature and its effect on optimization and generalization".
    """
    check_damping("tic", damping)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 6:
        raise InputError(f"tic: probes={probes!r}, expected an integer of at least 6.")
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < 1.0):
        raise InputError(f"tic: rtol={rtol!r}, expected a number between 0 and 1.")
    if not 0.0 < confidence < 1.0:
        raise InputError(f"tic: confidence={confidence!r}, expected a number between 0 and 1.")
    build: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout, "backend": backend}
    G, _, c, spent = _damped("tic", model, loader, loss_fn, damping, {**build, "memory": memory, "seed": seed}, preflight)
    with first_steps(), torch.inference_mode(False), torch.no_grad():
        objective = G.objective
        data = frozen(objective, loader)
        # the stand-in for the loss that makes C has no native kernel
        of_c = {
            **build,
            "reduction": objective.reduction,
            "memory": memory,
            "seed": seed,
            "backend": "auto" if backend == "mlp" else backend,
        }
        C = Fisher(model, data, loss_fn, kind="empirical", **of_c)
        checked(C, preflight=preflight, seed=seed)
        found = tic_by_probes(G, C, c, probes=probes, rtol=rtol, confidence=confidence, seed=seed)
        G.check_unchanged()
    settings = {**G.settings, "damping": damping, "c": c, "rtol": rtol}
    notes = (*found.notes, *G.notes)
    return replace(found, n_matvec=found.n_matvec + spent, notes=notes, settings=settings, provenance=G.provenance)


def _damped(
    name: str, model: Any, loader: Any, loss_fn: Any, damping: float, build: dict[str, Any], preflight: str
) -> tuple[GGN, str, float, int]:
    """The checked Gauss-Newton matrix, what is left of its check, c, and the products spent on it."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{name}: model is a {type(model).__name__}, expected a torch.nn.Module.")
    with first_steps(), torch.inference_mode(False), torch.no_grad():
        G = GGN(model, loader, loss_fn, **build)
        check = checked(G, preflight=preflight, seed=build["seed"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # a scale need not be certified
            top = krylov_lanczos(G, k=1, tol=1e-2, criterion="value", check=check, seed=build["seed"], verify=False)
    c = damping * float(top.eigenvalues[0])
    if not c > 0.0:
        raise InputError(
            f"{name}: the largest eigenvalue of the Gauss-Newton matrix is {float(top.eigenvalues[0]):.3g}, which is no scale for c."
        )
    return G, check, c, top.n_matvec
