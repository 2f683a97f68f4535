"""Top eigenpairs of a slowly changing operator: Rayleigh-Ritz on a few products, beside a model of the rest from the last pairs.

Note on numerical properties
----------------------------
*Warm run.* Its first product is of the old top vectors, mixed with a tenth and less of those after them; every further one of what the
model of `recycling` has for top vector. It stops when the wanted values would move by at most tol / 2 if all that was not multiplied had
risen by delta / 2, where delta = ||(A - A0) v|| is the change seen. That is an estimate: delta is a lower bound of ||A - A0||.
*Rivals.* Where the first k products are enough, one more is of a mixture, with random signs, of the old vectors after the k-th: it shows
change that the top vectors do not. If with 3 delta a larger value is not excluded, a third is of the model's best rival.
*Stated bound.* With 5 delta in the place of delta / 2, never below tol |theta|; it may exceed tol by far where vectors turn fast: then
the order of the values is open. theta_i <= lambda_i always, so that an error is one-sided.
*Limit.* A lower pair that rises past the top one within one call by more than its products show is missed until a later call or check,
and then the bound is wrong: most likely where two products went to the top pair and none to the rest.
*Newcomers.* An eigenvector orthogonal to all old ones is met by the random fiftieth of the warm start the earlier the larger it
is. At the latest the next check sees it: a Lanczos run, half of its start random, that ends when the values meet their targets and an
eigenvalue 10 % above one would need a start vector whose component along it is below 1 % of the typical size (`stopping`).

Sources: see `recycling`; Parlett 1998, sections 11.7 and 13.2.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

from fastsharp import ops, rng
from fastsharp.errors import Interrupted, NotConvergedWarning, ShapeError, stacklevel
from fastsharp.krylov.basis import Rows
from fastsharp.krylov.block import Block
from fastsharp.krylov.recycling import Recycled, gram, project
from fastsharp.krylov.request import Request
from fastsharp.krylov.rows import norm, normalised, rayleigh, scale, scaled
from fastsharp.krylov.stopping import StopRule, Targets, at_least, floor, rounding, select, value_bounds
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

# weights in the start vector of the pairs after the k-th: 0.15 already costs a third product after a turn of 0.1 rad
_GUARDS = (0.1, 0.05, 0.05)
_CHECK_GUARDS = (0.5, 0.3, 0.3)
_RANDOM = 0.02
_RISE = 0.5  # units of delta by which what was not multiplied may have risen, for the stop test
_OPEN_RISE = 3.0  # for a second look at the rest
_CAUTIOUS_RISE = 5.0  # for the stated bound
_BESIDE = 0.1  # relative distance at which a check asks for missing eigenvalues
_UNLIKELY = 0.01  # of the typical component of the start vector
_MARGIN = 0.5  # part of tol that the estimate must meet
_KEPT = 7  # pairs carried beyond the k wanted
_MOST = 10  # products beyond k before a warm run is given up


@dataclass(frozen=True)
class Carried:
    """What one call leaves for the next: rows X (k + 7 at most, n), orthonormal, and their values; calls since the last cold or check run."""

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


class _Warm:
    """A warm run: products of the model's own top vectors until the k wanted values meet their targets, or `steps` are taken."""

    def __init__(self, operator: SymmetricOperator, request: Request, carried: Carried) -> None:
        self.request, self.n = request, operator.n
        self.run = Recycled(operator, carried.X, carried.values)
        self.met = torch.zeros(request.k, dtype=torch.bool)
        self.theta = self.residuals = self.bounds = torch.empty(0, dtype=torch.float64)  # the bounds are the stated ones
        self.delta, self.open = 0.0, True  # open: a larger value is not excluded

    def __call__(self, start: torch.Tensor, rest: torch.Tensor | None, steps: int) -> bool:
        """start: of the wanted pairs; rest: of those after them, multiplied (and then the best rival, if still open) where k products suffice."""
        run, k = self.run, self.request.k
        v: torch.Tensor | None = start
        while v is not None and run.size < steps:
            run.step(v)
            if run.size == 1 or v is rest:
                self.delta = max(self.delta, norm(run.AV[-1] - run.last(v)))
            if run.size < min(k, self.n):
                v = run.outside(run.size)
                continue
            settled = self._settled()
            if settled and (rest is None or run.size > k + 1 or (run.size == k + 1 and not (v is rest and self.open))):
                return True
            if not settled:
                v = run.outside(int((~self.met).nonzero()[0]))
            elif run.size == k and rest is not None:
                v = rest = normalised(project(rest, run.V))
            else:
                v = run.outside(k)
        return v is None and bool(self.met.all())

    def pairs(self) -> Eigenpairs:
        """The pairs so far; bounds are the residuals where the list is incomplete."""
        run = self.run
        theta, residuals, S = run.ritz(self.request.k)
        bounds = self.bounds if len(self.bounds) == len(theta) else residuals
        return _pairs(run.operator, self.request, S, run.V, run.AV, bounds, self.met, run.size, (run.norm, 0))

    def _settled(self) -> bool:
        run, request = self.run, self.request
        self.theta, self.residuals, _ = run.ritz(request.k)
        limit = (request.tol * self.theta.abs()).clamp(min=floor(run.eps, run.norm))
        bounds = run.above(self.theta, _RISE * self.delta)
        self.met = bounds <= _MARGIN * limit
        if request.criterion == "residual":
            self.met &= self.residuals <= limit
        self.open = bool((run.above(self.theta, _OPEN_RISE * self.delta) > limit).any())
        self.bounds = torch.maximum(limit, run.above(self.theta, _CAUTIOUS_RISE * self.delta))
        return bool(self.met.all())


