"""Results are frozen, carry their own doubt, and hold no reference to a model, a graph or a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from fastsharp.params import ParamLayout


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """k eigenpairs of a symmetric operator, each with what is known of its error; unpacks as `values, vectors`."""

    eigenvalues: torch.Tensor  # (k,) float64 on the host, descending (by modulus for which="LM")
    eigenvectors: torch.Tensor  # (k, n) rows of unit norm, in the operator's dtype and on its device
    residuals: torch.Tensor  # (k,) float64, ||Hv - lambda v||: true ones if `verified`, else the recurrence's estimate
    error_bounds: torch.Tensor  # (k,) float64 bounds of the values' errors: min(r, r^2/gap) >= 8 eps ||H||; r if the list did not settle
    converged: torch.Tensor  # (k,) bool
    verified: bool  # residuals come from products made for this purpose
    n_matvec: int  # Krylov products
    n_verify: int  # products spent on the true residuals
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    layout: ParamLayout | None = None  # names and shapes behind the n coordinates; None for a plain matrix

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self.eigenvalues
        yield self.eigenvectors

    def __len__(self) -> int:
        return self.eigenvalues.numel()

    def as_dict(self, i: int) -> dict[str, torch.Tensor]:
        """Eigenvector i as {parameter name: tensor of the parameter's shape}."""
        if self.layout is None:
            from fastsharp.errors import InputError

            raise InputError("as_dict: these eigenpairs belong to a plain matrix, not to a model. Use eigenvectors[i].")
        return self.layout.unflatten(self.eigenvectors[i])

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the eigenvalues with their residuals; written as PNG if a path is given."""
        from fastsharp.plots import plot_eigenpairs

        return plot_eigenpairs(self, path)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number known by random probes, with the interval that holds the truth at the stated confidence; `float(result)` is the value."""

    value: float
    stderr: float  # standard error of the value, estimated from the samples of the final stage
    interval: tuple[float, float]  # both ends; chance, quadrature and rounding
    confidence: float  # the share of runs whose interval holds the truth, at least
    samples: int  # probes of the final stage: they alone make the interval; 0 where nothing was left to chance
    n_matvec: int  # products of the whole run: checks, pilots, sketches and the final stage
    converged: bool  # half the interval is within the tolerance asked for
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value
