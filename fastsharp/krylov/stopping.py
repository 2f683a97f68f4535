"""When to stop: the k wanted Ritz values are accurate, and nothing says that a better one is still missing.

Note on numerical properties
----------------------------
*Residual.* r_i = beta_m |s_{m,i}| = ||A x_i - theta_i x_i|| in exact arithmetic, free of matvecs (Parlett 1998, section 13.2).
Some eigenvalue lies within r_i of theta_i.
*Value bound.* min(r_i, r_i^2 / gap_i) (Kato-Temple; Parlett, section 11.7), quadratic in r. The gap is the distance to the nearest
other Ritz value, which stands in for the unknown nearest other eigenvalue: rigorous as soon as no eigenvalue is missing between.
*Index.* No bound tells that theta_k belongs to lambda_k: a start vector weak in one eigenvector meets every bound while that
eigenvalue is missing. On the power-law spectrum at tol 1e-2 the bounds alone returned a wrong list for 24 of 200 starts; with value
bounds of 1e-4 and a list unmoved for three steps still for 4 of 1,000; with the test of the start vector below for none.
*Start vector.* For A u = lambda u, multiply A V' = V'T + beta_m v_{m+1} e_m' by u': y = V u has y'(lambda - T) = beta_m (u'v_{m+1}) e_m',
so |u'v_1| <= beta_m |e_m'(lambda - T)^-1 e_1| = prod_j beta_j / prod_j |lambda - theta_j|. A random v_1 has u'v_1 ~ N(0, 1/n), so an
eigenvalue at lambda is missing with a probability of at most 0.8 sqrt(n) times that quotient. Between two Ritz values it is largest
at their sides, so it is asked for at 1 % from every listed one. After a thick restart with kept values h_i the first tail row takes
the place of v_1, with prod_i |lambda - h_i| in the numerator; what the epochs before contributed is multiplied on. That is no proof: theta_k <= lambda_k holds always, equality only
with probability near one, and a second eigenvalue within 1 % of a listed one escapes.
*Floor.* No residual can be told from rounding below 32 eps ||T||; the same floor serves every test here.
*Invariant spaces.* Residuals are zero after a breakdown whatever is missing, so the complement has to speak first: see `StopRule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastsharp.krylov.block import Block
from fastsharp.krylov.tridiagonal import breakdown_threshold

WHICH = ("LA", "SA", "LM", "BE")
CRITERIA = ("residual", "value")

_FLOOR = 32.0  # units of eps ||T||: error of a product and its float64 Rayleigh quotient, with a margin of about ten
_ROUNDING = 8.0  # units of eps ||T||: error of a verified value, four times the largest seen (2.1, float64, n = 32768)
_VALUE_GUARD = 1e-4  # relative value bound that the list must reach even if tol is looser
_MOVED = 0.01  # relative change that counts as a new list; neighbours of the power law differ by 6 %
_UNMOVED_STEPS = 3
_RARE = 0.01  # of the typical size: where the start's component along a missing eigenvector would be, a chance of 0.8 %
_MARGIN = 0.1  # the best unlisted value's bound, as part of its distance to the list


Real = TypeVar("Real", float, torch.Tensor, "float | torch.Tensor")


def floor(eps: float, norm: Real) -> Real:
    """32 eps ||H||: below it a residual is rounding."""
    return _FLOOR * eps * norm


def floor_note(eps: float, norm: float, shift: int) -> str:
    """What a result says where the floor decided; norm is in units of 2^shift."""
    return f"some pairs are converged by the rounding floor {math.ldexp(floor(eps, norm), shift):.2g} = 32 eps ||A||, not by tol"


def rounding(eps: float, norm: float) -> float:
    """8 eps ||H||: no error bound may be smaller, since the products themselves are not exact."""
    return _ROUNDING * eps * norm


def ends(values: torch.Tensor, which: str, k: int) -> list[tuple[torch.Tensor, int]]:
    """The ends of the spectrum that `which` asks for, as (key, count): the `count` largest keys are wanted."""
    if which == "BE":
        return [(values, (k + 1) // 2), (-values, k // 2)]
    return [({"LA": values, "SA": -values, "LM": values.abs()}[which], k)]


def select(values: torch.Tensor, which: str, k: int) -> torch.Tensor:
    """Positions of the min(k, j) wanted among j values (..., j), in the order of a result: descending, for LM by modulus.

    Ties go to the earlier position.
    """
    free = torch.ones_like(values, dtype=torch.bool)
    for key, count in ends(values, which, k):
        order = torch.argsort(torch.where(free, key, -math.inf), descending=True, stable=True)
        free.scatter_(-1, order[..., :count], False)
    chosen = free.to(torch.int8).argsort(stable=True)[..., : min(k, values.shape[-1])]
    return chosen.gather(-1, result_order(values.gather(-1, chosen), which))


def result_order(values: torch.Tensor, which: str) -> torch.Tensor:
    """Permutation that puts values in the order of a result."""
    return torch.argsort(values.abs() if which == "LM" else values, descending=True, stable=True)


def value_bounds(values: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
    """min(r, r^2/gap) for each value, gap = distance to the nearest other of `values`; r where there is no other. All (..., j)."""
    if values.shape[-1] < 2:
        return residuals.clone()
    order = torch.argsort(values)
    step = values.gather(-1, order).diff()
    nearest = torch.minimum(torch.cat([step, step[..., -1:]], -1), torch.cat([step[..., :1], step], -1))
    gap = torch.empty_like(values).scatter_(-1, order, nearest)
    return torch.where(gap > residuals, residuals * (residuals / gap), residuals)


def wanted_keys(values: torch.Tensor, which: str, k: int) -> torch.Tensor:
    """The wanted ones of the values (..., j) as keys of their end, best first: what is compared from step to step."""
    return torch.cat([key.sort(descending=True).values[..., :count] for key, count in ends(values, which, k)], -1)


def unmoved(keys: torch.Tensor, before: torch.Tensor, smallest: float | torch.Tensor) -> torch.Tensor:
    """Whether a list (..., k) is that of the step before, to 1 %."""
    return ((keys - before).abs() <= at_least(_MOVED * keys.abs(), smallest)).all(-1)


def log_distances(listed: torch.Tensor, values: torch.Tensor, smallest: float | torch.Tensor) -> torch.Tensor:
    """log prod_j |lambda - theta_j| for lambda at 1 % from each listed value (..., k) and theta (..., j): (..., k)."""
    nearest = at_least(_MOVED * listed.abs(), smallest)
    return (listed[..., :, None] - values[..., None, :]).abs().maximum(nearest[..., None]).log().sum(-1)


def at_least(x: torch.Tensor, lowest: float | torch.Tensor) -> torch.Tensor:
    """max(x, lowest), entry by entry."""
    return torch.maximum(x, torch.as_tensor(lowest, dtype=x.dtype))


@dataclass(frozen=True)
class Targets:
    """What a pair must meet: `criterion` error <= max(tol |theta|, floor)."""

    tol: float
    criterion: str
    eps: float

    def met(self, values: torch.Tensor, residuals: torch.Tensor, bounds: torch.Tensor, norm: float | torch.Tensor) -> torch.Tensor:
        """One bool per pair."""
        error = residuals if self.criterion == "residual" else bounds
        return error <= at_least(self.tol * values.abs(), floor(self.eps, norm))

    @property
    def guard(self) -> float:
        """Relative value bound that the list must reach."""
        return min(self.tol, _VALUE_GUARD)

    def accurate(self, values: torch.Tensor, residuals: torch.Tensor, bounds: torch.Tensor, norm: float | torch.Tensor) -> torch.Tensor:
        """Whether a list (..., k) meets conditions (1) and (2) of `StopRule`: (...) bool."""
        settled = bounds <= at_least(self.guard * values.abs(), floor(self.eps, norm))
        return (self.met(values, residuals, bounds, norm) & settled).all(-1)

    def by_floor(self, values: torch.Tensor, residuals: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Where a pair that met its target did so by the floor alone."""
        return (residuals if self.criterion == "residual" else bounds) > self.tol * values.abs()


