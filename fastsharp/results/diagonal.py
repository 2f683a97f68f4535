"""DiagonalEstimate: a number for each coordinate, known by random probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsharp.params import ParamLayout
from fastsharp.results.result import Result


@dataclass(frozen=True, eq=False)
class DiagonalEstimate(Result):
    """The diagonal of a symmetric operator, or the norms of its rows, entry by entry with standard errors."""

    value: torch.Tensor  # (n,) float64 on the operator's device
    stderr: torch.Tensor  # (n,) float64: standard error of each entry, chance and rounding
    spread: tuple[float, float]  # the interval of an entry is value + spread * stderr
    confidence: float  # the share of entries whose interval holds the truth, one at a time, on average over seeds
    samples: int  # probes; 0 where nothing was left to chance
    n_matvec: int  # products, those of checks included
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    layout: ParamLayout | None = None  # names and shapes behind the n coordinates; None for a plain matrix

    def __len__(self) -> int:
        return self.value.numel()

    @property
    def interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ends, (n,) each: one entry's interval holds it at `confidence`; all of them together hold less often."""
        return self.value + self.spread[0] * self.stderr, self.value + self.spread[1] * self.stderr

    def as_dict(self) -> dict[str, torch.Tensor]:
        """The values as {parameter name: tensor of the parameter's shape}."""
        return self._layout("as_dict").unflatten(self.value)

    def stderr_dict(self) -> dict[str, torch.Tensor]:
        """The standard errors as {parameter name: tensor of the parameter's shape}."""
        return self._layout("stderr_dict").unflatten(self.stderr)

    def sums(self) -> dict[str, float]:
        """{parameter name: sum of its values}: of a diagonal, the trace of the parameter's block.

        Entries share their probes, so that their errors are not independent: no standard error follows from theirs.
        """
        return {name: float(part.sum()) for name, part in self._layout("sums").unflatten(self.value).items()}

    def _layout(self, call: str) -> ParamLayout:
        if self.layout is None:
            from fastsharp.errors import InputError

            raise InputError(f"{call}: this estimate belongs to a plain matrix, not to a model. Use .value and .stderr.")
        return self.layout
