"""diagonal and row_norms: what a curvature matrix says of each parameter by itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from fastsharp.api.resume import recorded
from fastsharp.api.subject import checked, operator_of
from fastsharp.krylov import diagonal as solvers
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import DiagonalEstimate


def diagonal(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    products: int = 128,
    method: str = "auto",
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Any = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> DiagonalEstimate:
    """diag(H) = E z o (H z) over random signs z, every entry with its standard error and interval.

        estimate = fastsharp.diagonal(model, loader, operator="ggn")
        estimate.value, estimate.stderr, estimate.as_dict()["0.weight"], estimate.sums()

    model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, progress, strict_data, preflight, resume
                  as in `fastsharp.lanczos`
    products      products to be made; from n on, unit vectors give the diagonal without chance
    method        "hutchinson": errors of an entry are sqrt(sum_{j != i} H_ij^2 / products), 40 n bytes; "xdiag": a rank-products/2
                  part is exact, smaller errors where the spectrum decays, intervals approximate, `products` n numbers of memory;
                  "exact": n products; "auto": "exact" where products >= n, else "hutchinson"
    confidence    of the interval of one entry
    seed          of the probes: same seed, same numbers

    Returns DiagonalEstimate: value (n,), stderr (n,), interval, as_dict(), sums(), n_matvec, notes.
    Raises subclasses of FastsharpError; Interrupted on Ctrl-C, with `.partial`.
    Sources: Bekas, Kokiopoulou and Saad 2007; XDiag, Epperly, Tropp and Webber 2024.
    """
    build = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout, "operator": operator}
    build |= {"backend": backend, "memory": memory, "seed": seed, "preflight": preflight}
    arguments = {"products": products, "method": method, "confidence": confidence, "seed": seed}
    return _run("diagonal", solvers.diagonal, (model, loader, loss_fn), build, arguments, progress, strict_data, resume)


def row_norms(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    products: int = 128,
    method: str = "auto",
    confidence: float = 0.95,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Any = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> DiagonalEstimate:
    """||H_i|| = sqrt(E (H z)_i^2) over normal z: the norm of each row, with the interval of the chi-square law.

    (H z)_i is normal for every H, so that one entry's interval holds the norm at exactly `confidence`, up to rounding and the
    quantile's approximation. The standard error is value / sqrt(2 products); `value**2` is the unbiased estimate of sum_j H_ij^2.
    Arguments, result and errors as in `fastsharp.diagonal`, without "xdiag"; "exact" and products >= n use unit vectors.
    """
    build = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout, "operator": operator}
    build |= {"backend": backend, "memory": memory, "seed": seed, "preflight": preflight}
    arguments = {"products": products, "method": method, "confidence": confidence, "seed": seed}
    return _run("row_norms", solvers.row_norms, (model, loader, loss_fn), build, arguments, progress, strict_data, resume)


def _run(
    name: str,
    solver: Callable[..., DiagonalEstimate],
    subject: tuple[Any, Any, Any],
    build: dict[str, Any],
    arguments: dict[str, Any],
    progress: bool | None,
    strict_data: bool,
    resume: str | os.PathLike[str] | None,
) -> DiagonalEstimate:
    """Preflight, then the solver, in a mode whose tensors outlive the caller's inference mode."""
    solvers.check_arguments(name, **arguments)
    matrix = operator_of(*subject, **build)
    check = checked(matrix, preflight=build["preflight"], strict_data=strict_data, seed=arguments["seed"])
    shown = Progress(progress, name.capitalize().replace("_", " "), "value")
    logged = recorded(matrix, resume, name, arguments)
    with shown, torch.inference_mode(False), torch.no_grad(), logged as A:
        return solver(A, check=check, on_step=shown.on_step, **arguments)
