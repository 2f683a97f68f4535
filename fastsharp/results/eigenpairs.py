"""Eigenpairs: what a Lanczos run returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastsharp.params import ParamLayout
from fastsharp.results.result import Result

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, eq=False)
class Eigenpairs(Result, version=2):
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
    not_promised: ClassVar[tuple[str, ...]] = (
        "all copies of a multiple eigenvalue",
        "interior eigenvalues",
        "a second derivative at a kink of ReLU or max-pooling",
        "the same bits on another machine, another torch version, or on CPU and GPU",
    )

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
        if self.eigenvectors.is_meta:
            from fastsharp.errors import InputError

            raise InputError(
                "as_dict: the file that these eigenpairs come from has no vectors. Save as .npz or .safetensors, or large=True."
            )
        return self.layout.unflatten(self.eigenvectors[i])

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the eigenvalues with their residuals; written as PNG if a path is given."""
        from fastsharp.plots import plot_eigenpairs

        return plot_eigenpairs(self, path)

    def defect(self) -> str:
        k = self.eigenvalues.shape
        if len(k) != 1 or not all(t.shape == k for t in (self.residuals, self.error_bounds, self.converged)):
            return "values, residuals, bounds and flags differ in length"
        if self.eigenvectors.ndim != 2 or self.eigenvectors.shape[:1] != k:
            return f"{k[0]} values, and vectors of shape {tuple(self.eigenvectors.shape)}"
        sizes = () if self.layout is None else tuple(math.prod(shape) for shape in self.layout.shapes)
        steps = () if self.layout is None else tuple(b - a for a, b in pairwise((0, *self.layout.offsets[1:])))
        if self.layout is not None and (
            sizes != steps or len(sizes) != len(self.layout.names) or self.layout.n != self.eigenvectors.shape[1]
        ):
            return "the layout of the parameters is not that of the vectors"
        return ""