class _CheckRule(StopRule):
    """Stop a check as soon as the values meet their targets and a missing eigenvalue 10 % above one would need an unlikely start vector."""

    def __call__(self, theta: torch.Tensor, residuals: torch.Tensor, blocks: list[Block], norm: float) -> bool:
        settled = super().__call__(theta, residuals, blocks, norm)
        if settled or len(blocks) > 1 or blocks[0].closed or len(theta) <= self.k:
            return settled
        chosen = select(theta, "LA", self.k)
        top, r = theta[chosen], residuals[chosen]
        if not bool(self.targets.met(top, r, value_bounds(theta, residuals)[chosen], norm).all()):
            return False
        at = top + _BESIDE * at_least(top.abs(), floor(self.targets.eps, norm))
        component = blocks[0].epoch().log_beta - (at[:, None] - theta).abs().log().sum(1)
        return float(component.max()) <= math.log(_UNLIKELY * self.randomness / math.sqrt(self.n))


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
    A warm run whose test fails within k + 10 products is followed by a cold one, half of its start from the pairs so far.
    Raises ShapeError where n changed, NonFiniteError and NotSymmetricError as the recurrence does, Interrupted with `.partial`.
    """
    if carried is not None and carried.X.shape[1] != operator.n:
        raise ShapeError(f"tracker: the operator has n = {operator.n}, the pairs carried on have {carried.X.shape[1]}. Make a new tracker.")
    if carried is None:
        return _cold(operator, request, None, generator, "cold", "first call")
    if carried.age >= newcomers_every - 1:
        return _cold(operator, request, carried, generator, "check", "check for newcomers")
    warm = _Warm(operator, request, carried)
    weights = _weights(carried, request.k, _GUARDS)
    mixed = weights @ carried.X + _RANDOM * normalised(rng.normal(operator.n, generator, operator.dtype, operator.device))
    others = carried.X[request.k :]
    signs = torch.sign(rng.normal(len(others), generator, mixed.dtype, mixed.device)) if len(others) else None
    try:
        settled = warm(normalised(mixed), None if signs is None else signs @ others, min(request.k + _MOST, request.max_iter))
    except KeyboardInterrupt as interrupt:
        raise _interrupted(warm.run.size, warm.pairs() if warm.run.size else None) from interrupt
    if settled or warm.run.size >= request.max_iter:
        pairs = warm.pairs()
        if not settled:
            _warn(pairs, request)
        return Step(pairs, _carry(warm.run.B, warm.run.F, request.k, carried.age + 1), "warm", "the model of the rest has no larger value")
    found = _carry(warm.run.B, warm.run.F, request.k, 0)
    return _cold(operator, request, found, generator, "cold", "the warm test failed; gone on with the cold rule", warm.run.size)


def _cold(
    operator: SymmetricOperator, request: Request, old: Carried | None, generator: torch.Generator, start: str, why: str, spent: int = 0
) -> Step:
    """Lanczos until the cold rule holds, from a random vector, half of it replaced by old pairs where there are any."""

    def draw() -> torch.Tensor:
        return rng.normal(operator.n, generator, operator.dtype, operator.device)

    first, randomness = normalised(draw()), 1.0
    if old is not None:
        mixed = _weights(old, request.k, _CHECK_GUARDS) @ old.X
        first, randomness = first + normalised(mixed), math.sqrt(0.5)
    recorder = _Recorder(operator, request.max_iter)
    state = Tridiagonal(recorder, first, draw, request.max_iter, call="tracker")
    rule = (_CheckRule if start == "check" else StopRule)(
        request.k, "LA", Targets(request.tol, request.criterion, state.eps), operator.n, randomness
    )
    settled = False

    def so_far() -> Eigenpairs:
        theta, residuals = state.ritz()
        chosen = select(theta, "LA", request.k)
        S = state.coefficients(chosen)
        shift = state.shift or 0
        bounds = scaled((value_bounds(theta, residuals) if settled else residuals)[chosen], shift)
        return _pairs(operator, request, S, state.V, recorder.rows(state.size), bounds, None, spent + state.n_matvec, (state.norm, shift))

    try:
        while not settled and spent + state.n_matvec < request.max_iter:
            state.step()
            settled = rule(*state.ritz(), state.blocks, state.norm)
        pairs = so_far()
    except KeyboardInterrupt as interrupt:
        raise _interrupted(spent + state.n_matvec, so_far() if state.size else None) from interrupt
    if not settled:
        _warn(pairs, request)
    T = gram(state.V, recorder.rows(state.size))
    return Step(pairs, _carry(state.V, (T + T.T) / 2, request.k, 0), start, why)


def _weights(carried: Carried, k: int, guards: tuple[float, ...]) -> torch.Tensor:
    """Of the old pairs in a start vector: the first k evenly, the guards after them."""
    listed = [*([1.0] * k), *guards, *([0.0] * len(carried.X))][: len(carried.X)]
    return torch.tensor(listed, dtype=carried.X.dtype, device=carried.X.device)


def _interrupted(products: int, partial: Eigenpairs | None) -> Interrupted:
    return Interrupted(f"tracker: interrupted after {products} products; .partial holds the pairs so far.", partial)


def _warn(pairs: Eigenpairs, request: Request) -> None:
    message = f"tracker: the list of values did not settle in {pairs.n_matvec} products (tol = {request.tol:g}). Raise max_iter or tol."
    warnings.warn(NotConvergedWarning(message, pairs), stacklevel=stacklevel())


def _pairs(
    operator: SymmetricOperator,
    request: Request,
    S: torch.Tensor,
    V: torch.Tensor,
    AV: torch.Tensor,
    bounds: torch.Tensor,
    met: torch.Tensor | None,
    n_matvec: int,
    size: tuple[float, int],
) -> Eigenpairs:
    """X = S V and A X = S (A V): Rayleigh quotients and true residuals without a product; size is ||A|| as (a, e), a 2^e."""
    S, (length, shift) = S.to(V.device).contiguous(), size
    X, Y = (ops.combine(S, M, out=M.new_empty((len(S), operator.n))) for M in (V, AV))
    norms = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    X, Y = X / norms, scale(Y / norms, -shift)
    values, residuals = rayleigh(X, Y)
    eps = torch.finfo(operator.dtype).eps
    bounds = scaled(bounds, -shift).clamp(min=rounding(eps, length))
    notes = ["residuals are true ones, from the products of the run itself"]
    if met is not None:
        notes.append(
            "warm run: the bounds hold if nothing outside the vectors multiplied has risen by more than five times the change seen"
        )
        met = met if len(met) == len(values) else torch.zeros(len(values), dtype=torch.bool)
    else:
        met = Targets(request.tol, request.criterion, eps).met(values, residuals, bounds, length)
    return Eigenpairs(
        eigenvalues=scaled(values, shift),
        eigenvectors=X,
        residuals=scaled(residuals, shift),
        error_bounds=scaled(bounds, shift),
        converged=met,
        verified=True,
        n_matvec=n_matvec,
        n_verify=0,
        notes=(*operator.notes, *notes),
        settings={**operator.settings, **request.settings()},
        provenance=operator.provenance,
        layout=operator.layout,
    )


def _carry(B: torch.Tensor, F: torch.Tensor, k: int, age: int) -> Carried:
    """The k + 7 largest pairs of the matrix F on the rows B."""
    theta, Q = torch.linalg.eigh(F)
    theta, S = theta.flip(0)[: k + _KEPT], Q.T.flip(0)[: k + _KEPT]
    return Carried(ops.combine(S.to(B.device).contiguous(), B, out=B.new_empty((len(S), B.shape[1]))), tuple(theta.tolist()), age)
