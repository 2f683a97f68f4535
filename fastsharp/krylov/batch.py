"""Lanczos from p start vectors in lockstep:  A V_e' = V_e' T_e + r_e e_m' for e = 1..p, one block product of p vectors a step.

The runs do not see each other: each has its own basis and T, as if run alone, so that quadratures from them are independent. What
they share is the pass over the data behind `operator.apply`, the kernels (members of an ensemble) and the read by the host.
A probe whose space becomes invariant is finished: its quadrature is exact, and it takes part in no further product.

Note on numerical properties: those of `tridiagonal`, which see: alpha is removed before the dots, a second pass runs while the norm
falls below 0.717 of what it was, breakdown is relative, one power of two scales all products.
"""

from __future__ import annotations

import math

import torch

from fastsharp import ops
from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.block import Block
from fastsharp.krylov.rows import exponent, largest, normalised, scale
from fastsharp.krylov.tridiagonal import DROP, MAX_PASSES, SAFE_EXPONENT, breakdown_threshold
from fastsharp.operator import SymmetricOperator


class Batch:
    """State of p runs on A = 2^shift (V'TV + ...): bases (p, m, n) on the device, one T a probe in `blocks` on the host.

    operator  SymmetricOperator on R^n
    starts    (p, n) start vectors, non-zero and finite; rows are normalised
    steps     most steps of each run, at most n

    A step costs one product a live probe, two passes over the bases and one read by the host. Memory: p (steps + 2) n elements.
    Raises NonFiniteError and NotSymmetricError with the number of the product.
    """

    def __init__(self, operator: SymmetricOperator, starts: torch.Tensor, steps: int) -> None:
        p, n = starts.shape
        self.operator, self.n, self.steps = operator, n, min(steps, n)
        self.eps = torch.finfo(operator.dtype).eps
        self.blocks = [Block(0) for _ in range(p)]  # by probe
        self.norms = [0.0] * p  # of T, in units of 2^shift
        self.shift: int | None = None  # None until the first non-zero product
        self.n_matvec = 0
        self.second_passes = 0
        self._slots = list(range(p))  # probes by place in the storage; the live ones come first
        self._live = p
        self._V = starts.new_empty((p, min(32, self.steps), -(-n // 16) * 16))
        self._w = starts.new_empty((p, n))
        for e in range(p):
            self._V[e, 0, :n] = normalised(starts[e])

    @property
    def live(self) -> int:
        """How many probes still take products."""
        return self._live

    @property
    def size(self) -> int:
        """Finished steps of the live probes."""
        return max(len(block.alpha) for block in self.blocks)

    def step(self) -> None:
        """One more row of T for every live probe."""
        a, j, n = self._live, self.size + 1, self.n
        blocks = [self.blocks[probe] for probe in self._slots[:a]]
        V, w = self._V[:a, :j, :n], self._w[:a]
        self.operator.apply(V[:, j - 1], out=w)
        self.n_matvec += a
        self._rescale(w)
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
                self.second_passes += 1
        self._append(alpha, [math.sqrt(x) for x in after], j)

    def _append(self, alpha: list[float], beta: list[float], j: int) -> None:
        """T grows by (alpha, beta), live vectors become basis rows, finished probes move behind the live ones.

        The rows of T are added last of all, each probe's alpha after its beta, so that an interrupt leaves whole steps.
        """
        probes = self._slots[: self._live]
        closed = [j == self.n or b <= breakdown_threshold(self.n, self.eps, self.norms[e]) for e, b in zip(probes, beta, strict=True)]
        if j < self.steps and not all(closed):
            self._grow(j)
            divisor = torch.tensor([1.0 if c else b for b, c in zip(beta, closed, strict=True)], dtype=torch.float64)
            torch.div(self._w[: self._live], divisor.to(self._w)[:, None], out=self._V[: self._live, j, : self.n])
        for e, a, b, c in zip(probes, alpha, beta, closed, strict=True):
            block = self.blocks[e]
            block.beta.append(b)
            block.alpha.append(a)
            block.closed = c
        for i in reversed([i for i, c in enumerate(closed) if c]):
            self._live -= 1
            if i < self._live:
                self._V[i, : j + 1].copy_(self._V[self._live, : j + 1])  # the basis of a finished probe is not needed again
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
        for probe, row, block in zip(self._slots, found, blocks, strict=False):
            if not all(math.isfinite(row[i]) for i in (0, -2, -1)):
                raise self._not_finite(f"v'Av = {row[0]}", probe)
            beta_prev = block.beta[-1] if block.beta else 0.0
            self.norms[probe] = max(self.norms[probe], math.sqrt(row[0] ** 2 + beta_prev**2 + row[-2]))
            worst, norm = max(map(abs, row[1 : j - 1]), default=0.0), self.norms[probe]
            if worst > math.sqrt(self.eps) * norm:
                raise NotSymmetricError(
                    f"density: v_i'A v_{j} is {worst / norm:.2g} ||A|| for an i <= {j - 2} of probe {probe}, "
                    f"where a symmetric A gives rounding (gate {math.sqrt(self.eps):.2g} ||A||).\n"
                    "Pass (A + A') / 2, or make the product the same matrix at every call."
                )

    def _rescale(self, w: torch.Tensor) -> None:
        """Choose 2^-shift at the first non-zero product; apply it to every product."""
        if self.shift is None:
            size = largest(w)
            if not math.isfinite(size):
                raise self._not_finite(f"largest entry {size}", None)
            if size > 0.0:
                e = exponent(size)
                self.shift = e if abs(e) > SAFE_EXPONENT[w.dtype] else 0
        if self.shift:
            scale(w, -self.shift)

    def _grow(self, row: int) -> None:
        """Room for row `row`, half as much again, for live probes alone."""
        _, rows, ldv = self._V.shape
        if row >= rows:
            grown = self._V.new_empty((self._live, min(self.steps, rows + rows // 2 + 1), ldv))
            grown[:, :row] = self._V[: self._live, :row]
            self._V = grown

    def _not_finite(self, what: str, probe: int | None) -> NonFiniteError:
        whose = "" if probe is None else f" with probe {probe}"
        return NonFiniteError(
            f"density: a product up to number {self.n_matvec} of the operator{whose} contains NaN or Inf ({what}).\n"
            "Check the matrix, or the loss and its second derivative, for bad values."
        )
