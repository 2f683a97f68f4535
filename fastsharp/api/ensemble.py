"""lanczos of many models at once: members of one architecture, each on data of its own, in lockstep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastsharp.api.ensemble_check import check_ensemble
from fastsharp.api.subject import basis_memory, checked, first_steps, operator_of
from fastsharp.curvature import FiniteSum
from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.ensemble import GenericEnsemble, MlpEnsemble
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.krylov.ensemble import lanczos_ensemble, of_member
from fastsharp.krylov.plan import whole_bytes
from fastsharp.krylov.request import check_arguments
from fastsharp.operator import EnsembleOperator
from fastsharp.progress import Progress
from fastsharp.results import Eigenpairs

_NATIVE = ("auto", "mlp")  # backends that one call for all members may stand in for
_SINGLE = (DataLoader, Dataset, Mapping, torch.Tensor)


def is_ensemble(model: Any) -> bool:
    """Whether the first argument of a call means many models: a list, or a tuple that begins with one."""
    return isinstance(model, list) or (isinstance(model, tuple) and bool(model) and isinstance(model[0], nn.Module))


def ensemble_lanczos(
    models: Sequence[nn.Module],
    loaders: Any,
    loss_fn: Any,
    *,
    build: dict[str, Any],
    solve: dict[str, Any],
    memory: str | int,
    progress: bool | None,
    strict_data: bool,
    preflight: str,
) -> list[Eigenpairs]:
    """The eigenpairs of each model's matrix, in order: what `fastsharp.lanczos` gives for it, by products of all members together.

    build   arguments of the operators, solve: of the solver
    """
    data = loaders_of(loaders, _models(models))
    operators: list[FiniteSum] = []
    for e, (model, loader) in enumerate(zip(models, data, strict=True)):
        with of_member(e):
            operator = operator_of(model, loader, loss_fn, preflight=preflight, memory=memory, **build)
        assert isinstance(operator, FiniteSum)
        operators.append(operator)
    first = operators[0]
    request = check_arguments(first.n, **{name: value for name, value in solve.items() if name != "v0"})
    with first_steps(), torch.inference_mode(False):
        together = _together(operators, build["backend"])
        native = isinstance(together, MlpEnsemble)
        if isinstance(together, MlpEnsemble) and preflight == "fast":
            check_ensemble(together, operators, data, strict_data=strict_data, seed=solve["seed"])
        else:
            for e, operator in enumerate(operators):
                with of_member(e):
                    checked(operator, preflight=preflight, strict_data=strict_data, seed=solve["seed"])
    budget: dict[str, Any] = basis_memory(first, memory, len(operators) * whole_bytes(first.n, first.dtype, request))
    shown = Progress(progress)
    with shown, torch.inference_mode(False), torch.no_grad():
        results = lanczos_ensemble(together, operators, check="off", on_step=shown.on_step, **budget, **solve)
    extra: dict[str, Any] = {"ensemble": len(operators)} | ({"backend": "mlp"} if native else {})
    return [dataclasses.replace(result, settings={**result.settings, **extra}) for result in results]


def loaders_of(loaders: Any, E: int) -> list[Any]:
    """One loader a member: `loaders` itself for all of them, or its entries where it is a list of loaders.

    A list of batches is one loader, as for a single model: an entry is a batch where it is a tensor, a mapping, or a tuple or list with
    a tensor in it.
    """
    if loaders is None:
        raise InputError("models need data: pass one loader for all of them, or a list with one for each.")
    if not isinstance(loaders, (list, tuple)):
        one_pass = isinstance(loaders, Iterable) and not isinstance(loaders, _SINGLE)
        return [list(loaders) if one_pass else loaders] * E
    batches = [_is_batch(entry) for entry in loaders]
    if _is_batch(loaders) or (batches and all(batches)):
        return [loaders] * E
    if any(batches):
        raise InputError(
            f"entry {batches.index(True)} of the loaders is a batch, entry {batches.index(False)} a loader.\n"
            "Pass a list of batches for all models, or a list of loaders with one for each: [[batch], [batch], ...]."
        )
    if len(loaders) != E:
        raise InputError(f"{len(loaders)} loaders for {E} models. Pass one loader for all of them, or a list with one for each.")
    return list(loaders)


def _is_batch(entry: Any) -> bool:
    if isinstance(entry, (list, tuple)):
        return any(isinstance(item, torch.Tensor) for item in entry)
    return isinstance(entry, (torch.Tensor, Mapping))


def _models(models: Sequence[Any]) -> int:
    """How many there are, all of them nn.Modules with parameters of the same names and shapes."""
    if not models:
        raise InputError("an ensemble has no members: the list of models is empty.")
    shapes: list[dict[str, Any]] = []
    for e, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"member {e}: a {type(model).__name__}, expected a torch.nn.Module; a list is one of models.")
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters()})
        if shapes[e] != shapes[0]:
            odd = next(name for name in (*shapes[0], *shapes[e]) if shapes[0].get(name) != shapes[e].get(name))
            raise InputError(
                f"member {e}: {odd} has shape {shapes[e].get(odd)}, in member 0 {shapes[0].get(odd)}.\n"
                "The models of one call share an architecture. Measure others by calls of their own."
            )
    return len(models)


def _together(operators: Sequence[FiniteSum], backend: str) -> EnsembleOperator:
    """The operators as one, by the native kernel where it applies."""
    if backend in _NATIVE:
        try:
            return MlpEnsemble(operators)
        except Unavailable:  # member by member the same products, and the same matrices
            pass
    return GenericEnsemble(operators)
