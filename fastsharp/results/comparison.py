"""Comparison: two checkpoints of one architecture on the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsharp.results.estimate import Estimate
from fastsharp.results.report import Report
from fastsharp.results.result import Result

if TYPE_CHECKING:
    import os

    from rich.table import Table


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """How far apart two checkpoints are: in their top eigenspaces, spectra, measures, predictions, and along the line between them.

    Tensors are float64 on the host. `measures` are ratios b / a; an interval holds with the confidence of both reports together.
    """

    a: Report
    b: Report
    k: int  # eigenvectors of the compared spaces
    overlap: float  # ||P_a P_b||_F^2 / k, 1 for one space
    overlap_error: float  # bound, from the residuals and the gap below the k-th eigenvalue; 1 where there is no gap
    angles: torch.Tensor  # (k,) principal angles, radians, ascending
    random_overlap: float  # k / n, of random spaces
    w1: float  # Wasserstein-1 distance of the spectra, in units of the eigenvalues
    w1_bound: float  # of its error, at the confidence below
    w1_confidence: float
    t: torch.Tensor  # (q,) ascending, 0 at a and 1 at b
    losses: torch.Tensor  # (q,) L((1 - t) a + t b)
    barrier: float  # largest height of the loss above the straight line between both ends
    barrier_at: float  # its t
    disagreement: Estimate | None  # share of labels that a and b predict differently; None without classes
    measures: Mapping[str, Estimate]  # b / a
    skipped: Mapping[str, str]  # {measure: why it has no ratio}
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Estimate:
        """The ratio b / a of a measure."""
        if name in self.skipped:
            raise KeyError(f"{name} has no ratio: {self.skipped[name]}")
        return self.measures[name]

    def table(self) -> Table:
        """What separates the two, then one row a measure: a, b, b / a with its interval; rich prints it."""
        from fastsharp.report import comparison_table

        return comparison_table(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib figure of the line, the angles, both spectra and the ratios; written as PNG if a path is given."""
        from fastsharp.report import plot_comparison

        return plot_comparison(self, path)

    def defect(self) -> str:
        if self.t.ndim != 1 or self.t.shape != self.losses.shape:
            return "t and losses differ in length"
        return "" if self.angles.shape == (self.k,) else f"k is {self.k}, and the angles have shape {tuple(self.angles.shape)}"
