"""Named parameters of a module <-> one flat vector: stable order, views, each tied parameter once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from fastsharp.errors import (
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    InferenceTensorError,
    NonFiniteError,
    NoParametersError,
    ParamError,
    PrecisionError,
    listing,
)
from fastsharp.graph_check import quantised

Selector = str | Iterable[str] | Callable[[str, torch.Tensor], bool] | None

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class ParamLayout:
    """Where each named parameter lies in the flat vector of length n."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # len(names) + 1 entries, the last one is n

    @classmethod
    def of(cls, names: Sequence[str], params: Sequence[torch.Tensor]) -> ParamLayout:
        """The layout of these parameters, in this order."""
        offsets = [0]
        for p in params:
            offsets.append(offsets[-1] + p.numel())
        return cls(tuple(names), tuple(tuple(p.shape) for p in params), tuple(offsets))

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a contiguous flat (n,) in the parameters' shapes; they share its memory."""
        bounds = zip(self.offsets, self.offsets[1:], self.shapes, strict=False)
        return [flat[a:b].view(shape) for a, b, shape in bounds]

    def rows(self, V: torch.Tensor) -> list[torch.Tensor]:
        """The parts of rows V (b, n) as (b, *shape), strided views of its memory."""
        bounds = zip(self.offsets, self.offsets[1:], self.shapes, strict=False)
        return [V[:, a:b].view(len(V), *shape) for a, b, shape in bounds]

    def unflatten(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: part of flat in the parameter's shape}; the parts share its memory."""
        return dict(zip(self.names, self.views(flat), strict=True))


@dataclass(frozen=True)
class Selection:
    """The parameters a curvature is taken with respect to, and what was left out."""

    names: tuple[str, ...]
    params: tuple[torch.Tensor, ...]
    layout: ParamLayout
    frozen: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]  # (alias, the name under which it is counted)

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def notes(self) -> list[str]:
        """What a result must say about the choice."""
        notes = []
        if self.frozen:
            notes.append(f"frozen parameters left out: {listing(self.frozen)}")
        if self.tied:
            notes.append("tied parameters counted once: " + listing([f"{alias} = {name}" for alias, name in self.tied]))
        return notes


def select(model: nn.Module, params: Selector = None) -> Selection:
    """The trainable floating-point parameters of `model` that `params` names, each tied one once.

    params   None: all; a glob or exact name (`"layer4.*"`), a list of them, or `f(name, parameter) -> bool`.
             A tied parameter answers to each of its names.
    Frozen parameters are left out; naming one exactly is an error, as is a pattern that matches nothing.
    Raises ParamError, NoParametersError, DtypeError, DeviceError, each with the parameter's name.
    """
    names, aliases = _unique(model)
    if not any(p.is_floating_point() or p.is_complex() for p in names.values()):
        kind = "floating parameters" if names or quantised(model) else "parameters at all"
        advice = (
            "Measure the float model before its conversion." if quantised(model) else "Pass a model with at least one trainable parameter."
        )
        raise NoParametersError(f"{type(model).__name__} has no {kind}. {advice}")
    _check_present(names)
    wanted = _wanted(names, aliases, params)
    frozen = tuple(name for name in wanted if not names[name].requires_grad)
    chosen = [name for name in wanted if names[name].requires_grad]
    if not chosen:
        raise NoParametersError(
            f"none of the {len(wanted)} chosen parameters of {type(model).__name__} is trainable: all have requires_grad=False.\n"
            f"Set requires_grad_(True) on those the curvature is meant for, e.g. {wanted[0]!r}."
        )
    tensors = [names[name] for name in chosen]
    for name, p in zip(chosen, tensors, strict=True):
        _check_one(name, p)
    _check_together(chosen, tensors)
    _check_finite(chosen, tensors)
    tied = tuple((alias, name) for alias, name in aliases.items() if alias != name and name in set(chosen))
    return Selection(tuple(chosen), tuple(tensors), ParamLayout.of(chosen, tensors), frozen, tied)


