"""Spectrum: eigenpairs, density, trace and Frobenius norm of one operator, from one set of products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsharp.results.density import Density
from fastsharp.results.eigenpairs import Eigenpairs
from fastsharp.results.estimate import Estimate
from fastsharp.results.result import Result

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, eq=False)
class Spectrum(Result):
    """What one run tells of a spectrum; every product served all parts that it could."""

    eigenpairs: Eigenpairs  # both ends: the k largest values, then the k smallest, descending
    density: Density  # from the start vector of the same run
    trace: Estimate | None  # None in the `.partial` of a run that ended before it
    frobenius: Estimate | None
    n_matvec: int  # products of the whole run, each counted once
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self, i: int) -> dict[str, torch.Tensor]:
        """Eigenvector i as {parameter name: tensor of the parameter's shape}."""
        return self.eigenpairs.as_dict(i)

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the density; written as PNG if a path is given."""
        return self.density.plot(path)