class StopRule:
    """Stateful: called once after every step, says whether to stop.

    Stop when (1) the k wanted pairs meet their target, (2) their value bounds are <= max(min(tol, 1e-4) |theta|, floor), (3) the
    list has moved less than 1 % for three steps, (4) an eigenvalue 1 % beside a listed one would need a start vector whose component
    along it is below 1 % of the typical size. After a breakdown the finished blocks have residual zero and satisfy (1) to (3)
    by themselves, so the last block, started from a random vector of the complement, is asked:

    - still open: (3) starts anew, (4) is asked of its own start, and (5) its best *unlisted* value is settled, bound <= max(a tenth
      of its distance to the list, min(tol, 1e-4) |theta|, floor), so that nothing of the complement is on its way into the list;
    - closed by a breakdown: the block holds each distinct eigenvalue of the complement once, and whatever is left holds no others.
      Stop if its best value is no better than the k-th of the list (another copy could not change the list); else restart.
      A block closed at its first step means that the complement is theta I.
    When V spans the whole space there is nothing left to compute.

    randomness  length of the random part of the first start vector, relative to the whole
    """

    def __init__(self, k: int, which: str, targets: Targets, n: int, randomness: float = 1.0) -> None:
        self.k, self.which, self.targets, self.n = k, which, targets, n
        self.randomness = randomness
        self.values: list[float] = []  # the wanted values after the last call, in result order, in units of 2^shift
        self._keys: torch.Tensor | None = None
        self._unmoved = 0
        self._blocks = 1
        self._trend: list[float] = []  # log of the worst error over its target

    def __call__(self, theta: torch.Tensor, residuals: torch.Tensor, blocks: list[Block], norm: float) -> bool:
        chosen = select(theta, self.which, self.k)
        self.values = theta[chosen].tolist()
        if chosen.numel() < self.k:
            return False
        bounds = value_bounds(theta, residuals)
        smallest = floor(self.targets.eps, norm)
        guard = self.targets.guard
        self._note_movement(theta, blocks, smallest)
        self._note_trend(theta[chosen], residuals[chosen], bounds[chosen], guard, smallest)
        if theta.numel() == self.n:
            return True
        if not bool(self.targets.accurate(theta[chosen], residuals[chosen], bounds[chosen], norm)):
            return False
        if blocks[-1].closed:
            return len(blocks) > 1 and self._complement_is_no_better(theta, blocks[-1].start, norm)
        if self._unmoved < _UNMOVED_STEPS or not self._missing_is_unlikely(theta[chosen], blocks[-1], smallest):
            return False
        return len(blocks) == 1 or self._unlisted_is_settled(theta, bounds, chosen, blocks[-1].start, guard, smallest)

    def expected(self, step: int, max_iter: int) -> float:
        """Products that the run will take in all, extrapolated from how fast the worst error fell lately; max_iter without a trend."""
        recent = self._trend[-8:]
        fall = (recent[0] - recent[-1]) / (len(recent) - 1) if len(recent) > 3 else 0.0
        return min(float(max_iter), step + max(recent[-1], 0.0) / fall) if fall > 0.0 else float(max_iter)

    def _note_movement(self, theta: torch.Tensor, blocks: list[Block], smallest: float) -> None:
        """Compares keys, not positions: with LM, +theta and -theta may change places at every step."""
        keys = wanted_keys(theta, self.which, self.k)
        same = self._keys is not None and bool(unmoved(keys, self._keys, smallest))
        self._unmoved = self._unmoved + 1 if same and len(blocks) == self._blocks else 0
        self._keys, self._blocks = keys, len(blocks)

    def _note_trend(self, theta: torch.Tensor, r: torch.Tensor, bounds: torch.Tensor, guard: float, smallest: float) -> None:
        error = r if self.targets.criterion == "residual" else bounds
        size = theta.abs()
        worst = torch.maximum(error / (self.targets.tol * size).clamp(min=smallest), bounds / (guard * size).clamp(min=smallest))
        self._trend.append(math.log(max(float(worst.nan_to_num(0.0).max()), 1e-300)))

    def _missing_is_unlikely(self, listed: torch.Tensor, block: Block, smallest: float) -> bool:
        """sqrt(n) prod beta_j / prod |lambda - theta_j| <= 0.01 at 1 % from each listed value; in logs, as the products overflow."""
        component = torch.zeros(listed.numel(), dtype=torch.float64)
        for epoch in (*block.past, block.epoch()):  # restarts divide the product among them
            component += epoch.log_beta - log_distances(listed, epoch.theta, smallest) + log_distances(listed, epoch.head, smallest)
        typical = (self.randomness if block.complement_of == 0 else 1.0) / math.sqrt(self.n - block.complement_of)
        return float(component.max()) <= math.log(_RARE * typical)

    def _complement_is_no_better(self, theta: torch.Tensor, start: int, norm: float) -> bool:
        tie = breakdown_threshold(self.n, self.targets.eps, norm)  # values of an invariant space are known no better
        for key, count in ends(theta, self.which, self.k):
            if count and float(key[start:].max()) > float(key.sort(descending=True).values[count - 1]) + tie:
                return False
        return True

    def _unlisted_is_settled(
        self, theta: torch.Tensor, bounds: torch.Tensor, chosen: torch.Tensor, start: int, guard: float, smallest: float
    ) -> bool:
        unlisted = torch.ones(theta.numel(), dtype=torch.bool)
        unlisted[chosen] = False
        unlisted[:start] = False
        if not bool(unlisted.any()):
            return False
        for key, count in ends(theta, self.which, self.k):
            if count:
                best = int(torch.where(unlisted, key, -math.inf).argmax())
                distance = float(key.sort(descending=True).values[count - 1] - key[best])
                if float(bounds[best]) > max(_MARGIN * distance, guard * abs(float(theta[best])), smallest):
                    return False
        return True


