"""Two checkpoints of one architecture: a state dict as a model, and what has to be the same in both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, ParamError, ShapeError, listing


def second(a: nn.Module, b: Any) -> nn.Module:
    """b itself, or a copy of a with the state dict b."""
    if isinstance(b, nn.Module):
        return b
    if not isinstance(b, Mapping):
        raise ArgumentTypeError(f"compare: b is a {type(b).__name__}, expected a torch.nn.Module or a state dict.")
    odd = next((name for name, t in b.items() if not isinstance(t, torch.Tensor)), None)
    if odd is not None:
        raise ArgumentTypeError(
            f"compare: {odd!r} in b is a {type(b[odd]).__name__}; a state dict holds tensors by name. Pass checkpoint['state_dict'] or the like."
        )
    own = a.state_dict()
    _same_names(own, b, "the state dict b", ParamError)
    for name, t in own.items():
        if t.shape != b[name].shape:
            raise ShapeError(f"compare: {name!r} has shape {tuple(t.shape)} in a and {tuple(b[name].shape)} in the state dict b.")
        if t.dtype != b[name].dtype:
            raise DtypeError(f"compare: {name!r} is {t.dtype} in a and {b[name].dtype} in the state dict b. Convert one of them.")
    try:
        model = copy.deepcopy(a)
    except Exception as e:
        raise InputError(
            f"compare: a ({type(a).__name__}) cannot be copied to take the state dict ({type(e).__name__}: {e}). Pass b as a model."
        ) from e
    model.load_state_dict(b)
    return model


def must_match(a: nn.Module, b: nn.Module) -> None:
    """One architecture: the same modules, and parameters and buffers of the same names, shapes, dtypes and devices; the first that differs is named."""
    mine, yours = dict(a.named_modules()), dict(b.named_modules())
    _same_names(mine, yours, "b", InputError)
    for name, m in mine.items():
        if type(m) is not type(yours[name]):
            raise InputError(
                f"compare: {name or 'the model itself'!r} is a {type(m).__name__} in a and a {type(yours[name]).__name__} in b: two architectures.\n"
                "Compare checkpoints of one."
            )
        if m.training != yours[name].training:
            raise InputError(
                f"compare: {name or 'the model itself'!r} is in train mode in one of a, b, and not in the other. Call eval() on both."
            )
    _same_names(dict(a.named_parameters()), dict(b.named_parameters()), "b", ParamError)
    of_b = dict(b.named_parameters()) | dict(b.named_buffers())
    of_a = dict(a.named_parameters()) | dict(a.named_buffers())
    _same_names(of_a, of_b, "b", ParamError)
    for name, t in of_a.items():
        u = of_b[name]
        if t.shape != u.shape:
            raise ShapeError(
                f"compare: {name!r} has shape {tuple(t.shape)} in a and {tuple(u.shape)} in b. Compare checkpoints of one architecture."
            )
        if t.dtype != u.dtype:
            raise DtypeError(f"compare: {name!r} is {t.dtype} in a and {u.dtype} in b. Convert one of them.")
        if t.device != u.device:
            raise DeviceError(f"compare: {name!r} is on {t.device} in a and on {u.device} in b. Move both to one device.")


def _same_names(a: Mapping[str, Any], b: Mapping[str, Any], what: str, error: type[InputError]) -> None:
    missing, more = [repr(n) for n in a if n not in b], [repr(n) for n in b if n not in a]
    if missing or more:
        parts = [f"{listing(missing, 3)} of a missing in {what}"] * bool(missing) + [f"{listing(more, 3)} in {what} unknown to a"] * bool(
            more
        )
        raise error(f"compare: a and b are not of one architecture: {'; '.join(parts)}.")
