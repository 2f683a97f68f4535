"""Which parameters make a layer: a module's own, a container's, or a group by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from fastsharp.errors import ArgumentTypeError, InputError, ParamError, listing
from fastsharp.params import Selection, Selector, select

Layers = str | Iterable[str] | Mapping[str, Selector] | Callable[[str, nn.Module], bool] | None

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Layer:
    """A group of parameters whose block is meant.

    params   their names, in the model's order
    kind     class of the module, "" for a group by name
    """

    name: str
    kind: str
    params: tuple[str, ...]


def layers_of(model: nn.Module, selection: Selection, layers: Layers = None) -> list[Layer]:
    """The layers among the selected parameters, in the model's order; each parameter belongs to one.

    layers   None: every module with parameters of its own, weight and bias together. Names of modules: a glob picks such modules, an exact
             name a module with all that is below it, as one layer. `f(name, module)` picks such modules. {label: parameters} makes groups by
             parameters' names, as `params=` takes them
    A tied parameter belongs to the module that has it first. Raises InputError, ParamError, ArgumentTypeError.
    """
    if isinstance(layers, Mapping):
        found = [Layer(str(label), "", _among(select(model, chosen).names, selection)) for label, chosen in layers.items()]
        empty = [layer.name for layer in found if not layer.params]
        if empty:
            raise ParamError(f"layers: {listing(empty)} has none of the chosen parameters. Choose them with params=, or leave it out.")
    else:
        found = _modules(model, selection, layers)
    owner: dict[str, str] = {}
    for layer in found:
        for name in layer.params:
            if name in owner:
                raise InputError(
                    f"layers: parameter {name!r} belongs to {owner[name]!r} and to {layer.name!r}. Let each parameter be in one layer."
                )
            owner[name] = layer.name
    if not found:
        raise InputError("layers: none was asked for. Pass layers=None for every module with parameters of its own.")
    return found


def _modules(model: nn.Module, selection: Selection, layers: str | Iterable[str] | Callable[[str, nn.Module], bool] | None) -> list[Layer]:
    modules = dict(model.named_modules())
    own: dict[str, list[str]] = {}
    for name in selection.names:
        own.setdefault(name.rpartition(".")[0], []).append(name)

    def layer(name: str, params: Sequence[str]) -> Layer:
        kind = type(modules[name]).__name__
        return Layer(name or kind, kind, tuple(params))

    if layers is None:
        return [layer(name, params) for name, params in own.items()]
    if callable(layers):
        found = [layer(name, params) for name, params in own.items() if layers(name, modules[name])]
        if not found:
            raise InputError(f"layers: the callable chose no module. Modules with parameters are {listing(list(own))}.")
        return found
    chosen: dict[str, Layer] = {}
    for pattern in [layers] if isinstance(layers, str) else list(layers):
        if not isinstance(pattern, str):
            raise ArgumentTypeError(
                f"layers: got a {type(pattern).__name__}, expected names or globs of modules, a callable, or {{label: parameters}}."
            )
        matched = {name: params for name, params in own.items() if fnmatchcase(name, pattern)}
        if pattern in modules and not _GLOB & set(pattern):
            below = [name for name in selection.names if not pattern or name.startswith(f"{pattern}.")]
            matched = {pattern: below} if below else {}
        if not matched:
            raise InputError(f"layers: {pattern!r} matches no module with chosen parameters. There are {listing(list(own))}.")
        chosen.update((name, layer(name, params)) for name, params in matched.items())
    order = {name: i for i, name in enumerate(selection.names)}
    return sorted(chosen.values(), key=lambda found: order[found.params[0]])


def _among(names: Iterable[str], selection: Selection) -> tuple[str, ...]:
    return tuple(name for name in selection.names if name in set(names))
