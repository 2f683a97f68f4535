"""A two-sided interval for lambda_max of a mean of matrices, from a random part of them.

H = (1/N) sum_i H_i; A and B are disjoint random halves of a sample S, H_S the mean over S; u_S, lambda_S its top eigenpair.

Note on numerical properties
----------------------------
*Lower side.* u_A does not depend on B, so u_A'H_B u_A has the mean u_A'H u_A <= lambda_max(H), whatever u_A is. B is cut into m folds;
their values are independent, so mean - t s/sqrt(m) is below lambda_max with the stated confidence (Student's t, m - 1 degrees of
freedom). The roles of A and B are exchanged and the two averaged (cross-fitting); their errors are taken as fully correlated.
*Upper side.* lambda_S >= u'H_S u for every u, also for the top eigenvector of H, where the right-hand side has the mean
lambda_max(H): so lambda_S + t s/sqrt(2m) is above it with the stated confidence, s from the folds of S along u_S (in place of the unknown u).
In expectation lambda_S >= lambda_max(H) without any margin (Jensen; convexity), and that bias makes the interval too wide, not too narrow.
*Order.* lower <= upper always: lambda_S >= (u_A'H_A u_A + u_A'H_B u_A)/2 >= the cross-fitted mean.
*Confidence* is that of one sample size: each side gets half of what is left to 1. The rule that stops at the first interval that is
narrow enough looks at several sizes and is not corrected for; see the coverage measured in the tests.
*Finite N.* Sampling is without replacement; the margins leave out the finite-population factor, which would narrow them.
Source: mini-batch bias of lambda_max, Granziol, Zohren & Roberts, JMLR 23 (2022); cross-fitting as in sample splitting.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastsharp import rng
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, NotConvergedWarning, stacklevel
from fastsharp.krylov.lanczos import lanczos
from fastsharp.krylov.rows import dot
from fastsharp.operator import SymmetricOperator
from fastsharp.quantiles import student
from fastsharp.results import Bracket, Eigenpairs

OperatorOf = Callable[[torch.Tensor], SymmetricOperator]


def bracket(
    operator_of: OperatorOf,
    size: int,
    *,
    rtol: float = 0.1,
    confidence: float = 0.9,
    start: int = 256,
    folds: int = 8,
    seed: int = 0,
) -> Bracket:
    """lower <= lambda_max((1/N) sum_i H_i) <= upper from samples of start, 2 start, 4 start, ... until (upper - lower)/2 <= rtol |middle|.

    operator_of  indices (b,) int64, sorted -> the operator of the mean over these samples
    size         N, the number of samples
    confidence   of the interval at one sample size, in (0, 1)
    folds        m, parts of each half for the margins, >= 3
    ->           Bracket. Cost in products of one sample: at size b about (c + 1.5) b with c the products of a Lanczos run, half
                 of it for the new half alone; in all about twice that of the last size. Memory: that of a run with k = 1.
    Where more than half of the samples would be needed, the whole is taken: lambda_max itself, with its own error bound.
    Raises InputError, ArgumentTypeError, and what the operators raise. Ctrl-C raises Interrupted, whose `.partial` is the Bracket of
    the last size that was finished, None before; any other exception gets the same as its attribute `.partial`.
    """
    check_arguments(size, rtol=rtol, confidence=confidence, start=start, folds=folds, seed=seed)
    search = _Search(operator_of, rtol, confidence, folds, torch.randperm(size, generator=rng.generator(seed)), seed)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search.run(start)
    except KeyboardInterrupt as interrupt:
        raise Interrupted("bracket: interrupted; .partial holds the interval so far.", search.result()) from interrupt
    except Exception as error:
        error.__dict__["partial"] = search.result()
        raise
    for text, category in dict.fromkeys((str(w.message), w.category) for w in caught):  # each sample's operator says the same
        if not issubclass(category, NotConvergedWarning):
            warnings.warn(text, category, stacklevel=stacklevel())
    result = search.result()
    assert result is not None
    if not result.converged:
        message = (
            f"bracket: lambda_max of all {size} samples lies in [{result.lower:.6g}, {result.upper:.6g}], wider than rtol = {rtol:g}.\n"
            "The Krylov run did not converge, or lambda_max is close to zero: use fastsharp.lanczos."
        )
        warnings.warn(NotConvergedWarning(message, result), stacklevel=stacklevel())
    return result


def check_arguments(size: int, *, rtol: float, confidence: float, start: int, folds: int, seed: int) -> None:
    """The arguments of `bracket`; costs nothing. Raises ArgumentTypeError or InputError."""
    for name, value in (("rtol", rtol), ("confidence", confidence)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"bracket: {name} is a {type(value).__name__}, expected a float.")
    for name, value in (("start", start), ("folds", folds), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"bracket: {name} is {value!r}, a {type(value).__name__}; expected an int.")
    if not (rtol > 0.0 and math.isfinite(rtol)):
        raise InputError(f"bracket: rtol is {rtol}, expected a finite number > 0, such as 0.1.")
    if not 0.0 < confidence < 1.0:
        raise InputError(f"bracket: confidence is {confidence}, expected a number between 0 and 1, such as 0.9.")
    if size < 1:
        raise InputError(f"bracket: there are {size} samples, expected at least 1.")
    if folds < 3:
        raise InputError(f"bracket: folds is {folds}, expected at least 3: margins come from their spread.")
    if start < 2 * folds:
        raise InputError(f"bracket: start = {start} samples cannot fill {2 * folds} folds. Pass start >= {2 * folds}, or fewer folds.")


@dataclass
class _Search:
    """Samples so far, their top eigenpair, and the cost."""

    operator_of: OperatorOf
    rtol: float
    confidence: float
    folds: int
    order: torch.Tensor  # a random permutation: samples are its first b entries
    seed: int

    def __post_init__(self) -> None:
        self.cost = 0
        self.history: list[tuple[int, float, float]] = []
        self.notes: list[str] = []
        self.top: tuple[int, torch.Tensor] | None = None  # size and top eigenvector of the last sample
        self.exact: Eigenpairs | None = None
        self.operator: SymmetricOperator | None = None

    def run(self, b: int) -> None:
        """Double the sample until the interval is narrow enough; once it would be more than half of all, take all."""
        while 2 * b <= self.order.numel():
            self.step(b)
            if self.done:
                return
            b *= 2
        self.whole()

    @property
    def done(self) -> bool:
        _, lower, upper = self.history[-1]
        return (upper - lower) / 2 <= self.rtol * abs(upper + lower) / 2

    def step(self, b: int) -> None:
        """One interval from the first b samples, whose first half is the last sample."""
        half, m = b // 2, self.folds
        A, B = self.order[:half], self.order[half:b]
        u_A = self.top[1] if self.top is not None and self.top[0] == half else self._top(A, None)[0]
        u_B = self._top(B, None)[0]  # from a start of its own: it must not depend on A
        sign = 1.0 if dot(u_A, u_B) >= 0.0 else -1.0
        u_S, value, bound = self._top(self.order[:b], u_A + sign * u_B)
        self.top = (b, u_S)
        in_A = torch.stack([self._forms(part, u_B, u_S) for part in A.tensor_split(m)])
        in_B = torch.stack([self._forms(part, u_A, u_S) for part in B.tensor_split(m)])
        t = student((1 + self.confidence) / 2, m - 1)
        lower = 0.5 * sum(float(q[:, 0].mean() - t * q[:, 0].std() / math.sqrt(m)) for q in (in_A, in_B))
        along = torch.cat([in_A[:, 1], in_B[:, 1]])
        upper = value + bound + student((1 + self.confidence) / 2, 2 * m - 1) * float(along.std()) / math.sqrt(2 * m)
        self.history.append((b, lower, upper))

    def whole(self) -> None:
        """lambda_max of all samples, by a run of its own."""
        u = None if self.top is None else self.top[1]
        _, value, bound = self._top(self.order, u, tol=min(1e-3, self.rtol))
        self.history.append((self.order.numel(), value - bound, value + bound))
        self.notes.append("all samples were taken: the interval is the value with its error bound, not a statistical one")

    def result(self) -> Bracket | None:
        """The interval of the last size, None if there is none yet."""
        operator = self.operator
        if not self.history or operator is None:
            return None
        samples, lower, upper = self.history[-1]
        return Bracket(
            lower=lower,
            upper=upper,
            value=(lower + upper) / 2,
            confidence=self.confidence,
            samples=samples,
            total=self.order.numel(),
            n_products=self.cost,
            history=tuple(self.history),
            converged=self.done,
            notes=(*operator.notes, *self.notes),
            settings={**operator.settings, "rtol": self.rtol, "folds": self.folds, "start": self.history[0][0], "seed": self.seed},
            provenance=operator.provenance,
        )

    def _top(self, indices: torch.Tensor, v0: torch.Tensor | None, tol: float | None = None) -> tuple[torch.Tensor, float, float]:
        """Top eigenvector (n,), eigenvalue and its error bound of the mean over these samples."""
        operator = self._operator(indices)
        tol = tol or self.rtol / 20
        found = lanczos(operator, k=1, tol=tol, criterion="value", method="lanczos", v0=v0, seed=self.seed, check="off")
        if not bool(found.converged.all()):
            self._note("some Krylov runs did not converge; their error bounds widen the interval")
        self.cost += indices.numel() * (found.n_matvec + found.n_verify)
        return found.eigenvectors[0], float(found.eigenvalues[0]), float(found.error_bounds[0])

    def _forms(self, indices: torch.Tensor, *vectors: torch.Tensor) -> torch.Tensor:
        """u'H u of the mean over these samples for each vector, float64."""
        V = torch.stack(vectors)
        products = self._operator(indices).apply(V)
        self.cost += indices.numel() * len(V)
        return torch.tensor([dot(v, p) for v, p in zip(V, products, strict=True)], dtype=torch.float64)

    def _operator(self, indices: torch.Tensor) -> SymmetricOperator:
        operator = self.operator_of(indices.sort().values)
        if self.operator is None:
            self.operator = operator
        return operator

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
