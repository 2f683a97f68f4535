"""Top eigenpairs of a slowly changing operator: one warm vector and a few Lanczos steps where the last pairs still hold.

Note on numerical properties
----------------------------
*Residuals* are true ones at no further product: the run keeps A v_j, so that A x is a combination of what was multiplied.
*Change.* With A0 the last operator, the first product gives delta = ||A v - A0 v||, where A0 v is known from the old pairs. The
first unlisted value mu may have risen by as much, so the gap is that to mu + 1.5 delta. It is an estimate, not a theorem: Weyl's bound
holds for ||A - A0||, of which delta is a lower bound.
*Missing value.* An eigenvector u with eigenvalue lambda has |u'v_1| <= prod beta_j / prod |lambda - theta_j| (see `stopping`). Where that
quotient is below 0.15 / sqrt(k) there is no eigenvalue whose vector has such a component along the start, of k vectors mixed evenly: all
lie in intervals around the Ritz values, and the one around theta_i reaches so far above it. It lets a run stop where the
gap is too small to be trusted. The next pairs enter the start with weights of 0.05 to 0.1, so that an exchange of order among them usually shows, not always.
*Limit.* A pair that overtakes the top one between two checks can be missed, and then the stated bound may be wrong. On five recorded runs
of a small CNN it was in 1 of 145 updates (Adam 1e-3, off by 7 %), and a bound of tol alone in 4, where vectors turn by half a radian and
more from one update to the next.
*Stated bounds.* Stopping rests on estimates, so `converged` says that the stop test was met and the bound is another, cautious one: the
first unlisted value is taken to have risen by 3 delta, to rho. Either theta_k is above rho, and Kato and Temple give r^2 / (theta - rho);
or one as large as rho may be missing, and the distance to it is at most max(r, rho - theta). The smaller one holds in
both cases; never less than tol |theta| or what the stop test gave. It may exceed tol by far: then the order of the values is open.
Cold and check runs end by `StopRule` and carry its bounds.
*Newcomers.* An eigenvector orthogonal to all old ones is met by the random fiftieth of the warm start the earlier the larger it
is: at n = 200 after 2 updates (median) with ten times the tracked value, after 6 with twice; with 1.1 times not before the check. At the latest the next check sees it, with the probability of `StopRule`.

Sources: Parlett 1998, sections 11.7 and 13.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastsharp import ops, rng
from fastsharp.errors import Interrupted, NotConvergedWarning, ShapeError, stacklevel
from fastsharp.krylov.basis import Rows
from fastsharp.krylov.request import Request
from fastsharp.krylov.rows import dot, norm, normalised, rayleigh, scale, scaled
from fastsharp.krylov.stopping import StopRule, Targets, floor, rounding, select, value_bounds
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

# weights in the start vector of the pairs after the k-th: 0.15 already costs a third product after a turn of 0.1 rad
_GUARDS = (0.1, 0.05, 0.05)
_CHECK_GUARDS = (0.5, 0.3, 0.3)
_RANDOM = 0.02
_COMPONENT = 0.15  # smallest component along the start that the top eigenvector is taken to have
_RISE = 1.5  # units of delta by which the first unlisted value may have risen, for the stop test
_CAUTIOUS_RISE = 3.0  # and for the stated bound
_OUTSIDE = 0.5  # an old vector is kept if at least this much of it is outside of the new space


@dataclass(frozen=True)
class Carried:
    """What one call leaves for the next: rows X (k + 3 at most, n), orthonormal, and their values; calls since the last cold or check run."""

    X: torch.Tensor
    values: tuple[float, ...]
    age: int


@dataclass(frozen=True)
class Step:
    """Pairs of one call, what to carry on, and how they came about: start is "cold", "warm" or "check"."""

    pairs: Eigenpairs
    carried: Carried
    start: str
    why: str


class _Recorder(SymmetricOperator):
    """The same matrix, keeping every product as a row."""

    def __init__(self, inner: SymmetricOperator, max_rows: int) -> None:
        super().__init__(inner.n, inner.dtype, inner.device)
        self._inner = inner
        self._products = Rows(inner.n, inner.dtype, inner.device, max_rows)
        self._count = 0

    def rows(self, j: int) -> torch.Tensor:
        """The first j products (j, n)."""
        return self._products.rows(j)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self._inner.apply(V, out)
        for row in out:
            self._products.vector(self._count).copy_(row)
            self._count += 1


class _WarmRule:
    """Stop at the first step where every wanted value meets its target by the carried gap or by the missing-value test."""

    def __init__(self, request: Request, eps: float, unlisted: float) -> None:
        self.request = request
        self.targets = Targets(request.tol, request.criterion, eps)
        self.unlisted = unlisted
        self.bounds = torch.empty(0, dtype=torch.float64)  # the stated ones
        self.met = torch.empty(0, dtype=torch.bool)
        self.why = ""

    def __call__(self, state: Tridiagonal, delta: float) -> bool:
        k, shift = self.request.k, state.shift or 0
        theta, residuals = state.ritz()
        if theta.numel() < k or len(state.blocks) > 1:
            return False
        order = torch.argsort(theta, descending=True)
        top, r, rest = theta[order[:k]], residuals[order[:k]], theta[order[k:]]
        rise, cautious_rise = (math.ldexp(self.unlisted + units * delta, -shift) for units in (_RISE, _CAUTIOUS_RISE))
        limit = (self.request.tol * top.abs()).clamp(min=floor(state.eps, state.norm))
        by_gap = _kato_temple(top, r, rest, rise)
        bounds = torch.minimum(by_gap, _above(state, top, k))
        self.met = self.targets.met(top, r, bounds, state.norm) & (bounds <= limit)
        cautious = torch.minimum(_kato_temple(top, r, rest, cautious_rise), torch.maximum(r, cautious_rise - top))
        self.bounds = torch.maximum(torch.where(self.met, limit, bounds), cautious)
        self.why = "gap to the next value" if bool((by_gap <= bounds).all()) else "no missing value with a share of the start"
        return bool(self.met.all())


def _kato_temple(top: torch.Tensor, r: torch.Tensor, rest: torch.Tensor, rise: float) -> torch.Tensor:
    """r^2 / gap to the other listed values, the other Ritz values and `rise`; inf where the last listed value is not above `rise`, or r is."""
    if float(top[-1]) <= rise:
        return torch.full_like(r, math.inf)
    every = torch.cat([top, torch.cat([rest, rest.new_tensor([rise])]).max()[None]])
    gaps = (top[:, None] - every[None, :]).abs()
    gaps[:, : len(top)].fill_diagonal_(math.inf)
    gap = gaps.min(1).values
    return torch.where(gap > r, r * r / gap, math.inf)


def _above(state: Tridiagonal, top: torch.Tensor, k: int) -> torch.Tensor:
    """For each listed value, descending, how far above it there may be an eigenvector with a component of 0.15 / sqrt(k) in the start vector.

    log prod |lambda - theta_j| is concave between two Ritz values: bisection from theta_i to its maximum; where that is not enough,
    the whole distance to the next value above.
    """
    block, theta = state.blocks[0], state.ritz()[0]
    if block.beta[-1] == 0.0:
        return torch.zeros_like(top)
    target = sum(map(math.log, block.beta)) - math.log(_COMPONENT / math.sqrt(k))
    reach = 2.0 * max(
        math.exp(target / len(block.beta)), float(top[0].abs()) * state.eps
    )  # each factor is at least the distance to the first

    def product(x: float) -> float:
        return float((x - theta).abs().clamp(min=1e-300).log().sum())

    def slope(x: float) -> float:
        return float((1.0 / (x - theta)).sum())

    def bisect(low: float, high: float, below: Callable[[float], bool]) -> float:
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if below(middle) else (low, middle)
        return high

    found = [bisect(float(top[0]), float(top[0]) + reach, lambda x: product(x) < target) - float(top[0])]
    for x, after in zip(top[1:].tolist(), top[:-1].tolist(), strict=True):
        peak = bisect(x, after, lambda at: slope(at) > 0.0)
        found.append(bisect(x, peak, lambda at: product(at) < target) - x if product(peak) > target else after - x)
    return torch.tensor(found, dtype=torch.float64)


def follow(
    operator: SymmetricOperator, request: Request, carried: Carried | None, generator: torch.Generator, *, newcomers_every: int = 10
) -> Step:
    """The k largest eigenpairs of A, started from those of a nearby matrix.

    operator   SymmetricOperator on R^n
    request    k, tol, criterion, max_iter; `which` must be "LA"
    carried    `Step.carried` of the last call, or None for a cold run
    generator  of random parts, private to the caller
    newcomers_every  calls from one run with a half-random start to the next
    ->         Step; cost: pairs.n_matvec matvecs, 2 max(32, n_matvec) n elements of memory while it runs (basis and products)
    A warm run whose test fails goes on, in the same Krylov space, until the cold rule holds: a fallback wastes no product.
    Raises ShapeError where n changed, NonFiniteError and NotSymmetricError as the recurrence does, Interrupted with `.partial`.
    """
    if carried is not None and carried.X.shape[1] != operator.n:
        raise ShapeError(f"tracker: the operator has n = {operator.n}, the pairs carried on have {carried.X.shape[1]}. Make a new tracker.")

    def draw() -> torch.Tensor:
        return rng.normal(operator.n, generator, operator.dtype, operator.device)

    kind, start, randomness, expected = "cold", normalised(draw()), 1.0, None
    if carried is not None:
        kind = "check" if carried.age >= newcomers_every - 1 else "warm"
        guards, randomness = (_GUARDS, _RANDOM) if kind == "warm" else (_CHECK_GUARDS, math.sqrt(0.5))
        weights = torch.tensor([1.0] * request.k + list(guards), dtype=carried.X.dtype, device=carried.X.device)[: len(carried.X)]
        mixed = weights @ carried.X
        start = start * (_RANDOM if kind == "warm" else norm(mixed)) + mixed
        values = torch.tensor(carried.values, dtype=carried.X.dtype, device=carried.X.device)
        expected = ((weights * values) @ carried.X) / norm(start)
    recorder = _Recorder(operator, request.max_iter)
    state = Tridiagonal(recorder, start, draw, request.max_iter)
    cold = StopRule(request.k, "LA", Targets(request.tol, request.criterion, state.eps), operator.n, randomness)
    unlisted = carried.values[request.k] if carried is not None and len(carried.values) > request.k else 0.0
    warm = _WarmRule(request, state.eps, unlisted) if kind == "warm" else None
    delta, settled, stopped = 0.0, False, False
    try:
        while not (settled or stopped) and state.n_matvec < request.max_iter:
            state.step()
            if expected is not None:
                delta, expected = norm(recorder.rows(1)[0] - expected), None
            settled = cold(*state.ritz(), state.blocks, state.norm)
            stopped = warm is not None and warm(state, delta) and not settled
        pairs = _pairs(state, recorder, operator, request, settled=settled, warm=warm if stopped else None)
    except KeyboardInterrupt as interrupt:
        partial = _pairs(state, recorder, operator, request, settled=False, warm=None) if state.size else None
        raise Interrupted(f"tracker: interrupted after {state.n_matvec} products; .partial holds the pairs so far.", partial) from interrupt
    why = {"cold": "first call", "check": "check for newcomers", "warm": "the warm test failed; gone on to the cold rule"}[kind]
    if warm is not None and stopped:
        why = warm.why
    if not (settled or stopped):
        _warn(pairs, request)
    return Step(pairs, _carry(state, recorder, pairs, carried if stopped else None), kind if stopped or kind != "warm" else "cold", why)


def _warn(pairs: Eigenpairs, request: Request) -> None:
    import warnings

    message = f"tracker: the list of values did not settle in {pairs.n_matvec} products (tol = {request.tol:g}). Raise max_iter or tol."
    warnings.warn(NotConvergedWarning(message, pairs), stacklevel=stacklevel())


def _pairs(
    state: Tridiagonal, recorder: _Recorder, operator: SymmetricOperator, request: Request, *, settled: bool, warm: _WarmRule | None
) -> Eigenpairs:
    """X = S V and A X = S (A V): Rayleigh quotients and true residuals without a product."""
    theta, estimates = state.ritz()
    chosen = select(theta, "LA", request.k)
    S = state.coefficients(chosen).to(operator.device)
    X, Y = (ops.combine(S, M, out=M.new_empty((len(S), operator.n))) for M in (state.V, recorder.rows(state.size)))
    length = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    X, Y = X / length, scale(Y / length, -(state.shift or 0))
    values, residuals = rayleigh(X, Y)
    theta, estimates = theta.clone(), estimates.clone()
    theta[chosen], estimates[chosen] = values, residuals
    if warm is not None:
        bounds = warm.bounds
    else:
        bounds = value_bounds(theta, estimates)[chosen] if settled else residuals
    bounds = bounds.clamp(min=rounding(state.eps, state.norm))
    targets = Targets(request.tol, request.criterion, state.eps)
    notes = ["residuals are true ones, from the products of the run itself"]
    if not settled:
        notes.append("warm run: the bounds hold if the gap and the start vector are as the last call left them, up to the change seen")
    shift = state.shift or 0
    return Eigenpairs(
        eigenvalues=scaled(values, shift),
        eigenvectors=X,
        residuals=scaled(residuals, shift),
        error_bounds=scaled(bounds, shift),
        converged=targets.met(values, residuals, bounds, state.norm) if warm is None else warm.met,
        verified=True,
        n_matvec=state.n_matvec,
        n_verify=0,
        notes=(*operator.notes, *notes),
        settings={**operator.settings, **request.settings()},
        provenance=operator.provenance,
        layout=operator.layout,
    )


def _carry(state: Tridiagonal, recorder: _Recorder, pairs: Eigenpairs, old: Carried | None) -> Carried:
    """The returned pairs and the best guesses of those after them, from the new Krylov space and what lies outside of it of the old vectors.

    On the old vectors A is only known by their old values; their coupling to the new space is exact, since A V is.
    """
    V, AV = state.V, recorder.rows(state.size)
    outside: list[torch.Tensor] = []
    values: list[float] = []
    for x, value in zip(old.X, old.values, strict=True) if old is not None else ():
        for _ in range(2):
            x = x - (V @ x) @ V
            for w in outside:
                x = x - dot(w, x) * w
        if norm(x) > _OUTSIDE:
            outside.append(normalised(x))
            values.append(value)
    B = torch.cat([V, *(w[None] for w in outside)])
    M = (B @ AV.T).double().cpu()
    full = torch.zeros(len(B), len(B), dtype=torch.float64)
    full[:, : len(V)] = M
    full[: len(V), :] = M.T
    full[len(V) :, len(V) :] = torch.diag(torch.tensor(values, dtype=torch.float64))
    theta, S = torch.linalg.eigh((full + full.T) / 2)
    X, kept = [*pairs.eigenvectors], pairs.eigenvalues.tolist()
    for value, s in zip(theta.flip(0).tolist(), S.T.flip(0), strict=True):
        x = s.to(B.dtype).to(B.device) @ B
        for w in X:
            x = x - dot(w, x) * w
        if norm(x) > _OUTSIDE and len(X) < len(pairs) + len(_GUARDS):
            X.append(normalised(x))
            kept.append(value)
    return Carried(torch.stack(X), tuple(kept), 0 if old is None else old.age + 1)
