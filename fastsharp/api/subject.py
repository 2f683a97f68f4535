"""What a call is about: a model with its data, or a matrix, as one checked operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastsharp.batches import Budget, available_memory
from fastsharp.curvature import GGN, FiniteSum, Fisher, GradientCovariance, Hessian, Residual
from fastsharp.errors import InputError, Interrupted
from fastsharp.operator import DenseOperator, SymmetricOperator, as_operator
from fastsharp.preflight import LEVELS
from fastsharp.preflight import preflight as run_preflight

OPERATORS: dict[str, Callable[..., FiniteSum]] = {
    "hessian": Hessian,
    "ggn": GGN,
    "fisher": Fisher,
    "empirical-fisher": partial(Fisher, kind="empirical"),
    "gradient-covariance": GradientCovariance,
    "residual": Residual,
}


def operator_of(
    model: Any,
    loader: Any,
    loss_fn: Any,
    *,
    params: Any = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: str = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> SymmetricOperator:
    """The operator that `model` means: a Hessian or Gauss-Newton matrix of an nn.Module, else the matrix itself. Not yet checked."""
    if preflight not in LEVELS:
        raise InputError(f"preflight={preflight!r} is none of {', '.join(map(repr, LEVELS))}.")
    kind = kind_of(operator)
    if isinstance(model, nn.Module):
        with first_steps():
            return kind(
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
        operator=None if operator == "hessian" else operator,
        backend=None if backend == "auto" else backend,
    )
    return as_operator(model)


def kind_of(operator: str) -> Callable[..., FiniteSum]:
    """The class that `operator=` names."""
    if operator not in OPERATORS:
        raise InputError(f"operator={operator!r} is none of {', '.join(map(repr, OPERATORS))}.")
    return OPERATORS[operator]


def checked(operator: SymmetricOperator, *, preflight: str = "fast", strict_data: bool = False, seed: int = 0) -> str:
    """Run the preflight of a model's operator that has not seen one; returns what is left for the solver's own symmetry `check`."""
    if isinstance(operator, FiniteSum):
        if operator.preflight["level"] == "off":
            with first_steps():
                run_preflight(operator, preflight, strict_data=strict_data, seed=seed)
        return "off"
    if isinstance(operator, DenseOperator):  # compared with its transpose at construction; a wrapped one no longer shows it
        return "off"
    return "off" if preflight == "off" else "auto"


def basis_memory(operator: SymmetricOperator, memory: str | int, wish: int) -> dict[str, int]:
    """Bytes that a solver's basis may take: `wish` at most, and half of the budget; a model's operator keeps fewer graphs then.

    -> memory (on the device), host_memory (what is free beside it)
    """
    share = min(wish, Budget.of(memory, operator.device).total // 2)
    if isinstance(operator, FiniteSum):
        operator.reserve(share)
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
