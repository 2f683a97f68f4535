"""The Lanczos recurrence with full reorthogonalisation:  A V' = V' T + r e_m'.

Note on numerical properties
----------------------------
*Orthogonality.* One classical Gram-Schmidt pass over all rows after the three-term step keeps max|VV' - I| at a few eps for
m up to n, provided alpha v_j is removed *before* the dots: c = V w then measures rounding only. Left to the Gram-Schmidt pass,
alpha swamps c and orthogonality is lost by step 20-40. A further pass runs while the norm falls below 0.717 of what it was
(Daniel, Gragg, Kaufman & Stewart 1976; the constant is ARPACK's): then w was mostly rounding along V.
*Normalisation.* beta is the norm of the vector that is stored, never sqrt(||w||^2 - ||c||^2), which loses 5 digits where an
eigenvalue is 600 times the local beta.
*T* is float64 on the host (`block`); its diagonal is alpha + c_j. Rounding in T is that of the products, O(eps ||A||).
*Breakdown* is relative, see `breakdown_threshold`. A dropped beta is not forgotten: it stays the residual of its block.
*Scale.* Products are scaled by one fixed power of two when the first non-zero product is far from one, so that no square leaves
the range of float64 and no product that of the dtype; T is that of 2^-shift A. Powers of two are exact, so runs of A and 2^p A are
bitwise the same.
*Symmetry.* For a symmetric A the coefficients c_i, i <= j-2, are rounding, O(eps ||A||); an antisymmetric part of A shows there.
Not guaranteed: further copies of a multiple eigenvalue, which the Krylov space of one vector does not hold.

Sources: Parlett, The Symmetric Eigenvalue Problem (1998), section 13; Paige 1976 on ghosts. Departure: reorthogonalisation is
always full.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastsharp import ops
from fastsharp.errors import InputError, NonFiniteError, NotSymmetricError
from fastsharp.krylov.basis import Basis, Rows
from fastsharp.krylov.block import Block
from fastsharp.krylov.restart import Keep, compress
from fastsharp.krylov.rows import exponent, largest, normalised, scale
from fastsharp.operator import SymmetricOperator

DROP = 0.717  # sqrt(1/2) of Daniel et al., rounded up as in ARPACK
MAX_PASSES = 4  # "twice is enough" (Kahan); more only where w is rounding altogether, and then it ends as a breakdown
SAFE_EXPONENT = {torch.float32: 32, torch.float64: 256}  # squares and eps-sized parts stay inside the range by a wide margin


def breakdown_threshold(n: int, eps: float, norm_t: float) -> float:
    """beta at or below 10 sqrt(min(n, 256)) eps ||T|| is rounding: the Krylov space is invariant.

    The error of a product grows like sqrt(n) eps ||A|| at worst, but only up to the block length of a summation (256 in our
    kernels). Uncapped, n = 1e7 in float32 would give 3.8e-3 ||T||, above the local betas of a Hessian whose outliers are 600
    times its bulk, and cut healthy runs.
    """
    return 10.0 * math.sqrt(min(n, 256)) * eps * norm_t


class Tridiagonal:
    """State of a Lanczos run on A = 2^shift (V'TV + ...): basis on the device, T in `blocks` on the host.

    operator  SymmetricOperator on R^n
    start     (n,) start vector, non-zero and finite, any norm
    draw      a fresh random vector (n,), for restarts after a breakdown
    basis     an empty Basis, or the most rows it will ever hold
    keep      keep(theta): positions of the Ritz values that a thick restart keeps; None: the basis holds every row
    call      what messages begin with

    One step costs one matvec, three passes over n-vectors or the basis (`ops.alpha`, `ops.dots`, `ops.update`), one division and
    one read by the host. Raises NonFiniteError and NotSymmetricError with the number of the product.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        start: torch.Tensor,
        draw: Callable[[], torch.Tensor],
        basis: Basis | int,
        keep: Keep | None = None,
        call: str = "lanczos",
    ) -> None:
        self.operator = operator
        self.call = call
        self.n = operator.n
        self.eps = torch.finfo(operator.dtype).eps
        self.blocks = [Block(0)]
        self.n_matvec = 0
        self.second_passes = 0
        self.breakdowns = 0
        self.norm = 0.0  # of T, largest column norm or |Ritz value| so far: a lower bound of ||A|| 2^-shift
        self.shift: int | None = None  # None until the first non-zero product
        self._draw = draw
        self.thick_restarts = 0
        self._keep = keep
        self._basis = Rows(self.n, operator.dtype, operator.device, basis + 1) if isinstance(basis, int) else basis
        self.noise = self._basis.noise  # relative error of a stored row, hence of a Ritz vector
        # one buffer, so that the host reads a step in one copy: alpha, beta_prev, ||w||^2 after, c (j), ||w||^2 before
        self._scalars = torch.zeros(self._basis.capacity + 4, dtype=torch.float64, device=operator.device)
        self._basis.place(0, normalised(start))

    @property
    def size(self) -> int:
        """Rows of V with a row of T: finished steps, or what thick restarts kept and the steps since."""
        return self.blocks[-1].start + self.blocks[-1].size

    @property
    def exhausted(self) -> bool:
        """V spans the whole space."""
        return self.size == self.n

    @property
    def V(self) -> torch.Tensor:
        """The basis, (size, n) rows orthonormal to the precision they are stored in; valid until the next step."""
        return self._basis.rows(self.size)

    def combine(self, S: torch.Tensor) -> torch.Tensor:
        """Ritz vectors S V of unit norm for the rows of S = coefficients(...), in one pass over the basis."""
        return self._basis.combine(S)

    def step(self) -> None:
        """One more row of T; after a breakdown the row belongs to a new block, started from a random vector orthogonal to V."""
        if self.size + 1 >= self._basis.capacity and not self.exhausted:
            self._compress()
        if self.blocks[-1].closed:
            self._restart()
        block, j = self.blocks[-1], self.size + 1
        w = self._basis.vector(j)
        v = self._basis.vector(j - 1)
        self.operator.apply(v[None], out=w[None])
        self.n_matvec += 1
        self._rescale(w)
        beta_prev = block.beta[-1] if block.beta else 0.0
        if block.head and not block.alpha:
            self._basis.subtract(block.start, block.coupling, w)
        ops.alpha(v, w, out=self._scalars[0:1])
        self._scalars[1:2].fill_(beta_prev)
        alpha, after, before, c = self._pass(j, self._scalars[0:2])
        if not (math.isfinite(alpha) and math.isfinite(before) and math.isfinite(after)):
            raise self._not_finite(f"v'Av = {alpha}")
        self.norm = max(self.norm, math.sqrt(alpha**2 + beta_prev**2 + before))
        self._watch_symmetry(c[: max(j - 2, 0)])
        alpha += c[j - 1]
        passes = 1
        while after < DROP**2 * before and passes < MAX_PASSES:
            _, after, before, c = self._pass(j, None)
            alpha += c[j - 1]
            passes += 1
            self.second_passes += 1
        beta = math.sqrt(after)
        invariant = beta <= breakdown_threshold(self.n, self.eps, self.norm)
        if not invariant:
            self._basis.accept(j, beta)
        block.beta.append(beta)
        block.alpha.append(alpha)
        block.closed = invariant or self.exhausted
        self.breakdowns += invariant and not self.exhausted

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ritz values and residuals beta_m |s_m| of all blocks, each (size,) float64, in units of 2^shift, block after block."""
        values, residuals = [], []
        for block in self.blocks:
            if block.size:
                values.append(block.solve()[0])
                residuals.append(block.residuals())
        theta = torch.cat(values)
        self.norm = max(self.norm, float(theta.abs().max()))
        return theta, torch.cat(residuals)

    def coefficients(self, chosen: torch.Tensor) -> torch.Tensor:
        """S (k, size) with rows of T's eigenvectors for the Ritz values at the positions `chosen` (k,): Ritz vectors are S V."""
        S = torch.zeros(chosen.numel(), self.size, dtype=torch.float64)
        for row, i in enumerate(chosen.tolist()):
            block = next(b for b in reversed(self.blocks) if b.start <= i)
            S[row, block.start : block.start + block.size] = block.solve()[1][i - block.start]
        return S

    def _pass(self, j: int, ab: torch.Tensor | None) -> tuple[float, float, float, list[float]]:
        """w <- (I - V'V)(w - ab.(v_j, v_{j-1})); returns v_j'Av_j, ||w||^2 after and before the projection, and c (j,)."""
        s = self._scalars
        self._basis.project(j, ab, s[3 : 4 + j], s[2:3])
        host = s[: 4 + j].tolist()
        return host[0], host[2], host[3 + j], host[3 : 3 + j]

    def _restart(self) -> None:
        """A random row orthogonal to V in place of the dropped one; at least two passes, as nearly all of it may lie in V's span."""
        j = self.size
        self._basis.vector(j).copy_(normalised(self._draw()))
        before, after, passes = 1.0, 0.0, 0
        while passes < 2 or (after < DROP**2 * before and passes < 2 * MAX_PASSES):
            _, after, before, _ = self._pass(j, None)
            passes += 1
        self._basis.accept(j, math.sqrt(after))
        self.blocks.append(Block(j))

    def _compress(self) -> None:
        """Thick restart: the Ritz vectors that `keep` names, and the next Lanczos vector behind them."""
        if self._keep is None:
            raise InputError(
                f"{self.call}: the basis holds {self._basis.capacity} rows and is full. Pass keep= to restart it, or more rows."
            )
        compress(self._basis, self.blocks, self._keep, self.eps, self.norm)
        self.thick_restarts += 1

    def _rescale(self, w: torch.Tensor) -> None:
        """Choose 2^-shift at the first non-zero product; apply it to every product."""
        if self.shift is None:
            size = largest(w)
            if not math.isfinite(size):
                raise self._not_finite(f"largest entry {size}")
            if size > 0.0:
                e = exponent(size)
                self.shift = e if abs(e) > SAFE_EXPONENT[w.dtype] else 0
        if self.shift:
            scale(w, -self.shift)

    def _watch_symmetry(self, c: list[float]) -> None:
        """c_i = v_i'A v_j for i <= j-2 must vanish: A v_i lies in the span of v_1 .. v_{i+1} if A is symmetric and V orthonormal.

        Rounding leaves O(eps ||A||), and the row beyond a breakdown at most 160 eps ||A||, far below the gate sqrt(eps) ||T||.
        Cheap products leave their noise in place of eps, rows stored in float16 their own rounding. The breakdown threshold stays
        at eps: after an invariant space the noise itself is the next vector, and a threshold of 160 times bf16's noise would cut
        every run.
        """
        worst = max(map(abs, c), default=0.0)
        gate = max(math.sqrt(max(self.eps, self.operator.noise)), 4.0 * self.noise) * self.norm
        if worst > gate:
            i = max(range(len(c)), key=lambda i: abs(c[i]))
            raise NotSymmetricError(
                f"{self.call}: v_{i + 1}'A v_{len(c) + 2} is {worst / self.norm:.2g} ||A|| at product {self.n_matvec}, "
                f"where a symmetric A gives rounding (gate {gate / self.norm:.2g} ||A||).\n"
                "Pass (A + A') / 2, or make the product the same matrix at every call."
            )

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"{self.call}: product {self.n_matvec} of the operator contains NaN or Inf ({what}).\n"
            "Check the matrix, or the loss and its second derivative, for bad values."
        )
