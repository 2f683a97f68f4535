"""lanczos: top eigenpairs of a loss Hessian in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

from fastsharp.api.ensemble import ensemble_lanczos, is_ensemble
from fastsharp.api.resume import recorded
from fastsharp.api.subject import Operator, basis_memory, checked, operator_of
from fastsharp.errors import InputError
from fastsharp.krylov.ladder import ladder
from fastsharp.krylov.lanczos import lanczos as krylov_lanczos
from fastsharp.krylov.plan import whole_bytes
from fastsharp.krylov.request import check_arguments
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Eigenpairs

PRECISIONS = ("auto", "bf16", "tf32")
_HOW_LONG = ("tol", "criterion", "max_iter", "verify")  # the same vectors in the same order, more or fewer of them


@overload
def lanczos(
    model: Sequence[nn.Module] | tuple[nn.Module, Mapping[str, torch.Tensor]],
    loader: Any,
    loss_fn: Any = None,
    *,
    k: int = 5,
    which: str = "LA",
    tol: float = 1e-3,
    criterion: str = "residual",
    max_iter: int | None = None,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    precision: str = "auto",
    memory: str | int = "auto",
    method: str = "auto",
    verify: bool = True,
    v0: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
    strict: bool = False,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> list[Eigenpairs]: ...


@overload
def lanczos(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    k: int = 5,
    which: str = "LA",
    tol: float = 1e-3,
    criterion: str = "residual",
    max_iter: int | None = None,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    precision: str = "auto",
    memory: str | int = "auto",
    method: str = "auto",
    verify: bool = True,
    v0: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
    strict: bool = False,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> Eigenpairs: ...


def lanczos(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    k: int = 5,
    which: str = "LA",
    tol: float = 1e-3,
    criterion: str = "residual",
    max_iter: int | None = None,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    precision: str = "auto",
    memory: str | int = "auto",
    method: str = "auto",
    verify: bool = True,
    v0: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
    strict: bool = False,
    strict_data: bool = False,
    preflight: str = "fast",
    resume: str | os.PathLike[str] | None = None,
) -> Eigenpairs | list[Eigenpairs]:
    """H x_i = lambda_i x_i: k eigenpairs of a loss Hessian, each with its true residual ||H x_i - lambda_i x_i||.

        result = fastsharp.lanczos(model, loader)
        values, vectors = result

    model      an nn.Module, evaluated as it stands and left as it was; or, without a loader, a SymmetricOperator, a square
               tensor, a scipy LinearOperator or `(callable, n)`. A list of models of one architecture gives a list of results,
               by products of all of them together; so does (template, {name: (members, *shape)})
    loader     a DataLoader, a Dataset, a list of batches or one batch; batches are `(x, y)` or dicts. The data are read once
               and frozen; beyond the memory budget they are read anew in every product and compared by hash. For a list of models
               one for all, or a list of loaders with one for each (a list of batches is one loader)
    loss_fn    `loss_fn(output, target)`, `fastsharp.batch_loss(fn)`, or None: the output's own `.loss`, else cross-entropy
    k, which   how many and which: "LA" largest (sharpness), "SA" smallest, "LM" largest modulus, "BE" both ends
    tol        criterion "residual": ||Hx - lambda x|| <= tol |lambda|; "value": |error of lambda| <= tol |lambda| by the bound
               min(r, r^2/gap), which takes fewer products
    max_iter   Krylov products at most, min(n, max(20 k, 300)) by default
    params     globs, names or `f(name, parameter)`: the parameters to differentiate; frozen ones are left out
    reduction  "auto", "mean" (of the example-weighted mean) or "sum"
    bn         None refuses BatchNorm in train mode; "eval"; "frozen-batch-stats"
    dropout    None refuses active Dropout; "eval"; "fixed-masks"
    operator   "hessian", "ggn" (`fastsharp.GGN`), "fisher" or "empirical-fisher" (`Fisher`), "gradient-covariance", "residual"; an operator
               class; or a function `(model, loader, loss_fn, **build)` that builds an operator, as a sum or a preconditioned matrix
    backend    "rop": a recorded tape linearised call by call; "autograd": torch's double backward; "mlp": a native kernel for plain
               fully connected nets; "auto": "mlp" where torch's own modules alone make such a net, "rop" where the model can be recorded,
               else "autograd", see `fastsharp.explain`
    precision  "auto": the parameters' dtype; "bf16", "tf32" (CUDA): cheap products for the Krylov run, exact ones for values and
               residuals, with as many residual steps as `tol` needs
    memory     bytes for the run: "auto" (half of what is free), "2GiB", a number. At most half for frozen data, at most half for the
               Krylov basis, kept graphs have the rest. A basis that does not fit is stored in float16 where tol allows it,
               else restarted from its Ritz vectors, else (GPU) kept in host memory: settings["plan"] says what was done
    method     "lanczos", "dense", or "auto" (dense for n <= max(64, 2 k))
    verify     False skips the k products for true residuals and says so
    v0, seed   start vector (n,), or the seed of a random one
    progress   True, False, or None: shown where the error stream is a terminal
    strict     raise NotConvergedError instead of the warning; both carry `.partial`
    strict_data  raise when the loader returns other samples on a second draw, instead of the warning
    preflight  "full", "fast" or "off": see `fastsharp.preflight`
    resume     path of a log of the products: created if absent, continued if there. A continued run gives the bits of an uninterrupted
               one; the preflight runs before and is not logged. With `precision`, cheap and exact products are in one log, told apart

    Returns Eigenpairs: values float64 (k,), vectors (k, n) rows on the model's device, residuals, error bounds, flags, notes.
    Cost: `n_matvec` Krylov products + k for the residuals + preflight (4 products on one batch).
    Raises subclasses of FastsharpError that name the object, the cause and one thing to do; Interrupted on Ctrl-C, with
    `.partial`. All copies of a multiple eigenvalue are not promised, nor interior ones.
    Source: Lanczos with full reorthogonalisation, Parlett, The Symmetric Eigenvalue Problem (1998), section 13.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} is none of {', '.join(map(repr, PRECISIONS))}.")
    if precision != "auto" and not verify:
        raise InputError(
            f"precision={precision!r} takes its values from exact products, verify=False leaves those out. Drop one of the two."
        )
    build: dict[str, Any] = {
        "params": params,
        "reduction": reduction,
        "bn": bn,
        "dropout": dropout,
        "operator": operator,
        "backend": backend,
        "seed": seed,
    }
    arguments: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "criterion": criterion,
        "max_iter": max_iter,
        "method": method,
        "seed": seed,
        "strict": strict,
    }
    if is_ensemble(model):
        for name, given in (("precision", precision != "auto"), ("resume", resume is not None)):
            if given:
                raise InputError(
                    f"{name}= is for one model, the first argument is a list of them. Leave it out, or measure each by a call."
                )
        solve = {**arguments, "verify": verify, "v0": v0}
        watched: dict[str, Any] = {"progress": progress, "strict_data": strict_data, "preflight": preflight}
        return ensemble_lanczos(model, loader, loss_fn, build=build, solve=solve, memory=memory, **watched)
    matrix = operator_of(model, loader, loss_fn, memory=memory, preflight=preflight, **build)
    request = check_arguments(matrix.n, **arguments)  # before the preflight spends products
    budget: dict[str, Any] = basis_memory(matrix, memory, whole_bytes(matrix.n, matrix.dtype, request))
    check = checked(matrix, preflight=preflight, strict_data=strict_data, seed=seed)
    cheap = None if precision == "auto" else matrix.cheap(precision)
    shown = Progress(progress)
    facts = {**arguments, "v0": v0, **({} if precision == "auto" else {"precision": precision})}
    logged = recorded(matrix, resume, "lanczos", facts, may_change=_HOW_LONG, basis_bytes=budget["memory"])
    with shown, torch.inference_mode(False), torch.no_grad(), logged as A:  # vectors that outlive the caller's inference mode
        options = {"v0": v0, "check": check, "on_step": shown.on_step, "on_plan": shown.on_plan, **budget, **arguments}
        if cheap is None:
            return krylov_lanczos(A, verify=verify, **options)
        return ladder(cheap if A is matrix else A.cheap(precision), A, **options)
