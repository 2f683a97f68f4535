"""The run behind every estimate: pilots, growth of the known space while it pays, a final stage; and what ends it early."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fastsharp.errors import (
    Interrupted,
    NotConvergedError,
    NotConvergedWarning,
    NotSymmetricError,
    StaleOperatorError,
    stacklevel,
)
from fastsharp.krylov.products import Products
from fastsharp.krylov.stages import BLOCK, MIN_FINAL, Drawn, Interval, Law, Samples, Target, error_rate, linear, longest, roots, size
from fastsharp.results import Estimate

OnStep = Callable[[int, tuple[float, ...], float], None]
Absorb = Callable[[float, float, float], bool]

_LEAST_RATE = 1e-12  # of a stage: beyond it quantiles run out of digits, and what is missed is rounding, no chance
CUT_SHORT = "the run was cut short: the number of samples was not fixed in advance, so the interval may be too narrow"


class Sampler(Protocol):
    """Draws samples of the part of a quantity that is not known."""

    @property
    def rounding(self) -> float: ...

    @property
    def known(self) -> float: ...

    @property
    def known_energy(self) -> float: ...

    def draw(self) -> Drawn: ...


@dataclass(frozen=True)
class Kept:
    """The result so far of a run that is no `Run`."""

    result: Estimate

    def partial(self) -> Estimate:
        return self.result


@dataclass(frozen=True)
class Budget:
    """Products: at most `most` in all; `exact` of them would give the answer without chance, None where that is not offered."""

    most: int
    exact: int | None


class Exact(Exception):
    """The plan would cost more than taking the diagonal in full."""


class Run:
    """One estimate on its way. Numbers are in units of `products.unit`, as `power` says, until `estimate` puts them into a result.

    least   samples of the smallest final stage
    root    the quantity is the square root of what is sampled
    power   the quantity is in units of 2^shift
    absorb  lets the known space grow, given samples planned, energy and products left; None for plain Hutchinson
    forced  absorb at least once
    """

    def __init__(
        self,
        products: Products,
        sampler: Sampler,
        target: Target,
        budget: Budget,
        *,
        least: int = MIN_FINAL,
        root: bool = False,
        power: bool = True,
        absorb: Absorb | None = None,
        forced: bool = False,
        on_step: OnStep | None = None,
        notes: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.products, self.sampler, self.target, self.budget = products, sampler, target, budget
        self.law: Law = roots if root else linear
        self.least = least
        self.root = root
        self.power = power
        self.notes = notes
        self.settings = settings or {}
        self.seen = Samples()
        self.stage = -1  # number of the final stage that `seen` belongs to; -1: pilot
        self.absorbed = 0
        self._kept: Estimate | None = None
        self._absorb, self._forced, self._on_step = absorb, forced, on_step
        self._cost = float(BLOCK)  # products of one block, as seen last
        self._expected = float(budget.most)

    def __call__(self) -> Estimate:
        """Pilots, then final stages until one meets the target or the budget is spent. Raises Exact."""
        count = self._plan()
        while True:
            self._offer_exact(count)
            self._begin(self.stage + 1)
            count = min(count, max(self._fits(), BLOCK))
            self._expected = self.products.count + count / BLOCK * self._cost
            while len(self.seen) < count and (self._left() >= self._cost or not self.seen.blocks):
                self._draw()
            interval = self.interval()
            missed = interval.half > self._wanted(interval.value)
            spent = self._left() < self._cost * max(self.least // BLOCK, 1) or self._rate(1) < _LEAST_RATE
            if not missed or spent:
                return self.estimate(interval, converged=not missed)
            count = min(self._size(interval.value), longest(self.seen))

    def _begin(self, stage: int) -> None:
        """No samples yet; what was known stays the partial result until there are."""
        self._kept, self.stage, self.seen = self.partial(), stage, Samples()

    def _plan(self) -> int:
        """Pilot stages; the samples of the final one."""
        before: float | None = None
        pays = self._absorb is not None
        while True:
            self._draw()
            value = self.interval().value
            count = self._size(value)
            if pays and self._absorb is not None and self._absorbing_pays(count, before):
                seen, before = self.seen, self.seen.variance
                self._begin(self.stage)  # the samples belong to the space as it was
                pays = self._absorb(float(count), seen.energy, self._left())
                self.absorbed += pays
                if not pays:
                    self.seen = seen
                continue
            pays = False
            within = min(count, self._fits(), self.budget.exact or count)
            if within <= longest(self.seen):
                return count
            for _ in range(math.ceil(within / longest(self.seen) * len(self.seen) / BLOCK) - len(self.seen.blocks)):
                self._draw()

    def _absorbing_pays(self, count: int, before: float | None) -> bool:
        """One more block in the space costs two blocks of products; as the last one did, it would save (1 - ratio) of the samples."""
        if self._forced and self.absorbed == 0 and self.seen.variance > 0.0:  # a diagonal H is exact already, and would not stay so
            return self._left() >= 2 * self._cost + self.least
        if self._left() < 2 * self._cost + self.least or before == 0.0 or count <= self.least:
            return False
        if self.budget.exact is not None and 2 * self.products.count >= self.budget.exact <= self._left():
            raise Exact
        if (
            not self.root and self.seen.variance < self.seen.energy
        ):  # mostly diagonal, which signs see exactly and a projection would spread
            return False
        ratio = 0.5 if before is None else self.seen.variance / before
        return count * (1 - ratio) > 2 * BLOCK

    def _draw(self) -> None:
        start = self.products.count
        self.seen.blocks.append(self.sampler.draw())
        self._cost = max(float(self.products.count - start), 1.0)
        if self._on_step is not None:
            value = self._real(self.interval().value)
            self._on_step(self.products.count, (value,), max(self._expected, float(self.products.count)))

    def _offer_exact(self, count: int) -> None:
        """Raise Exact where that takes no more products than the stage ahead."""
        if self.budget.exact is not None and count / BLOCK * self._cost >= self.budget.exact <= self._left():
            raise Exact

    def _fits(self) -> int:
        """Samples that the rest of the budget pays for."""
        return int(self._left() // self._cost) * BLOCK

    def _left(self) -> float:
        return float(self.budget.most - self.products.count)

    def _rate(self, ahead: int = 0) -> float:
        return error_rate(self.target.confidence, max(self.stage + ahead, 0))

    def _norm(self) -> float:
        return math.sqrt(max(self.sampler.known_energy + self.seen.energy, 0.0))

    def _wanted(self, value: float) -> float:
        return self.target.half(value, self._norm())

    def _size(self, value: float) -> int:
        return size(self.law, self.sampler.known, self.seen, self._room(value), self._rate(1), self.least)

    def _room(self, value: float) -> float:
        """The half-width that chance may take of the target: what is left beside doubt and rounding."""
        wanted = self._wanted(value)
        return max(wanted - self._besides(value), wanted / 4)

    def interval(self) -> Interval:
        """What the samples of this stage say, widened by what chance does not explain."""
        seen = self.seen
        chance = self.law(self.sampler.known, seen.mean, seen.variance, len(seen), self._rate())
        return chance.widened(self._besides(chance.value))

    def _besides(self, value: float) -> float:
        """Doubt and rounding; that of a square root is smaller by 2 value."""
        return self.seen.doubt + self.sampler.rounding / (2 * value if self.root and value > 0.0 else 1.0)

    def _real(self, x: float) -> float:
        return math.ldexp(x, self.products.unit) if self.power else x

    def partial(self) -> Estimate | None:
        """The samples so far, or those of the stage before; None before the first."""
        if not self.seen.blocks:
            return self._kept
        return self.estimate(self.interval(), converged=False, extra=(CUT_SHORT,))

    def estimate(self, interval: Interval, *, converged: bool, extra: tuple[str, ...] = ()) -> Estimate:
        """The result."""
        operator, seen = self.products.operator, self.seen
        notes = [*operator.notes, *self.notes, *extra]
        if self.target.by_floor(interval.value, self._norm()):
            notes.append(
                f"the value is small beside the Frobenius norm {self._real(self._norm()):.3g}: "
                f"the tolerance is the absolute {self._real(self._wanted(interval.value)):.2g}, not rtol"
            )
        if seen.doubt > 0.0:
            notes.append(f"the interval includes {self._real(seen.doubt):.2g} for the quadrature")
        if self.stage > 0:
            notes.append(f"{self.stage} final stages missed the tolerance; the interval is that of the last one alone")
        return Estimate(
            value=self._real(interval.value),
            stderr=self._real(interval.stderr),
            interval=(self._real(interval.lo), self._real(interval.hi)),
            confidence=self.target.confidence,
            samples=len(seen),
            n_matvec=self.products.count,
            converged=converged,
            notes=tuple(notes),
            settings={**operator.settings, **self.settings, "stages": self.stage + 1, "absorbed_blocks": self.absorbed},
            provenance=operator.provenance,
        )


@contextlib.contextmanager
def keeping(name: str, partial: Callable[[], Estimate | None]) -> Any:
    """Whatever ends the work in here carries `.partial`; Ctrl-C becomes Interrupted."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        result = partial()
        what = f"after {result.n_matvec} products; .partial holds the estimate so far" if result else "before there were any samples"
        raise Interrupted(f"{name}: interrupted {what}.", result) from interrupt
    except (NotSymmetricError, StaleOperatorError, Exact):
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            error.__dict__["partial"] = partial()
        raise


def report_failure(name: str, result: Estimate, strict: bool) -> None:
    """Warn or raise if the tolerance was missed."""
    if result.converged:
        return
    half = (result.interval[1] - result.interval[0]) / 2
    message = (
        f"{name}: {result.value:.6g} is known to +- {half:.2g} after {result.n_matvec} products, above the tolerance.\n"
        "Raise max_products, rtol or atol, or pass pairs= of a lanczos run on the same operator."
    )
    if strict:
        raise NotConvergedError(message, result)
    warnings.warn(NotConvergedWarning(message, result), stacklevel=stacklevel())
