"""Means over samples with their standard errors: how the per-sample measures become results.

The samples are taken as drawn independently from a population, and the interval is for that population's value; the value itself is exact
for the data at hand. Units of one example (the tokens of a sequence) are not independent, so errors are summed by example first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fastsharp.errors import InputError
from fastsharp.quantiles import normal, student
from fastsharp.results import Estimate

_PIECE = 1 << 16  # numbers
_STUDENT = 5  # degrees of freedom from which the expansion of Student's quantile holds


@dataclass(frozen=True, eq=False)
class SampleEstimate(Estimate):
    """An Estimate that is a function of a mean over samples, with the samples' own values.

    stderr, interval   for the population that the samples were drawn from: the value is exact for these samples
    samples            examples in the data
    n_matvec           Hessian products used; 0 where none was
    """

    per_sample: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))  # (units,) float64, host


def check_confidence(name: str, confidence: float) -> None:
    """InputError where `confidence` is no share between 0.5 and 0.999."""
    if not isinstance(confidence, float) or not 0.5 <= confidence <= 0.999:
        raise InputError(f"{name}: confidence is {confidence!r}, expected a share between 0.5 and 0.999, such as 0.95.")


class Samples:
    """Values of units, their weights and the examples they belong to, batch by batch; kept in float64 on the host."""

    def __init__(self) -> None:
        self._values: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._owners: list[torch.Tensor] = []

    def add(self, values: torch.Tensor, weights: torch.Tensor, owners: torch.Tensor) -> None:
        """Values (u,) of units, their weights (u,), and the number of each unit's example in the data (u,)."""
        self._values.append(values.detach().double().cpu())
        self._weights.append(weights.detach().double().cpu())
        self._owners.append(owners.detach().cpu())

    def require_any(self) -> None:
        """InputError where no unit counts."""
        if not float(self.weights.sum()) > 0:
            raise InputError(
                "no sample has a label that counts: every label is ignored, or has weight 0. Check ignore_index and the class weights."
            )

    @property
    def values(self) -> torch.Tensor:
        """(units,) float64."""
        return torch.cat(self._values)

    @property
    def weights(self) -> torch.Tensor:
        """(units,) float64."""
        return torch.cat(self._weights)

    @property
    def owners(self) -> torch.Tensor:
        """(units,) int64."""
        return torch.cat(self._owners)

    @property
    def examples(self) -> int:
        """Examples with a unit."""
        return examples_of(self.owners)

    def mean(self, confidence: float, *, of: torch.Tensor | None = None, shown: torch.Tensor | None = None) -> SampleEstimate:
        """sum w s / sum w; `of` replaces the values s, `shown` what `per_sample` holds."""
        self.require_any()
        values = self.values if of is None else of
        value, stderr, examples = ratio(values, self.weights, self.owners)
        half = quantile(confidence, examples) * stderr
        return SampleEstimate(
            value=value,
            stderr=stderr,
            interval=(value - half, value + half),
            confidence=confidence,
            samples=examples,
            n_matvec=0,
            converged=True,
            per_sample=values if shown is None else shown,
        )

    def root_mean_square(self, confidence: float, factor: float = 1.0) -> SampleEstimate:
        """factor sqrt(sum w s^2 / sum w); the interval is that of the mean square, its root taken at both ends."""
        return rooted(self.mean(confidence, of=self.values.square(), shown=self.values * factor), factor)


def ratio(values: torch.Tensor, weights: torch.Tensor, owners: torch.Tensor) -> tuple[float, float, int]:
    """(sum w s / sum w, its standard error, examples): errors are summed by example, then squared.

    Source: the linearised ratio estimator, Cochran, Sampling Techniques (1977), section 6.
    """
    total = float(weights.sum())
    value = float((weights * values).sum()) / total
    errors = torch.zeros(int(owners.max()) + 1, dtype=torch.float64).index_add_(0, owners, weights * (values - value))
    n = examples_of(owners)
    if n == 1:
        return value, math.inf, n
    return value, math.sqrt(n / (n - 1) * float(errors.square().sum())) / total, n


def examples_of(owners: torch.Tensor) -> int:
    """How many examples own a unit."""
    return int((owners.bincount() > 0).sum())


def quantile(confidence: float, examples: int) -> float:
    """Standard errors to either side of a mean: Student's where that many examples allow it, the normal law's for fewer than six."""
    p = (1 + confidence) / 2
    return student(p, examples - 1) if examples > _STUDENT else normal(p)


def rooted(square: SampleEstimate, factor: float) -> SampleEstimate:
    """factor sqrt(m) for an estimate of m >= 0, by the delta method; its interval by the same map of both ends."""
    root = math.sqrt(max(square.value, 0.0))
    if root:
        stderr = square.stderr / (2 * root)
    else:
        stderr = 0.0 if math.isfinite(square.stderr) else math.inf
    lo, hi = (factor * math.sqrt(max(end, 0.0)) for end in square.interval)
    return SampleEstimate(
        value=factor * root,
        stderr=factor * stderr,
        interval=(lo, hi),
        confidence=square.confidence,
        samples=square.samples,
        n_matvec=square.n_matvec,
        converged=square.converged,
        notes=square.notes,
        per_sample=square.per_sample,
    )


def pieces(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows in pieces whose temporaries stay in a CPU's cache: one pass over memory, and no fresh pages."""
    if rows.device.type != "cpu":
        return (rows,)
    return torch.split(rows, max(1, _PIECE // max(1, rows.shape[1])))


class Moments:
    """Standard deviations, ddof 0, of the columns of rows that come in pieces; float64, by one pass."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Rows (r, m)."""
        if rows.shape[0] == 0:
            return
        if self._count == 0:
            self._shift = rows[0].double()
            self._total, self._squares = torch.zeros_like(self._shift), torch.zeros_like(self._shift)
        self._count += rows.shape[0]
        for piece in pieces(rows):
            away = piece.double() - self._shift  # a constant column is exactly zero here
            self._total += away.sum(0)
            self._squares += away.square_().sum(0)

    def deviations(self) -> torch.Tensor:
        """(m,) float64; 1 where a column is constant."""
        variance = self._squares / self._count - (self._total / self._count).square()
        tiny = torch.finfo(torch.float64).tiny
        return torch.where(self._squares == 0, torch.ones_like(variance), variance.clamp_min(tiny).sqrt())
