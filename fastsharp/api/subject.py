"""What a call is about: a model with its data, or a matrix, as one checked operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastsharp.batches import Budget, available_memory
from fastsharp.composite import DiagonalOperator, leaves
from fastsharp.curvature import GGN, FiniteSum, Fisher, GradientCovariance, Hessian, Residual
from fastsharp.curvature.weight_decay import WeightDecay
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted
from fastsharp.objective import Objective
from fastsharp.operator import DenseOperator, SymmetricOperator, as_operator
from fastsharp.preflight import LEVELS
from fastsharp.preflight import preflight as run_preflight

Build = Callable[..., SymmetricOperator]  # (model, loader, loss_fn, **build) -> the operator
Operator = str | Build  # what `operator=` takes: a name, an operator class, or a function that builds one
OPERATORS: dict[str, Callable[..., FiniteSum]] = {
    "hessian": Hessian,
    "ggn": GGN,
    "fisher": Fisher,
    "empirical-fisher": partial(Fisher, kind="empirical"),
    "gradient-covariance": GradientCovariance,
    "residual": Residual,
}
# symmetric by construction; a DenseOperator was compared with its transpose (a wrapped one no longer shows it)
_KNOWN = (DenseOperator, DiagonalOperator, WeightDecay)


def operator_of(
    model: Any,
    loader: Any,
    loss_fn: Any,
    *,
    params: Any = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> SymmetricOperator:
    """The operator that `model` means: for an nn.Module the one that `operator` names or builds, else the matrix itself. Not yet checked."""
    if preflight not in LEVELS:
        raise InputError(f"preflight={preflight!r} is none of {', '.join(map(repr, LEVELS))}.")
    build = kind_of(operator)
    if isinstance(model, nn.Module):
        with first_steps():
            return build(
                model,
                loader,
                loss_fn,
                params=params,
                reduction=reduction,
                bn=bn,
                dropout=dropout,
                backend=backend,
                memory=memory,
                seed=seed,
            )
    _refuse_model_arguments(
        loader=loader,
        loss_fn=loss_fn,
        params=params,
        bn=bn,
        dropout=dropout,
        operator=None if isinstance(operator, str) and operator == "hessian" else operator,
        backend=None if backend == "auto" else backend,
    )
    return as_operator(model)


def kind_of(operator: Operator) -> Build:
    """What builds the operator that `operator=` means, called `(model, loader, loss_fn, **build)`; its result is known to be one.

    build   params, reduction, bn, dropout, backend, memory, seed: what the caller gave, or the defaults
    """
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise InputError(
                f"operator={operator!r} is none of {', '.join(map(repr, OPERATORS))}, nor a class or function that builds an operator."
            )
        return OPERATORS[operator]
    if isinstance(operator, SymmetricOperator):
        raise ArgumentTypeError(
            f"operator= is a {type(operator).__name__} that is built already. Pass it as the first argument, without loader and loss."
        )
    if not callable(operator):
        raise ArgumentTypeError(
            f"operator= is a {type(operator).__name__}, expected a name, an operator class, or f(model, loader, loss_fn, **build)."
        )

    def build(*args: Any, **options: Any) -> SymmetricOperator:
        made = operator(*args, **options)
        if not isinstance(made, SymmetricOperator):
            raise ArgumentTypeError(
                f"operator={getattr(operator, '__qualname__', operator)} returned a {type(made).__name__}, expected a SymmetricOperator."
            )
        return made

    return build


def sums_in(operator: SymmetricOperator) -> list[FiniteSum]:
    """The sums over a model's data that an operator is made of: what a preflight checks and what keeps graphs."""
    return [leaf for leaf in leaves(operator) if isinstance(leaf, FiniteSum)]


def checked(operator: SymmetricOperator, *, preflight: str = "fast", strict_data: bool = False, seed: int = 0) -> str:
    """Run the preflight of each model's operator in it that has not seen one; returns what is left for the solver's own symmetry `check`.

    What is made of symmetric parts is symmetric: probes are for parts that nobody has looked at, as callables.
    """
    unknown = False
    for leaf in leaves(operator):
        if isinstance(leaf, FiniteSum):
            if leaf.preflight["level"] == "off":
                with first_steps():
                    run_preflight(leaf, preflight, strict_data=strict_data, seed=seed)
        elif not isinstance(leaf, _KNOWN):
            unknown = True
    return "auto" if unknown and preflight != "off" else "off"


def frozen(objective: Objective, loader: Any) -> Any:
    """The frozen batches themselves, for another operator on the same data: read once and held once. A stream is read again."""
    return loader if objective.batches.streamed else [batch for _, batch in objective.batches]


def basis_memory(operator: SymmetricOperator, memory: str | int, wish: int) -> dict[str, int]:
    """Bytes that a solver's basis may take: `wish` at most, and half of the budget; a model's operator keeps fewer graphs then.

    -> memory (on the device), host_memory (what is free beside it)
    """
    share = min(wish, Budget.of(memory, operator.device).total // 2)
    parts = {id(part.objective): part for part in sums_in(operator)}.values()
    for part in parts:  # each has counted on the whole budget for itself
        part.reserve(0)
        rest = max(0, part.objective.graph_budget - share) // len(parts)
        part.reserve(part.objective.graph_budget - rest)
    return {"memory": share, "host_memory": available_memory(torch.device("cpu"))}


@contextmanager
def first_steps() -> Iterator[None]:
    """Ctrl-C before the solver's first step: Interrupted, with nothing to carry."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as e:
        raise Interrupted("interrupted before the first step: nothing was computed.", None) from e


def _refuse_model_arguments(**given: Any) -> None:
    """Arguments that speak of a model make no sense beside a matrix; silence would hide a mistake."""
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: only for a torch.nn.Module; the first argument is an operator or matrix. Leave them out.")
