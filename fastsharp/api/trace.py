"""trace, frobenius, logdet and trace_function: numbers of a loss Hessian known by random probes, each with its interval."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from fastsharp.api.resume import recorded
from fastsharp.api.subject import Operator, checked, operator_of
from fastsharp.krylov import trace as solvers
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.operator import SymmetricOperator
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Eigenpairs, Estimate

_HOW_LONG = ("rtol", "atol", "confidence", "max_products")  # the same probes in the same order, more or fewer of them


def trace(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    rtol: float = 0.01,
    atol: float | None = None,
    confidence: float = 0.95,
    method: str = "auto",
    max_products: int = 2000,
    pairs: Eigenpairs | KrylovSpace | None = None,
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
) -> Estimate:
    """tr H to a relative tolerance at a stated confidence: probes, beside a space whose part is exact.

        estimate = fastsharp.trace(model, loader)
        float(estimate), estimate.interval

    model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, progress, strict_data, preflight, resume
                  as in `fastsharp.lanczos`
    rtol, atol    half the interval is to be at most max(rtol |tr H|, atol); atol None is rtol ||H||_F, since a trace that
                  cancels cannot be had to a relative tolerance
    confidence    of the interval
    method        "auto", "hutchinson", "hutch++", "xtrace", or "krylov" (beside `pairs` alone)
    max_products  products at most
    pairs         Eigenpairs of a lanczos run on the same model and data: their part of the trace is then exact, for one product
    seed          of the probes: same seed, same numbers
    strict        raise NotConvergedError in place of NotConvergedWarning; both carry `.partial`

    Returns Estimate: value, stderr, interval, samples, n_matvec, converged, notes.
    Raises subclasses of FastsharpError; Interrupted on Ctrl-C, with `.partial`.
    Sources: Hutchinson 1990; Hutch++, Meyer et al. 2021; XTrace, Epperly et al. 2024; Krylov-aware, Chen and Hallman 2023.
    """
    subject = _Subject("trace", model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, seed, preflight)
    arguments = {"rtol": rtol, "atol": atol, "confidence": confidence, "method": method, "max_products": max_products, "pairs": pairs}
    solvers.check_arguments("trace", seed=seed, **arguments)  # type: ignore[arg-type]
    return subject.run(solvers.trace, progress, strict_data, resume, seed=seed, strict=strict, **arguments)


def frobenius(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    rtol: float = 0.01,
    confidence: float = 0.95,
    method: str = "auto",
    max_products: int = 2000,
    pairs: Eigenpairs | KrylovSpace | None = None,
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
) -> Estimate:
    """||H||_F = sqrt(tr H^2) to a relative tolerance at a stated confidence.

    Arguments, result and errors as in `fastsharp.trace`; method "xtrace" estimates traces only.
    """
    subject = _Subject("frobenius", model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, seed, preflight)
    arguments = {"rtol": rtol, "confidence": confidence, "method": method, "max_products": max_products, "pairs": pairs}
    solvers.check_arguments("frobenius", atol=None, seed=seed, **arguments)  # type: ignore[arg-type]
    return subject.run(solvers.frobenius, progress, strict_data, resume, seed=seed, strict=strict, **arguments)


def logdet(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    shift: float,
    rtol: float = 0.01,
    atol: float | None = None,
    confidence: float = 0.95,
    max_products: int = 5000,
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
) -> Estimate:
    """log det(H + c I) for c = `shift`, as tr log(H + c I).

    A Ritz value at or below -c raises InputError with that value: H + c I is then not positive definite.
    Other arguments, result and errors as in `fastsharp.trace_function`.
    """
    subject = _Subject("logdet", model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, seed, preflight)
    arguments = {"rtol": rtol, "atol": atol, "confidence": confidence, "max_products": max_products}
    solvers.check_arguments("logdet", method="auto", pairs=None, seed=seed, **arguments)  # type: ignore[arg-type]
    return subject.run(solvers.logdet, progress, strict_data, resume, shift=shift, seed=seed, strict=strict, **arguments)


def trace_function(
    model: Any,
    loader: Any = None,
    loss_fn: Any = None,
    *,
    f: Callable[[torch.Tensor], torch.Tensor],
    rtol: float = 0.01,
    atol: float | None = None,
    confidence: float = 0.95,
    max_products: int = 5000,
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
) -> Estimate:
    """tr f(H) = sum_i f(lambda_i) by Lanczos quadrature of random probes.

    f    maps eigenvalues, a float64 tensor (m,), to values of the same shape; finite on the whole spectrum, the smoother the cheaper

    The interval includes an estimate of what the quadrature misses. Other arguments, result and errors as in `fastsharp.trace`.
    Source: Golub and Meurant, Matrices, Moments and Quadrature (2010), section 3.
    """
    subject = _Subject("trace_function", model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory, seed, preflight)
    arguments = {"rtol": rtol, "atol": atol, "confidence": confidence, "max_products": max_products}
    solvers.check_arguments("trace_function", method="auto", pairs=None, seed=seed, **arguments)  # type: ignore[arg-type]
    return subject.run(solvers.trace_function, progress, strict_data, resume, f=f, seed=seed, strict=strict, **arguments)


class _Subject:
    """A model with its data, or a matrix, as an operator; and one solver run on it."""

    def __init__(
        self,
        name: str,
        model: Any,
        loader: Any,
        loss_fn: Any,
        params: Selector,
        reduction: str,
        bn: str | None,
        dropout: str | None,
        operator: Operator,
        backend: str,
        memory: str | int,
        seed: int,
        preflight: str,
    ) -> None:
        self.name, self.preflight = name, preflight
        self.operator: SymmetricOperator = operator_of(
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

    def run(
        self,
        solver: Callable[..., Estimate],
        progress: bool | None,
        strict_data: bool,
        resume: str | os.PathLike[str] | None,
        **arguments: Any,
    ) -> Estimate:
        """Preflight, then the solver, in a mode whose tensors outlive the caller's inference mode."""
        check = checked(self.operator, preflight=self.preflight, strict_data=strict_data, seed=arguments["seed"])
        shown = Progress(progress, self.name.capitalize().replace("_", " "), "value")
        logged = recorded(self.operator, resume, self.name, _facts(arguments), may_change=_HOW_LONG)
        with shown, torch.inference_mode(False), torch.no_grad(), logged as A:
            return solver(A, check=check, on_step=shown.on_step, **arguments)


def _facts(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a log; vectors stand for the pairs that they belong to."""
    pairs = arguments.get("pairs")
    vectors = pairs.V if isinstance(pairs, KrylovSpace) else pairs.eigenvectors if isinstance(pairs, Eigenpairs) else pairs
    return {**arguments, "pairs": vectors}
