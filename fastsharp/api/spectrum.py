"""`fastsharp.spectrum`: both ends of a loss Hessian's spectrum, its density, trace and Frobenius norm, in one call."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastsharp.api.resume import recorded
from fastsharp.api.subject import Operator, basis_memory, checked, operator_of
from fastsharp.krylov.plan import whole_bytes
from fastsharp.krylov.spectrum import check_arguments
from fastsharp.krylov.spectrum import spectrum as krylov_spectrum
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Spectrum


def spectrum(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    k: int = 5,
    tol: float = 1e-3,
    criterion: str = "residual",
    steps: int = 80,
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_iter: int | None = None,
    max_products: int = 2000,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    strict: bool = False,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> Spectrum:
    """k eigenpairs at each end, the density (1/n) sum_i delta(lambda_i), tr H and ||H||_F, each product counted and used once.

        s = fastsharp.spectrum(model, loader)
        s.eigenpairs.eigenvalues, s.density.cdf(0.0), float(s.trace), float(s.frobenius)

    model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, progress, strict, strict_data, preflight, resume   as in
               `fastsharp.lanczos`
    k          pairs at each end
    tol, criterion, max_iter   of the eigenpairs, as in `fastsharp.lanczos`
    steps      fewest Krylov steps: the resolution of the density
    rtol, confidence   trace and norm are sampled until half of their interval is at most rtol of the value (or of ||H||_F)
    max_products   products at most for trace and norm
    seed       of the start vector and the probes

    Returns Spectrum: eigenpairs (k largest, then k smallest), density, trace, frobenius, n_matvec.
    Cost: the Krylov products (at least `steps`), 2 k to verify, the probes and the preflight; the basis is held whole.
    Raises subclasses of FastsharpError; BasisMemoryError where the basis does not fit `memory`; Interrupted on Ctrl-C, `.partial`
    is a Spectrum. Sources: those of `lanczos`, `density` and `trace`; one basis for all: Chen & Hallman 2023 (2205.01736).
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
    arguments: dict[str, Any] = {"k": k, "tol": tol, "criterion": criterion, "steps": steps, "rtol": rtol, "confidence": confidence}
    arguments |= {"max_iter": max_iter, "max_products": max_products, "seed": seed}
    request = check_arguments(matrix.n, **arguments)  # before the preflight spends products
    budget: dict[str, Any] = basis_memory(matrix, memory, whole_bytes(matrix.n, matrix.dtype, request))
    check = checked(matrix, preflight=preflight, strict_data=strict_data, seed=seed)
    shown = Progress(progress)
    logged = recorded(matrix, resume, "spectrum", arguments, basis_bytes=budget["memory"])
    with shown, torch.inference_mode(False), torch.no_grad(), logged as A:  # vectors that outlive the caller's inference mode
        return krylov_spectrum(A, check=check, strict=strict, on_step=shown.on_step, **budget, **arguments)
