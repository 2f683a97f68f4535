"""How many samples, and what interval: pilot stages choose the size of a final stage, and only that one speaks.

Note on numerical properties
----------------------------
*Optional stopping.* An interval read at the moment when it first became narrow enough is too narrow: a small sample variance ends the
run. Here a final stage has its size fixed before its first sample, and its samples are new. Should it miss the target all the
same, a further stage of new samples follows, at a smaller error rate: 0.8, 0.16, 0.032, ... of the whole, so that all the
intervals that could have been returned hold together with the stated confidence (union bound).
*Variance.* For Rademacher z and y = z o Bz, the sample z'Bz is the sum of the entries of y, and its variance is twice the
off-diagonal part of ||B||_F^2, which is twice the sum of the variances of the entries of y. So 2 sum_i s_i^2(y) is unbiased for it,
free of further products, exactly zero for diagonal B, and far steadier than the variance of a few values of z'Bz: those are
skewed where one eigenvalue rules, and small samples of skewed values give short intervals on the wrong side (16 samples of a
matrix of rank one: 89 % coverage of a nominal 95 % from the samples' own variance, 96 % from this one).
*Width.* Student's t with N - 1 degrees of freedom covers what noise is left in the variance. With N >= 16 and the error rate of the
first stage its quantile is 2.25, 1.15 of the normal 1.96 that a known variance would allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastsharp import quantiles

BLOCK = 8  # probes that share one block product, and within which variances are taken
MIN_FINAL = 16
_FIRST_STAGE, _NEXT_STAGE = 0.8, 0.2  # of the error rate: first stage, and each further one relative to the one before
_GROWTH = 16  # a stage is at most so many times as long as the samples that planned it


@dataclass(frozen=True)
class Drawn:
    """One block of samples: their values, the variance of one, and the energy of the operator seen by one."""

    values: torch.Tensor  # (b,) float64 on the host, unbiased for the unknown part
    variance: float  # unbiased for the variance of one value
    energy: float  # mean of ||Bz||^2, unbiased for ||B||_F^2
    doubt: float = 0.0  # what the values may be off by besides chance


@dataclass
class Samples:
    """The blocks of one stage."""

    blocks: list[Drawn] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(b.values.numel() for b in self.blocks)

    @property
    def mean(self) -> float:
        return sum(float(b.values.sum()) for b in self.blocks) / len(self)

    @property
    def variance(self) -> float:
        return sum(b.variance * b.values.numel() for b in self.blocks) / len(self)

    @property
    def energy(self) -> float:
        return sum(b.energy * b.values.numel() for b in self.blocks) / max(len(self), 1)

    @property
    def doubt(self) -> float:
        return sum(b.doubt * b.values.numel() for b in self.blocks) / max(len(self), 1)


@dataclass(frozen=True)
class Interval:
    """A value with its standard error and the two ends of its interval."""

    value: float
    stderr: float
    lo: float
    hi: float

    @property
    def half(self) -> float:
        return (self.hi - self.lo) / 2

    def widened(self, by: float) -> Interval:
        return Interval(self.value, self.stderr, self.lo - by, self.hi + by)


Law = Callable[[float, float, float, int, float], Interval]  # known part, mean, variance of one sample, samples, error rate


def linear(known: float, mean: float, variance: float, count: int, rate: float) -> Interval:
    """known + mean, mean +- t sqrt(variance / count)."""
    stderr = math.sqrt(variance / count)
    half = quantiles.student(1 - rate / 2, count - 1) * stderr
    return Interval(known + mean, stderr, known + mean - half, known + mean + half)


def roots(known: float, mean: float, variance: float, count: int, rate: float) -> Interval:
    """sqrt(known + mean) for a mean of positive quadratic forms: a chi-square with the dof of the first two moments (Satterthwaite)."""
    value = math.sqrt(known + mean)
    if not variance > 0.0 or not mean > 0.0:
        return Interval(value, 0.0, value, value)
    dof = 2 * count * mean * (mean / variance)
    lo = known + mean / quantiles.chi_square_over_dof(1 - rate / 2, dof)
    hi = known + mean / max(quantiles.chi_square_over_dof(rate / 2, dof), 1e-3)
    return Interval(value, math.sqrt(variance / count) / (2 * value), math.sqrt(lo), math.sqrt(hi))


def error_rate(confidence: float, stage: int) -> float:
    """The share of 1 - confidence that final stage number `stage` (from 0) may spend; the shares sum to it."""
    return (1 - confidence) * _FIRST_STAGE * _NEXT_STAGE**stage


@dataclass(frozen=True)
class Target:
    """Half-width wanted: max(rtol |value|, atol)."""

    rtol: float
    atol: float | None  # None: rtol ||H||_F
    confidence: float

    def half(self, value: float, norm: float) -> float:
        return max(self.rtol * abs(value), self.rtol * norm if self.atol is None else self.atol)

    def by_floor(self, value: float, norm: float) -> bool:
        """Whether the absolute part is the larger one."""
        return self.half(value, norm) > self.rtol * abs(value)


def size(law: Law, known: float, seen: Samples, target: float, rate: float, least: int) -> int:
    """Samples that bring the half-width to `target`: a multiple of BLOCK, at least `least`.

    The variance seen is taken 1 + 1 / sqrt(samples) larger, since the next stage may see a larger one.
    """
    variance = seen.variance * (1 + 1 / math.sqrt(len(seen)))
    count = least
    for _ in range(4):  # the half-width falls a little faster than 1 / sqrt(count), so that this approaches from below
        half = law(known, seen.mean, variance, count, rate).half
        if half <= target:
            break
        ratio = half / target if target > 0.0 else math.inf
        count = BLOCK * math.ceil(min(count * min(ratio, 1e9) ** 2, 1e15) / BLOCK)
    return count


def longest(seen: Samples) -> int:
    """Samples of the longest stage that so many may plan."""
    return _GROWTH * len(seen)
