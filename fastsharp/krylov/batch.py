"""Lanczos from p start vectors in lockstep:  A_e V_e' = V_e' T_e + r_e e_m' for e = 1..p, one block product of p vectors a step.

The runs do not see each other: each has its own basis and T, as if run alone. What they share is the block product, the kernels (members
of an ensemble) and the read by the host. `Batch` has one matrix A behind all of them, so that quadratures from random start vectors
are independent; `krylov.ensemble` has a matrix for each.
A run whose space becomes invariant is finished, and takes part in no further product.

Note on numerical properties: those of `tridiagonal`, which see: alpha is removed before the dots, a second pass runs while the norm
falls below 0.717 of what it was, breakdown is relative, one power of two scales all products.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection

import torch

from fastsharp import ops
from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.block import Block
from fastsharp.krylov.rows import exponent, largest, normalised, scale
from fastsharp.krylov.tridiagonal import DROP, MAX_PASSES, SAFE_EXPONENT, breakdown_threshold
from fastsharp.operator import SymmetricOperator


class Lockstep(ABC):
    """State of p runs on A_e = 2^shift (V'TV + ...): bases (p, m, n) on the device, one T a run in `blocks` on the host.

    starts    (p, n) start vectors, non-zero and finite; rows are normalised
    steps     most steps of each run, at most n
    upfront   take the whole storage at once, where the copy of a growth has no room

    A step costs one product a live run, two passes over the bases and one read by the host. Memory: p (steps + 2) n elements.
    Subclasses multiply, and say what becomes of a run whose product is not finite or not that of a symmetric matrix.
    """

    call = "lanczos"  # whose messages these are

    def __init__(self, starts: torch.Tensor, steps: int, *, upfront: bool = False) -> None:
        p, n = starts.shape
        self.n, self.steps = n, min(steps, n)
        self.eps = torch.finfo(starts.dtype).eps
        self.blocks = [Block(0) for _ in range(p)]  # by run
        self.norms = [0.0] * p  # of T, in units of 2^shift
        self.n_matvec = 0
        self.second_passes = [0] * p
        self._slots = list(range(p))  # runs by place in the storage; the live ones come first
        self._live = p
        self._V = starts.new_empty((p, self.steps if upfront else min(32, self.steps), -(-n // 16) * 16))
        self._w = starts.new_empty((p, n))
        if starts.stride(0) == 0:  # one vector for all
            self._V[:, 0, :n] = normalised(starts[0])
        else:
            for e in range(p):
                self._V[e, 0, :n] = normalised(starts[e])

    @abstractmethod
    def _multiply(self, V: torch.Tensor, runs: list[int], w: torch.Tensor) -> None:
        """w[i] <- 2^-shift A v_i for row i of V, which belongs to number i of `runs`."""

    @abstractmethod
    def _fault(self, run: int | None, error: NonFiniteError | NotSymmetricError) -> None:
        """What `error` says of a run (None: of no one in particular): raise it, or give up that run alone."""

    def _given_up(self, run: int) -> bool:
        """Whether a fault has ended this run."""
        return False

    @property
    def live(self) -> int:
        """How many runs still take products."""
        return self._live

    @property
    def size(self) -> int:
        """Finished steps of the live runs."""
        return max(len(block.alpha) for block in self.blocks)

    def step(self) -> None:
        """One more row of T for every live run."""
        a, j, n = self._live, self.size + 1, self.n
        blocks = [self.blocks[run] for run in self._slots[:a]]
        V, w = self._V[:a, :j, :n], self._w[:a]
        self.n_matvec += a
        self._multiply(V[:, j - 1], self._slots[:a], w)
        ab = torch.zeros((a, 2), dtype=torch.float64, device=w.device)
        ab[:, 1] = torch.tensor([block.beta[-1] if block.beta else 0.0 for block in blocks], dtype=torch.float64)
        alphas = torch.empty(a, dtype=torch.float64, device=w.device)
        ops.alpha(V[:, j - 1], w, out=alphas)
        ab[:, 0] = alphas
        found = self._pass(V, w, ab, alphas)
        self._check(found, blocks, j)
        alpha = [row[0] + row[j] for row in found]
        after, before = [row[-1] for row in found], [row[-2] for row in found]
        for _ in range(MAX_PASSES - 1):
            again = [i for i in range(a) if after[i] < DROP**2 * before[i]]
            if not again:
                break
            for i in again:
                row = self._pass(V[i : i + 1], w[i : i + 1], None, alphas[i : i + 1])[0]
                alpha[i], before[i], after[i] = alpha[i] + row[j], row[-2], row[-1]
                self.second_passes[self._slots[i]] += 1
        self._append(alpha, [math.sqrt(x) for x in after], j)

    def _append(self, alpha: list[float], beta: list[float], j: int) -> None:
        """T grows by (alpha, beta), live vectors become basis rows, finished runs move behind the live ones.

        The rows of T are added last of all, each run's alpha after its beta, so that an interrupt leaves whole steps.
        """
        runs = self._slots[: self._live]
        closed = [
            j == self.n or b <= breakdown_threshold(self.n, self.eps, self.norms[e]) or self._given_up(e)
            for e, b in zip(runs, beta, strict=True)
        ]
        if j < self.steps and not all(closed):
            self._grow(j)
            divisor = torch.tensor([1.0 if c else b for b, c in zip(beta, closed, strict=True)], dtype=torch.float64)
            torch.div(self._w[: self._live], divisor.to(self._w)[:, None], out=self._V[: self._live, j, : self.n])
        for e, a, b, c in zip(runs, alpha, beta, closed, strict=True):
            block = self.blocks[e]
            block.beta.append(b)
            block.alpha.append(a)
            block.closed = c
        self._retire([i for i, c in enumerate(closed) if c], j + 1)

    def _retire(self, places: Collection[int], rows: int) -> None:
        """No further products for the runs at these places; the first `rows` rows of the others' bases are kept."""
        for i in sorted(places, reverse=True):
            self._live -= 1
            if i < self._live:
                held = min(rows, self._V.shape[1])
                self._V[i, :held].copy_(self._V[self._live, :held])  # the basis of a finished run is not needed again
            self._slots[i], self._slots[self._live] = self._slots[self._live], self._slots[i]

    def _pass(self, V: torch.Tensor, w: torch.Tensor, ab: torch.Tensor | None, alphas: torch.Tensor) -> list[list[float]]:
        """w <- (I - V'V)(w - ab.(v_j, v_{j-1})) for each member; on the host a row [alpha, c (j), ||w||^2 before, after] for each."""
        c = torch.empty((w.shape[0], V.shape[1] + 1), dtype=torch.float64, device=w.device)
        after = torch.empty(w.shape[0], dtype=torch.float64, device=w.device)
        ops.dots(V, w, ab, out=c)
        ops.update(V, w, c[:, :-1].contiguous(), out=after)
        rows: list[list[float]] = torch.cat([alphas[:, None], c, after[:, None]], 1).tolist()
        return rows

    def _check(self, found: list[list[float]], blocks: list[Block], j: int) -> None:
        """Finite products; the norm of T; and c_i = v_i'A v_j = 0 for i <= j - 2, as in `tridiagonal`."""
        for run, row, block in zip(self._slots, found, blocks, strict=False):
            if not all(math.isfinite(row[i]) for i in (0, -2, -1)):
                self._fault(run, self._not_finite(f"v'Av = {row[0]}", run))
                continue
            beta_prev = block.beta[-1] if block.beta else 0.0
            self.norms[run] = max(self.norms[run], math.sqrt(row[0] ** 2 + beta_prev**2 + row[-2]))
            worst, norm = max(map(abs, row[1 : j - 1]), default=0.0), self.norms[run]
            if worst > math.sqrt(self.eps) * norm:
                message = (
                    f"{self.call}: v_i'A v_{j} is {worst / norm:.2g} ||A|| for an i <= {j - 2} of probe {run}, "
                    f"where a symmetric A gives rounding (gate {math.sqrt(self.eps):.2g} ||A||).\n"
                    "Pass (A + A') / 2, or make the product the same matrix at every call."
                )
                self._fault(run, NotSymmetricError(message))

    def _grow(self, row: int) -> None:
        """Room for row `row`, half as much again, for live runs alone."""
        _, rows, ldv = self._V.shape
        if row >= rows:
            grown = self._V.new_empty((self._live, min(self.steps, rows + rows // 2 + 1), ldv))
            grown[:, :row] = self._V[: self._live, :row]
            self._V = grown

    def _not_finite(self, what: str, run: int | None) -> NonFiniteError:
        whose = "" if run is None else f" with probe {run}"
        return NonFiniteError(
            f"{self.call}: a product up to number {self.n_matvec} of the operator{whose} contains NaN or Inf ({what}).\n"
            "Check the matrix, or the loss and its second derivative, for bad values."
        )


class Batch(Lockstep):
    """p runs on one matrix, from probes; one power of two scales all products.

    operator  SymmetricOperator on R^n

    Raises NonFiniteError and NotSymmetricError with the number of the product.
    """

    call = "density"

    def __init__(
        self, operator: SymmetricOperator, starts: torch.Tensor, steps: int, *, shift: int | None = None, upfront: bool = False
    ) -> None:
        super().__init__(starts, steps, upfront=upfront)
        self.operator = operator
        self.shift = shift  # None until the first non-zero product

    def _fault(self, run: int | None, error: NonFiniteError | NotSymmetricError) -> None:
        raise error

    def _multiply(self, V: torch.Tensor, runs: list[int], w: torch.Tensor) -> None:
        """2^-shift is chosen at the first non-zero product."""
        self.operator.apply(V, out=w)
        if self.shift is None:
            size = largest(w)
            if not math.isfinite(size):
                self._fault(None, self._not_finite(f"largest entry {size}", None))
            if size > 0.0:
                e = exponent(size)
                self.shift = e if abs(e) > SAFE_EXPONENT[w.dtype] else 0
        if self.shift:
            scale(w, -self.shift)