class StopRules:
    """`StopRule` for p runs at once, each in its first Krylov space and never restarted: the same decisions, for all of them together.

    Called after every step with the runs that took part in it; a run left out once is not asked again.
    """

    def __init__(self, p: int, k: int, which: str, targets: Targets, n: int, randomness: float = 1.0) -> None:
        self.k, self.which, self.targets = k, which, targets
        self._rare = math.log(_RARE * randomness / math.sqrt(n))
        self._keys = torch.full((p, k), math.nan, dtype=torch.float64)
        self._unmoved = torch.zeros(p, dtype=torch.int64)

    def __call__(
        self, runs: torch.Tensor, theta: torch.Tensor, residuals: torch.Tensor, log_beta: torch.Tensor, norms: torch.Tensor
    ) -> torch.Tensor:
        """Which of the runs (a,) may stop, (a,) bool; Ritz values and residuals (a, m), sum_j log beta_j and ||T|| (a,), on the host."""
        if theta.shape[1] < self.k:
            return torch.zeros(len(runs), dtype=torch.bool)
        norm = norms[:, None]
        smallest = floor(self.targets.eps, norm)
        keys = wanted_keys(theta, self.which, self.k)
        self._unmoved[runs] = torch.where(unmoved(keys, self._keys[runs], smallest), self._unmoved[runs] + 1, 0)
        self._keys[runs] = keys
        chosen = select(theta, self.which, self.k)
        listed, bounds = theta.gather(1, chosen), value_bounds(theta, residuals).gather(1, chosen)
        stop = self.targets.accurate(listed, residuals.gather(1, chosen), bounds, norm) & (self._unmoved[runs] >= _UNMOVED_STEPS)
        if bool(stop.any()):
            component = log_beta[stop, None] - log_distances(listed[stop], theta[stop], smallest[stop])
            stop[stop.clone()] = component.amax(1) <= self._rare
        return stop
