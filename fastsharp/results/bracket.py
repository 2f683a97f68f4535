"""Bracket: an interval for the top eigenvalue from a part of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsharp.results.result import Result


@dataclass(frozen=True, eq=False)
class Bracket(Result):
    """An interval for lambda_max of a loss over all samples from a random part of them; `float()` gives its middle."""

    lower: float
    upper: float
    value: float  # the middle of lower and upper
    confidence: float  # that lambda_max lies inside, at one sample size
    samples: int  # in the last sample
    total: int  # samples there are
    n_products: int  # in products of one sample: a Hessian-vector product over all data is `total` of them
    history: tuple[tuple[int, float, float], ...]  # (samples, lower, upper) of each size tried
    converged: bool  # (upper - lower)/2 <= rtol |value|
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value
