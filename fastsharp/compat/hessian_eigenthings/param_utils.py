"""Filters of parameters by name, and parameters as one flat vector."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from fastsharp.errors import ShapeError
from fastsharp.params import ParamLayout, select

ParamFilter = Callable[[str, torch.Tensor], bool]


def match_names(*patterns: str) -> ParamFilter:
    """A filter for names that match one of the globs, in upper and lower case as given."""
    return lambda name, _: any(fnmatch.fnmatchcase(name, p) for p in patterns)


def match_regex(*patterns: str) -> ParamFilter:
    """A filter for names in which one of the regular expressions is found."""
    compiled = [re.compile(p) for p in patterns]
    return lambda name, _: any(p.search(name) for p in compiled)


def select_parameters(model: nn.Module, param_filter: ParamFilter | None = None) -> dict[str, torch.Tensor]:
    """{name: parameter} of the trainable parameters that the filter takes, each tied one once. Raises what `params=` raises."""
    chosen = select(model, param_filter)
    return dict(zip(chosen.names, chosen.params, strict=True))


def params_to_vector(params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensors as one flat vector, in their order."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def vector_to_params(vec: torch.Tensor, reference: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A flat vector cut into tensors of the names and shapes of `reference`; they share its memory. Raises ShapeError."""
    layout = ParamLayout.of(list(reference), list(reference.values()))
    if vec.shape != (layout.n,):
        raise ShapeError(f"vector_to_params: the vector has shape {tuple(vec.shape)}, the reference holds ({layout.n},).")
    return layout.unflatten(vec.contiguous())
