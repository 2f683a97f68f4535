"""Invariance: which measures move when the weights are rescaled and the decisions stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsharp.results.result import Result

if TYPE_CHECKING:
    import os

    from rich.table import Table


@dataclass(frozen=True, eq=False)
class Invariance(Result):
    """Each measure at the weights as they are, and after each rescaling that leaves the decisions of the network as they are.

    All tensors are float64 on the host; nan where a measure has no value there. A row is a rescaling, a column a measure.
    """

    measures: tuple[str, ...]  # (m,)
    rescalings: tuple[str, ...]  # (r,) measured ones: "0 x 4, 2 / 4", "temperature 2"
    kinds: tuple[str, ...]  # (r,) "layers" or "temperature"
    base: torch.Tensor  # (m,) values at the weights as they are
    values: torch.Tensor  # (r, m) after the rescaling
    errors: torch.Tensor  # (r, m) >= 0: a change of no more than this is not told from none
    outputs: torch.Tensor  # (r,) largest change of an output (of T times a logit), over the largest output
    applicable: tuple[str, ...]  # every rescaling found, measured or not
    refused: Mapping[str, str]  # {"A -> B" or "temperature": why the decisions would not stay}
    skipped: Mapping[str, str]  # {measure: why it has no value}
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> torch.Tensor:
        """(r, m) value after over value before; nan where that is 0."""
        return torch.where(self.base == 0, torch.nan, self.values / self.base)

    @property
    def moved(self) -> torch.Tensor:
        """(r, m) bool: the change is larger than its error."""
        return (self.values - self.base).abs() > self.errors

    def survives(self, measure: str, kind: str) -> bool | None:
        """Whether a measure stayed within its error under every rescaling of a kind, "layers" or "temperature"; None where none was measured.

        Raises InputError for a measure or kind that is not there.
        """
        from fastsharp.errors import InputError

        if measure not in self.measures or kind not in ("layers", "temperature"):
            raise InputError(
                f"survives: {measure!r}, {kind!r}: measures are {', '.join(self.measures)}, kinds are 'layers' and 'temperature'."
            )
        column = self.measures.index(measure)
        rows = [i for i, k in enumerate(self.kinds) if k == kind and bool(self.values[i, column].isfinite())]
        return None if not rows else not bool(self.moved[rows, column].any())

    def table(self) -> Table:
        """One row a measure, one column a rescaling: the ratio, or "stays"; rich prints it."""
        from fastsharp.report import invariance_table

        return invariance_table(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib figure of the ratios; written as PNG if a path is given."""
        from fastsharp.report import plot_invariance

        return plot_invariance(self, path)

    def defect(self) -> str:
        r, m = len(self.rescalings), len(self.measures)
        if len(self.kinds) != r or self.outputs.shape != (r,) or self.base.shape != (m,):
            return "rescalings, kinds, outputs, measures and values differ in length"
        return "" if self.values.shape == self.errors.shape == (r, m) else "values and errors are not one a rescaling and measure"
