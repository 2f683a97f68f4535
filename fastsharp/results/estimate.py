"""Estimate: a number known by random probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastsharp.results.result import Result

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Estimate(Result):
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

    @classmethod
    def certain(cls, value: float, interval: tuple[float, float] | None = None, **others: Any) -> Self:
        """One in which nothing was left to chance: `interval`, or the value itself, is sure to hold the truth."""
        return cls(value, 0.0, interval or (value, value), 1.0, **{"samples": 0, "n_matvec": 0, "converged": True, **others})

    def __float__(self) -> float:
        return self.value
