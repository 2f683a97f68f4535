"""Report: everything that one call measured of a model, and how it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsharp.results.estimate import Estimate
from fastsharp.results.layer_spectra import LayerSpectra
from fastsharp.results.result import Result
from fastsharp.results.spectrum import Spectrum

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from rich.table import Table


@dataclass(frozen=True, eq=False)
class Landscape2D(Result):
    """The loss around the weights: along eigenvectors, and on a plane of two filter-normalised random directions."""

    loss: float  # L(theta)
    steps: torch.Tensor  # (q,) lengths along an eigenvector
    lines: torch.Tensor  # (k, q) L(theta + s x_i) - L(theta)
    curvatures: torch.Tensor  # (k,) lambda_i: the parabola lambda s^2 / 2 goes beside the line
    slopes: torch.Tensor  # (k,) g'x_i
    axis: torch.Tensor  # (g,) coordinates on the plane, in units of the filters' norms; empty where no plane was asked for
    plane: torch.Tensor  # (g, g) L - L(theta) there, first direction down the rows


@dataclass(frozen=True, eq=False)
class Report(Result):
    """Every measure with its error, the spectrum that many of them come from, and what could not be measured and why.

    measures     {name: Estimate}
    groups       {name: what it is a measure of}: "curvature", "gauss-newton", "perturbation", "trajectory", "function"
    skipped      {name: reason}
    spectrum     of the Hessian
    layers       top eigenvalue and trace of each layer's diagonal block; None where they were not asked for
    landscape    None where the part was left out
    cost         products, gradients, forward passes over the data, and seconds by part
    """

    measures: Mapping[str, Estimate]
    groups: Mapping[str, str]
    skipped: Mapping[str, str]
    spectrum: Spectrum
    layers: LayerSpectra | None
    landscape: Landscape2D | None
    cost: Mapping[str, float]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Estimate:
        if name in self.skipped:
            raise KeyError(f"{name} was not measured: {self.skipped[name]}")
        if name not in self.measures:
            raise KeyError(f"there is no measure {name!r} in this report; there are {', '.join(self.measures)}")
        return self.measures[name]

    def table(self) -> Table:
        """One row a measure: value, interval, group; rich prints it."""
        from fastsharp.report import report_table

        return report_table(self)

    def plot(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every figure of the report as PNG into `folder`; -> their paths."""
        from fastsharp.report import write_figures

        return write_figures(self, folder)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page: table, figures and notes; nothing is loaded from elsewhere. -> path."""
        from fastsharp.report import write_html

        return write_html(self, path)