def again(model: nn.Module, before: Selection) -> Selection:
    """The same parameters by name, as they are now; ParamError where names, shapes, dtype or device are no longer the same."""
    known = set(before.names) | set(before.frozen)
    now = select(model, lambda name, p: name in known)
    if (now.layout, now.dtype, now.device) != (before.layout, before.dtype, before.device):
        raise ParamError(
            "the chosen parameters are no longer those of the operator: names, shapes, requires_grad, dtype or device have changed.\n"
            "Build a new operator."
        )
    return now


def _unique(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """{first name: parameter} and {every name: first name}."""
    first: dict[int, str] = {}
    names: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases[name] = first.setdefault(id(p), name)
        names.setdefault(aliases[name], p)
    return names, aliases


def _wanted(names: dict[str, torch.Tensor], aliases: dict[str, str], params: Selector) -> list[str]:
    if params is None:
        return list(names)
    if callable(params):
        return _nonempty([name for name, p in names.items() if params(name, p)], "the callable params= chose no parameter", names)
    patterns = [params] if isinstance(params, str) else list(params)
    twice = [pattern for i, pattern in enumerate(patterns) if isinstance(pattern, str) and pattern in patterns[:i]]
    if twice:
        raise ParamError(f"params: {twice[0]!r} is listed twice. List each name or glob once; globs may overlap.")
    hits: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(
                f"params: got a {type(pattern).__name__}, expected names or globs as str, a list of them, or a callable."
            )
        matched = [alias for alias in aliases if alias == pattern or fnmatchcase(alias, pattern)]
        _nonempty(matched, f"params: {pattern!r} matches no parameter", names)
        hits.update(aliases[alias] for alias in matched)
        exact = not _GLOB & set(pattern)
        if exact and not names[aliases[pattern]].requires_grad:
            raise ParamError(f"params: {pattern!r} is frozen (requires_grad=False). Unfreeze it with requires_grad_(True) or leave it out.")
    return _nonempty([name for name in names if name in hits], "params: the list is empty", names)


def _nonempty(matched: list[str], complaint: str, names: dict[str, torch.Tensor]) -> list[str]:
    if not matched:
        raise ParamError(f"{complaint}. The model's parameters are {listing(list(names))}.")
    return matched


def _check_present(names: dict[str, torch.Tensor]) -> None:
    """Frozen parameters take part in the forward pass, so that theirs have to be there as well."""
    away = [name for name, p in names.items() if p.is_meta]
    if away:
        raise DeviceError(
            f"on the meta device, without values: {listing([repr(name) for name in away], 4)}.\n"
            "Load the weights first; what accelerate has offloaded comes back with accelerate.hooks.remove_hook_from_submodules(model)."
        )


def _check_one(name: str, p: torch.Tensor) -> None:
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ParamError(f"parameter {name!r} has no shape yet (a lazy module). Run one forward pass first.")
    if p.is_inference():
        raise InferenceTensorError(
            f"parameter {name!r} was created under inference_mode. Rebuild the model outside of it, or clone its parameters."
        )
    if p.is_complex():
        raise DtypeError(f"parameter {name!r} is {p.dtype}; a real symmetric Hessian needs real parameters. Use torch.view_as_real.")
    if p.dtype not in (torch.float32, torch.float64):
        raise PrecisionError(f"parameter {name!r} is {p.dtype}; second derivatives need float32 or float64. Convert with model.float().")


def _check_together(names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
    first = params[0]
    for name, p in zip(names, params, strict=True):
        if p.dtype != first.dtype:
            raise DtypeError(
                f"parameters {names[0]!r} ({first.dtype}) and {name!r} ({p.dtype}) differ in dtype. Convert with model.float() or model.double()."
            )
        if p.device != first.device:
            raise DeviceError(
                f"parameters {names[0]!r} ({first.device}) and {name!r} ({p.device}) are on different devices. Move the model to one device."
            )


def _check_finite(names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
    for name, p in zip(names, params, strict=True):
        if not bool(torch.isfinite(p.detach()).all()):
            raise NonFiniteError(f"parameter {name!r} holds NaN or Inf. Load a checkpoint from before the divergence.")
