"""Tracker: top Hessian eigenvalues through training, each call started from the last one's eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsharp import rng
from fastsharp.api.subject import Operator, checked, first_steps, kind_of, sums_in
from fastsharp.callbacks import LightningCallback as LightningCallback
from fastsharp.callbacks import PlainCallback as PlainCallback
from fastsharp.callbacks import TrainerCallback as TrainerCallback
from fastsharp.composite import Composite
from fastsharp.curvature import FiniteSum
from fastsharp.curvature.backends import check_backend
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.krylov.request import check_arguments
from fastsharp.krylov.tracking import Carried, follow
from fastsharp.operator import SymmetricOperator
from fastsharp.params import Selector
from fastsharp.preflight import LEVELS
from fastsharp.results import Eigenpairs

LearningRate = float | Callable[[], float] | torch.optim.Optimizer | None


@dataclass(frozen=True)
class Record:
    """One call of a Tracker: eigenvalues and error_bounds descending; start is "cold", "warm" or "check", why says what decided."""

    step: int
    eigenvalues: tuple[float, ...]
    error_bounds: tuple[float, ...]
    converged: bool
    n_matvec: int
    start: str
    why: str
    lr: float | None
    sharpness_lr: float | None  # lambda_max lr / 2: gradient descent on the quadratic model diverges above 1

    def metrics(self) -> dict[str, float]:
        """Figures for a logger."""
        out = {"lambda_max": self.eigenvalues[0]}
        return out if self.sharpness_lr is None else {**out, "lambda_max_lr_over_2": self.sharpness_lr}


class Tracker:
    """lambda_1 .. lambda_k of the loss Hessian (or Gauss-Newton matrix) through training, by warm-started Lanczos; lambda_max lr / 2 beside them.

        tracker = fastsharp.Tracker(model, loader, lr=optimizer)
        ...
        tracker.update()                 every so many steps; `tracker.history` has the record

    model, loader, loss_fn, params, reduction, bn, dropout, operator, backend, memory: as in `fastsharp.lanczos`; the data are frozen at
               the first update
    k          how many of the largest eigenvalues
    tol        relative accuracy of each value: of min(r, r^2/gap) for criterion "value", of the residual for "residual"
    every      steps between updates, for the callbacks
    newcomers_every  updates from one half-random start, which sees eigenvectors orthogonal to the tracked ones, to the next
    lr         a number, a function without arguments, or an optimizer (its largest rate); or given at each update
    seed       of the random parts
    preflight  level of the checks at the first update; later ones keep the cheap checks (modes, finite values, unchanged data)

    Cost of an update: history[-1].n_matvec matvecs, none beside them to verify. Memory between updates: k + 7 vectors and the frozen data.
    Raises what `fastsharp.lanczos` raises; history and the carried pairs stay as they were.
    Sources: see `fastsharp.krylov.tracking`, which also says what the bounds rest on.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Any = None,
        *,
        k: int = 1,
        tol: float = 1e-2,
        criterion: str = "value",
        every: int = 20,
        newcomers_every: int = 10,
        lr: LearningRate = None,
        seed: int = 0,
        params: Selector = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        operator: Operator = "hessian",
        backend: str = "auto",
        memory: str | int = "auto",
        preflight: str = "fast",
    ) -> None:
        _at_least_one("every", every)
        _at_least_one("newcomers_every", newcomers_every)
        if preflight not in LEVELS:
            raise InputError(f"preflight={preflight!r} is none of {', '.join(map(repr, LEVELS))}.")
        if lr is not None:
            _rate(lr if not callable(lr) else 0.0)
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module.")
        self._solver: dict[str, Any] = {"k": k, "which": "LA", "tol": tol, "criterion": criterion, "max_iter": None, "seed": seed}
        self._solver["method"] = "lanczos"
        check_arguments(max(sum(p.numel() for p in model.parameters()), 1), **self._solver)
        self.every, self.newcomers_every, self.lr = every, newcomers_every, lr
        kind = kind_of(operator)
        options: dict[str, Any] = {"bn": bn, "dropout": dropout, "backend": check_backend(backend), "memory": memory, "seed": seed}
        self._build: Callable[[], FiniteSum | Composite] = lambda: _followed(
            kind(model, loader, loss_fn, params=params, reduction=reduction, **options)
        )
        self._level, self._seed = preflight, seed
        self._generator = rng.generator(seed)
        self._matrix: FiniteSum | Composite | None = None
        self._checked: list[dict[str, Any]] | None = None  # of the parts that a preflight looked at
        self._carried: Carried | None = None
        self._records: list[Record] = []

    @property
    def history(self) -> tuple[Record, ...]:
        """One record per finished update."""
        return tuple(self._records)

    def update(self, lr: float | None = None, *, step: int | None = None) -> Eigenpairs:
        """The k largest eigenpairs at the model's present weights; appends to `history`. See the class for cost and errors.

        step  the number under which the record goes; by default `every` after the last one, from 0
        """
        rate = _rate(self.lr if lr is None else lr)
        if self._matrix is None:
            with first_steps():
                self._matrix = self._build()
        else:
            self._matrix.refresh()
        matrix = self._matrix
        try:
            if self._checked is None:
                checked(matrix, preflight=self._level, seed=self._seed)
                self._checked = [part.preflight for part in sums_in(matrix)]
            for part, outcome in zip(sums_in(matrix), self._checked, strict=True):
                part.preflight = outcome
            request = check_arguments(matrix.n, **self._solver)
            matrix.check_unchanged()
            with torch.inference_mode(False), torch.no_grad():
                found = follow(matrix, request, self._carried, self._generator, newcomers_every=self.newcomers_every)
            matrix.check_unchanged()
        finally:
            matrix.release()
        values = tuple(found.pairs.eigenvalues.tolist())
        if step is None:
            step = self._records[-1].step + self.every if self._records else 0
        record = Record(
            step=step,
            eigenvalues=values,
            error_bounds=tuple(found.pairs.error_bounds.tolist()),
            converged=bool(found.pairs.converged.all()),
            n_matvec=found.pairs.n_matvec,
            start=found.start,
            why=found.why,
            lr=rate,
            sharpness_lr=None if rate is None else values[0] * rate / 2,
        )
        self._carried = found.carried
        self._records.append(record)
        return found.pairs

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the tracked eigenvalues with their bounds, and of 2 / lr where it is known; PNG if a path is given."""
        from fastsharp.plots import plot_history

        if not self._records:
            raise InputError("plot: the tracker has no record yet. Call update() first.")
        return plot_history(self.history, path)


def _followed(matrix: SymmetricOperator) -> FiniteSum | Composite:
    """The matrix itself, if it can take the weights of later steps."""
    if isinstance(matrix, (FiniteSum, Composite)) and sums_in(matrix):
        return matrix
    raise InputError(
        f"Tracker: operator= built a {type(matrix).__name__}, which does not follow the weights of the model.\n"
        "Let it build an operator of the model, or one made of such."
    )


def _at_least_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"Tracker: {name} is {value!r}, a {type(value).__name__}; expected an int.")
    if value < 1:
        raise InputError(f"Tracker: {name} is {value}, expected at least 1.")


def _rate(lr: Any) -> float | None:
    """The learning rate as a number, None where none was given."""
    if lr is None:
        return None
    if isinstance(lr, torch.optim.Optimizer):
        lr = max(float(group["lr"]) for group in lr.param_groups)
    elif callable(lr):
        lr = lr()
    if isinstance(lr, torch.Tensor) and lr.numel() == 1:
        lr = float(lr)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise ArgumentTypeError(
            f"Tracker: lr is {lr!r}, a {type(lr).__name__}; expected a number, a function that gives one, or an optimizer."
        )
    if not (math.isfinite(lr) and lr >= 0.0):
        raise InputError(f"Tracker: lr is {lr}, expected a finite number >= 0.")
    return float(lr)
