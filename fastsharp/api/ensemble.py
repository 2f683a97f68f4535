"""lanczos of many models at once: members of one architecture, each on data of its own, in lockstep."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastsharp.api.ensemble_check import check_ensemble
from fastsharp.api.subject import basis_memory, checked, first_steps, operator_of
from fastsharp.batches import Batches, Budget
from fastsharp.composite import name_of
from fastsharp.curvature import FiniteSum
from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.ensemble import GenericEnsemble, MlpEnsemble
from fastsharp.errors import ArgumentTypeError, InputError, listing, of_member
from fastsharp.krylov.ensemble import lanczos_ensemble
from fastsharp.krylov.plan import whole_bytes
from fastsharp.krylov.request import check_arguments
from fastsharp.progress import Progress
from fastsharp.results import Eigenpairs

_NATIVE = ("auto", "mlp")  # backends that one call for all members may stand in for
_SINGLE = (DataLoader, Dataset, Mapping, torch.Tensor)


def is_ensemble(model: Any) -> bool:
    """Whether the first argument of a call means many models: a list, a tuple that begins with one, or (template, stacked parameters)."""
    return isinstance(model, list) or (isinstance(model, tuple) and bool(model) and isinstance(model[0], nn.Module))


def ensemble_lanczos(
    models: Any,
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
    models = members_of(models)
    data = loaders_of(loaders, _models(models))

    def alone(e: int, **options: Any) -> FiniteSum:
        with of_member(e):
            operator = operator_of(models[e], data[e], loss_fn, preflight=preflight, memory=memory, **{**build, **options})
        if not isinstance(operator, FiniteSum):
            raise InputError(
                f"a list of models: {name_of(operator)} is made of other operators, which are not multiplied together for many models.\n"
                "Measure each model by a call, or pass operator='hessian' or another single operator."
            )
        return operator

    with first_steps(), torch.inference_mode(False):
        together = _together(alone, models, data, memory, build)
        request = check_arguments(together.n, **{name: value for name, value in solve.items() if name != "v0"}, check="off")
        if isinstance(together, MlpEnsemble):
            first = together.first
            if preflight == "fast":
                check_ensemble(together, lambda e: alone(e, backend="mlp"), strict_data=strict_data, seed=solve["seed"])
            elif preflight == "full":
                together.preflight = [_checked(alone(e, backend="mlp"), e, "full", strict_data, solve["seed"]) for e in range(together.E)]
        else:
            first = together.member(0)
            for e in range(together.E):
                _checked(together.member(e), e, preflight, strict_data, solve["seed"])
    budget: dict[str, Any] = basis_memory(first, memory, together.E * whole_bytes(together.n, together.dtype, request))
    shown = Progress(progress)
    with shown, torch.inference_mode(False), torch.no_grad():
        results = lanczos_ensemble(together, request, v0=solve["v0"], on_step=shown.on_step, **budget)
    return [dataclasses.replace(result, settings={**result.settings, "ensemble": together.E}) for result in results]


def _together(
    alone: Callable[..., FiniteSum], models: Sequence[nn.Module], data: Sequence[Any], memory: str | int, build: dict[str, Any]
) -> MlpEnsemble | GenericEnsemble:
    """The members as one operator: by the native kernel where it applies, else one after the other."""
    if build["backend"] in _NATIVE and not callable(build["params"]):  # a callable may choose by values
        first = alone(0, backend="mlp")
        budget = Budget.of(memory, first.device).total // 2 // len(models)
        batches = [first.objective.batches]
        with contextlib.suppress(Unavailable):  # then the same matrices, member by member
            for e in range(1, len(models)):
                with of_member(e):
                    batches.append(batches[0] if data[e] is data[0] else Batches(data[e], first.device, budget))
            return MlpEnsemble(first, models, batches)
    return GenericEnsemble([alone(e) for e in range(len(models))])


def _checked(operator: FiniteSum, e: int, level: str, strict_data: bool, seed: int) -> dict[str, Any]:
    """The outcome of the preflight of member e by itself."""
    with of_member(e):
        checked(operator, preflight=level, strict_data=strict_data, seed=seed)
    return operator.preflight


def members_of(models: Any) -> Sequence[nn.Module]:
    """The models themselves, or copies of a template with the parameters of (template, {name: (E, *shape)}) as `stack_module_state` has them."""
    if not (isinstance(models, tuple) and len(models) == 2 and isinstance(models[1], Mapping)):
        return models  # type: ignore[no-any-return]
    template, stacked = models
    wanted = {name: t for name, t in (*template.named_parameters(), *template.named_buffers())}
    sizes = {t.shape[0] if isinstance(t, torch.Tensor) and t.ndim else -1 for t in stacked.values()}
    if stacked.keys() != wanted.keys() or len(sizes) != 1 or -1 in sizes:
        odd = sorted(stacked.keys() ^ wanted.keys())
        raise InputError(
            f"(template, stacked): {'unknown or missing: ' + listing(odd) if odd else 'tensors of unlike first dimensions'}.\n"
            "Pass one tensor (members, *shape) for each parameter and buffer: params, buffers = torch.func.stack_module_state(models)."
        )
    members = []
    for e in range(sizes.pop()):
        member = copy.deepcopy(template)
        with torch.no_grad():
            for name, t in (*member.named_parameters(), *member.named_buffers()):
                if stacked[name].shape[1:] != t.shape or stacked[name].dtype != t.dtype:
                    raise InputError(
                        f"(template, stacked): {name} is {stacked[name].dtype} {tuple(stacked[name].shape)}, "
                        f"expected {t.dtype} (members, {', '.join(map(str, t.shape))}) as in the template."
                    )
                t.copy_(stacked[name][e])
        members.append(member)
    return members


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
    each = [list(entry) if isinstance(entry, Iterator) else entry for entry in loaders]  # one may be read more than once
    batches = [_is_batch(entry) for entry in each]
    if _is_batch(loaders) or (batches and all(batches)):
        return [loaders] * E
    if any(batches):
        raise InputError(
            f"entry {batches.index(True)} of the loaders is a batch, entry {batches.index(False)} a loader.\n"
            "Pass a list of batches for all models, or a list of loaders with one for each: [[batch], [batch], ...]."
        )
    if len(each) != E:
        raise InputError(f"{len(each)} loaders for {E} models. Pass one loader for all of them, or a list with one for each.")
    return each


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
