"""`fastsharp.density`: the distribution of all eigenvalues of a model's loss Hessian, or of any symmetric matrix, in one call."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastsharp.api.resume import recorded
from fastsharp.api.subject import Operator, basis_memory, checked, operator_of
from fastsharp.krylov.density_plan import make_density_plan
from fastsharp.krylov.slq import check_arguments
from fastsharp.krylov.slq import density as krylov_density
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Density


def density(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    probes: int = 1,
    steps: int = 80,
    kind: str = "normal",
    seed: int = 0,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    progress: bool | None = None,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> Density:
    """(1/n) sum_i delta(lambda_i) as nodes and weights: the spectral density by stochastic Lanczos quadrature.

        d = fastsharp.density(model, loader)
        share_negative = d.cdf(0.0)

    model      an nn.Module, evaluated as it stands and left as it was; or, without a loader, a SymmetricOperator, a square
               tensor, a scipy LinearOperator or `(callable, n)`
    loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, strict_data, preflight, resume   as in `fastsharp.lanczos`
    probes     random vectors; all share each pass over the data. More of them lower the sampling noise like 1/sqrt(probes n)
    steps      products a probe: the resolution, about the range of the spectrum / steps, finer at its ends
    kind       "normal" or "rademacher"; the bounds hold for normal probes alone, whatever the matrix
    seed       of the probes
    progress   True, False, or None: shown where the error stream is a terminal

    Returns Density: nodes, weights (sum 1), cdf, pdf, moments, and a bound of the Wasserstein-1 distance to the true distribution
    at 95 % confidence. Cost: probes * steps products and the preflight; (probes * (steps + 2) + 2) n numbers of memory, less where
    half of `memory` does not hold them: fewer probes at once, then float16 rows, then host memory (GPU), as settings["plan"] says.
    BasisMemoryError names what one probe needs, where not even that fits.
    Raises subclasses of FastsharpError that name the object, the cause and one thing to do; Interrupted on Ctrl-C, with
    `.partial`. Sources: Ubaru, Chen & Saad 2017; Laurie 1996; Chen, Trogdon & Ubaru 2410.21690 and 2105.06595.
    """
    matrix = operator_of(
        model,
        loader,
        loss_fn,
        params=params,
        reduction=reduction,
        bn=bn,
        dropout=dropout,
        operator=operator,
        backend=backend,
        memory=memory,
        seed=seed,
        preflight=preflight,
    )
    arguments: dict[str, Any] = {"probes": probes, "steps": steps, "kind": kind, "seed": seed}
    check_arguments(matrix.n, **arguments)  # before the preflight spends products
    wish = make_density_plan(matrix.n, matrix.dtype, matrix.device, probes, steps).bytes
    budget: dict[str, Any] = basis_memory(matrix, memory, wish)
    make_density_plan(matrix.n, matrix.dtype, matrix.device, probes, steps, **budget)  # what cannot fit is said before the preflight
    check = checked(matrix, preflight=preflight, strict_data=strict_data, seed=seed)
    shown = Progress(progress)
    logged = recorded(matrix, resume, "density", arguments, may_change=("steps",), basis_bytes=budget["memory"])
    with shown, torch.inference_mode(False), torch.no_grad(), logged as A:  # vectors that outlive the caller's inference mode
        return krylov_density(A, check=check, on_step=shown.on_step, on_plan=shown.on_plan, **budget, **arguments)
