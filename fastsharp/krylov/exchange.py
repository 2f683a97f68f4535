"""XTrace to a tolerance: pilots whose probes join the known space, then a final run of new probes and fixed size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastsharp import quantiles
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.krylov.estimate import CUT_SHORT, Budget, Exact
from fastsharp.krylov.products import Products
from fastsharp.krylov.sketch import Exchange, xtrace
from fastsharp.krylov.stages import BLOCK, MIN_FINAL, Interval, Target, error_rate
from fastsharp.results import Estimate

_MOST = 256  # probes of one run: two blocks of n-vectors, and small matrices of that size


def xtrace_run(
    products: Products,
    space: KrylovSpace,
    target: Target,
    budget: Budget,
    seed: int,
    settings: dict[str, Any],
    notes: tuple[str, ...],
    keep: Callable[[Estimate], None],
) -> Estimate:
    """tr H by XTrace outside of `space`; 2 m products a run. Raises Exact where a basis would be half the space.

    A pilot of m probes tells the error; its basis then joins the space, so that the final run errs less than planned. `keep` is
    called with what every run says, in case the next one is cut short.
    """
    n, drawn, m = products.operator.n, 0, BLOCK
    stage, final = -1, False
    while True:
        room = int(budget.most - products.count) // 2
        if 2 * m > n - space.size - 2:
            raise Exact
        m = min(m, room, _MOST)
        run = xtrace(products, space, m, seed, drawn)
        drawn += m
        stage += final
        rate = error_rate(target.confidence, max(stage, 0))
        interval = _interval(space, run, rate, products)
        norm = math.sqrt(run.space.squares)
        wanted = target.half(interval.value, norm)
        missed = interval.half > wanted
        space = run.space
        room = int(budget.most - products.count) // 2
        last = final and (not missed or room < MIN_FINAL)
        shift = products.unit
        result = Estimate(
            value=math.ldexp(interval.value, shift),
            stderr=math.ldexp(interval.stderr, shift),
            interval=(math.ldexp(interval.lo, shift), math.ldexp(interval.hi, shift)),
            confidence=target.confidence,
            samples=run.probes,
            n_matvec=products.count,
            converged=last and not missed,
            notes=(*products.operator.notes, *notes, *(() if last else (CUT_SHORT,))),
            settings={**products.operator.settings, **settings, "stages": stage + 1, "absorbed_blocks": 0},
            provenance=products.operator.provenance,
        )
        if last:
            return result
        keep(result)
        ratio = (interval.half / wanted) ** 2 if wanted > 0.0 else math.inf
        needed = max(math.ceil(min(m * ratio, 1e9)), MIN_FINAL)
        final = final or needed <= 4 * m or room < 6 * m or needed > _MOST
        m = needed if final else 2 * m


def _interval(space: KrylovSpace, run: Exchange, rate: float, products: Products) -> Interval:
    """The known part and the mean, t with m - 1 degrees of freedom, and the rounding of what is added up."""
    value, stderr = space.trace + run.mean, math.sqrt(run.variance)
    half = quantiles.student(1 - rate / 2, run.probes - 1) * stderr
    rounding = 8 * products.eps * math.sqrt(products.operator.n) * float(run.space.T.diagonal().abs().sum())
    return Interval(value, stderr, value - half - rounding, value + half + rounding)
