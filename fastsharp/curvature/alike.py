"""Is a model built like another one, module by module, and do classes and attributes alone say what it computes?

Torch's own layers without hooks are functions of their input, their weights and the few attributes that are compared here. What a tree
of them computes is then known from another tree like it, so that a list of such models is recognised by recording the first.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.plain import own_ways

_OF_ALL = frozenset(vars(nn.Module()))  # attributes of every module
_PLAIN = (int, float, str, bool, type(None))

Held = tuple[dict[str, Any], str, nn.Parameter]  # where a model keeps a parameter: holder[name] is the parameter


def alike(model: nn.Module, other: nn.Module) -> tuple[list[Held], bool]:
    """The parameters of `other`, in the order of `named_parameters`, and whether class and attributes say that it computes as `model` does.

    Unavailable where modules, modes, or the parameters' shapes, dtypes, devices or requires_grad differ, where parameters are tied, or
    where there are buffers.
    """
    held: list[Held] = []
    known = _compare(model, other, "", held)
    if len({id(p) for _, _, p in held}) != len(held):
        raise Unavailable("parameters are tied")
    return held, known


def _compare(model: nn.Module, other: nn.Module, path: str, held: list[Held]) -> bool:
    mine, theirs = vars(model), vars(other)
    kind = type(model)
    if type(other) is not kind or mine["training"] != theirs["training"]:
        modes = ["eval", "training"]
        raise Unavailable(
            f"{path or 'the model'} is {type(other).__name__} in {modes[theirs['training']]} mode, "
            f"in member 0 {kind.__name__} in {modes[mine['training']]} mode"
        )
    if theirs["_buffers"] or mine["_buffers"]:
        raise Unavailable(f"{path or 'the model'} has buffers")
    known = own_ways(other) is None and mine.keys() == theirs.keys() and all(_same(mine, theirs, name) for name in theirs)
    if mine["_parameters"].keys() != theirs["_parameters"].keys() or mine["_modules"].keys() != theirs["_modules"].keys():
        raise Unavailable(f"{path or 'the model'} has other parameters or modules than in member 0")
    for name, p in theirs["_parameters"].items():
        first = mine["_parameters"][name]
        if p is None or first is None:
            if p is not first:
                raise Unavailable(f"{path}{name} is missing")
            continue
        if p.shape != first.shape or p.dtype != first.dtype or p.device != first.device or p.requires_grad != first.requires_grad:
            raise Unavailable(f"{path}{name} is another kind of tensor than in member 0")
        held.append((theirs["_parameters"], name, p))
    for name, child in theirs["_modules"].items():
        first = mine["_modules"][name]
        if child is None or first is None:
            raise Unavailable(f"{path}{name} is no module")
        known = _compare(first, child, f"{path}{name}.", held) and known
    return known


def _same(mine: dict[str, Any], theirs: dict[str, Any], name: str) -> bool:
    return name in _OF_ALL or (isinstance(theirs[name], _PLAIN) and theirs[name] == mine[name])
