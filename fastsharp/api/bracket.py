"""bracket: an interval for lambda_max of a loss Hessian from a random part of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastsharp.api.subject import Operator, checked, kind_of, sums_in
from fastsharp.errors import ArgumentTypeError, InputError, ModelModeError
from fastsharp.krylov.bracket import bracket as krylov_bracket
from fastsharp.krylov.bracket import check_arguments
from fastsharp.losses import BatchLoss
from fastsharp.operator import SymmetricOperator
from fastsharp.params import Selector
from fastsharp.results import Bracket
from fastsharp.samples import Samples


def bracket(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    rtol: float = 0.1,
    confidence: float = 0.9,
    start: int = 256,
    folds: int = 8,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: Operator = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    preflight: str = "fast",
) -> Bracket:
    """lower <= lambda_max(H) <= upper for the Hessian (or Gauss-Newton matrix) H of a mean loss over all samples, from growing random samples.

        result = fastsharp.bracket(model, dataset)
        print(result.lower, result.upper, result.samples)

    model       an nn.Module, evaluated as it stands and left as it was
    loader      a map-style Dataset, or a DataLoader over one: only the samples needed are read. Other iterables of batches are read once,
                within `memory`
    loss_fn     as in `fastsharp.lanczos`, a mean over samples; losses of the whole batch have no samples and are refused
    rtol        stop when half of the interval is at most rtol times its middle
    confidence  that lambda_max lies in the interval, at one sample size
    start       samples at first; doubled until the interval is narrow enough; once that takes more than half of the data, all are taken
    folds       parts of each half of the sample: margins come from their spread
    params, reduction, bn, dropout, operator, backend, memory, preflight: as in `fastsharp.lanczos`
    seed        of the random order of the samples and of the Krylov runs' start vectors

    Returns Bracket. Cost: `n_products` products of one sample, about 25 to 30 times `samples` in all.
    Raises subclasses of FastsharpError; Interrupted on Ctrl-C, with `.partial`. A plain mini-batch lambda_max is biased upwards.
    Source: see `fastsharp.krylov.bracket`.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"bracket: model is a {type(model).__name__}, expected a torch.nn.Module: a matrix has no samples.")
    if loader is None:
        raise InputError("bracket: a model needs data: pass a Dataset, a DataLoader or a list of batches.")
    if isinstance(loss_fn, BatchLoss):
        raise InputError(
            "bracket: a loss of the whole batch is no mean over samples, so parts of a batch say nothing. Use fastsharp.lanczos."
        )
    kind = kind_of(operator)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    samples = Samples(loader, device, memory)
    check_arguments(samples.count, rtol=rtol, confidence=confidence, start=start, folds=folds, seed=seed)
    first: list[SymmetricOperator] = []  # the first one, which watches the weights

    def operator_of(indices: torch.Tensor) -> SymmetricOperator:
        for one in first:
            one.check_unchanged()
        known = sums_in(first[0])[0].objective.reduction if first else reduction
        options: dict[str, Any] = {"params": params, "bn": bn, "dropout": dropout, "backend": backend, "memory": memory, "seed": seed}
        matrix = kind(model, samples.take(indices), loss_fn, reduction=known, **options)
        if not first:
            _check_samples(matrix, model)
            checked(matrix, preflight=preflight, seed=seed)
            first.append(matrix)
        return matrix

    with torch.inference_mode(False), torch.no_grad():
        return krylov_bracket(operator_of, samples.count, rtol=rtol, confidence=confidence, start=start, folds=folds, seed=seed)


def _check_samples(matrix: SymmetricOperator, model: nn.Module) -> None:
    """The matrix must be a mean over samples, each of them a function of the weights alone."""
    sums = sums_in(matrix)
    parts = [part.objective for part in sums]
    if not parts or any(part.model is not model for part in parts):
        raise InputError(
            "bracket: operator= built a matrix that is no mean over samples in the coordinates of the model's parameters.\n"
            "Use fastsharp.lanczos, which takes any symmetric operator."
        )
    whole = next((part.kind for part in sums if not part.by_sample), None)
    if whole is not None:
        raise InputError(
            f"bracket: operator={whole!r} is no mean over samples that is known in part: its draws, or its mean gradient, belong to all data.\n"
            "Use operator='ggn' or 'empirical-fisher', or fastsharp.lanczos."
        )
    if any(part.reduction == "sum" for part in parts):
        raise InputError("bracket: the loss is a sum, which grows with the number of samples. Pass reduction='mean', or a mean loss.")
    if any(part.modes.by_batch() for part in parts):
        raise ModelModeError(
            "bracket: frozen batch statistics and dropout masks depend on how samples are grouped, so parts are other functions.\n"
            "Choose bn='eval' and dropout='eval'."
        )
