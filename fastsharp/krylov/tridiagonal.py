"""The Lanczos recurrence with full reorthogonalisation:  A V' = V' T + r e_m'.

Note on numerical properties
----------------------------
*Orthogonality.* One classical Gram-Schmidt pass over all rows after the three-term step keeps max|VV' - I| at a few eps for
m up to n, provided alpha v_j is removed *before* the dots: c = V w then measures rounding only. Left to the Gram-Schmidt pass,
alpha swamps c and orthogonality is lost by step 20-40. A further pass runs while the norm falls below 0.717 of what it was
(Daniel, Gragg, Kaufman & Stewart 1976; the constant is ARPACK's): then w was mostly rounding along V.
*Normalisation.* beta is the norm of the vector that is stored, never sqrt(||w||^2 - ||c||^2), which loses 5 digits where an
eigenvalue is 600 times the local beta.
*T* is float64 on the host; its diagonal is alpha + c_j. Rounding in T is that of the products, O(eps ||A||).
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
from dataclasses import dataclass, field

import torch

from fastsharp import ops
from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.rows import Basis, exponent, largest, normalised, scale, scaled
from fastsharp.operator import SymmetricOperator

_DROP = 0.717  # sqrt(1/2) of Daniel et al., rounded up as in ARPACK
_MAX_PASSES = 4  # "twice is enough" (Kahan); more only where w is rounding altogether, and then it ends as a breakdown
_SAFE_EXPONENT = {torch.float32: 32, torch.float64: 256}  # squares and eps-sized parts stay inside the range by a wide margin


def breakdown_threshold(n: int, eps: float, norm_t: float) -> float:
    """beta at or below 10 sqrt(min(n, 256)) eps ||T|| is rounding: the Krylov space is invariant.

    The error of a product grows like sqrt(n) eps ||A|| at worst, but only up to the block length of a summation (256 in our
    kernels). Uncapped, n = 1e7 in float32 would give 3.8e-3 ||T||, above the local betas of a Hessian whose outliers are 600
    times its bulk, and cut healthy runs.
    """
    return 10.0 * math.sqrt(min(n, 256)) * eps * norm_t


@dataclass
class Block:
    """The tridiagonal matrix of one Krylov space: T is block diagonal, a new block begins after each breakdown.

    A row counts once its alpha is there: beta is appended first, so that an interrupt between the two leaves the rows so far whole.
    """

    start: int  # its first row of V
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)  # beta[i] couples rows i and i+1; the last one leads out of the block
    closed: bool = False  # the space is invariant
    _solved: tuple[torch.Tensor, torch.Tensor] | None = None

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (m,) ascending and eigenvectors as rows (m, m), float64 on the host.

        Scaled by a power of two first: LAPACK then sees the same bits for T and 2^p T.
        """
        m = len(self.alpha)
        if self._solved is None or self._solved[0].numel() != m:
            beta = self.beta[: m - 1]
            e = exponent(max(map(abs, self.alpha + beta)))
            T = torch.zeros(m, m, dtype=torch.float64)
            T.diagonal().copy_(scale(torch.tensor(self.alpha, dtype=torch.float64), -e))
            T.diagonal(-1).copy_(scale(torch.tensor(beta, dtype=torch.float64), -e))  # LAPACK reads the lower half
            theta, S = torch.linalg.eigh(T)
            self._solved = scaled(theta, e), S.T
        return self._solved


class Tridiagonal:
    """State of a Lanczos run on A = 2^shift (V'TV + ...): basis on the device, T in `blocks` on the host.

    operator  SymmetricOperator on R^n
    start     (n,) start vector, non-zero and finite, any norm
    draw      a fresh random vector (n,), for restarts after a breakdown
    max_rows  most rows the basis will ever hold; storage grows as needed

    One step costs one matvec, three passes over n-vectors or the basis (`ops.alpha`, `ops.dots`, `ops.update`), one division and
    one read by the host. Raises NonFiniteError and NotSymmetricError with the number of the product.
    """

    def __init__(self, operator: SymmetricOperator, start: torch.Tensor, draw: Callable[[], torch.Tensor], max_rows: int) -> None:
        self.operator = operator
        self.n = operator.n
        self.eps = torch.finfo(operator.dtype).eps
        self.blocks = [Block(0)]
        self.n_matvec = 0
        self.second_passes = 0
        self.breakdowns = 0
        self.norm = 0.0  # of T, largest column norm or |Ritz value| so far: a lower bound of ||A|| 2^-shift
        self.shift: int | None = None  # None until the first non-zero product
        self._draw = draw
        self._basis = Basis(self.n, operator.dtype, operator.device, max_rows + 1)
        # one buffer, so that the host reads a step in one copy: alpha, beta_prev, ||w||^2 after, c (j), ||w||^2 before
        self._scalars = torch.zeros(max_rows + 5, dtype=torch.float64, device=operator.device)
        self._zero = torch.zeros(2, dtype=torch.float64, device=operator.device)
        self._basis.row(0).copy_(normalised(start))

    @property
    def size(self) -> int:
        """Finished steps = rows of V with a row of T."""
        return self.blocks[-1].start + len(self.blocks[-1].alpha)

    @property
    def exhausted(self) -> bool:
        """V spans the whole space."""
        return self.size == self.n

    @property
    def V(self) -> torch.Tensor:
        """The basis, (size, n) rows orthonormal to working precision; valid until the next step."""
        return self._basis.rows(self.size)

    def step(self) -> None:
        """One more row of T; after a breakdown the row belongs to a new block, started from a random vector orthogonal to V."""
        if self.blocks[-1].closed:
            self._restart()
        block, j = self.blocks[-1], self.size + 1
        w = self._basis.row(j)
        v = self._basis.row(j - 1)
        self.operator.apply(v[None], out=w[None])
        self.n_matvec += 1
        self._rescale(w)
        beta_prev = block.beta[-1] if block.beta else 0.0
        ops.alpha(v, w, out=self._scalars[0:1])
        self._scalars[1:2].fill_(beta_prev)
        alpha, after, before, c = self._pass(w, j, self._scalars[0:2])
        if not (math.isfinite(alpha) and math.isfinite(before) and math.isfinite(after)):
            raise self._not_finite(f"v'Av = {alpha}")
        self.norm = max(self.norm, math.sqrt(alpha**2 + beta_prev**2 + before))
        self._watch_symmetry(c[: max(j - 2, 0)])
        alpha += c[j - 1]
        passes = 1
        while after < _DROP**2 * before and passes < _MAX_PASSES:
            _, after, before, c = self._pass(w, j, self._zero)
            alpha += c[j - 1]
            passes += 1
            self.second_passes += 1
        beta = math.sqrt(after)
        invariant = beta <= breakdown_threshold(self.n, self.eps, self.norm)
        if not invariant:
            w.div_(beta)
        block.beta.append(beta)
        block.alpha.append(alpha)
        block.closed = invariant or self.exhausted
        self.breakdowns += invariant and not self.exhausted

    def ritz(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ritz values and residuals beta_m |s_m| of all blocks, each (size,) float64, in units of 2^shift, block after block."""
        values, residuals = [], []
        for block in self.blocks:
            if block.alpha:
                theta, S = block.solve()
                values.append(theta)
                residuals.append(block.beta[len(block.alpha) - 1] * S[:, -1].abs())
        theta = torch.cat(values)
        self.norm = max(self.norm, float(theta.abs().max()))
        return theta, torch.cat(residuals)

    def coefficients(self, chosen: torch.Tensor) -> torch.Tensor:
        """S (k, size) with rows of T's eigenvectors for the Ritz values at the positions `chosen` (k,): Ritz vectors are S V."""
        S = torch.zeros(chosen.numel(), self.size, dtype=torch.float64)
        for row, i in enumerate(chosen.tolist()):
            block = next(b for b in reversed(self.blocks) if b.start <= i)
            S[row, block.start : block.start + len(block.alpha)] = block.solve()[1][i - block.start]
        return S

    def _pass(self, w: torch.Tensor, j: int, ab: torch.Tensor) -> tuple[float, float, float, list[float]]:
        """w <- (I - V'V)(w - ab.(v_j, v_{j-1})); returns v_j'Av_j, ||w||^2 after and before the projection, and c (j,)."""
        s, V = self._scalars, self._basis.rows(j)
        ops.dots(V, w, ab, out=s[3 : 4 + j])
        ops.update(V, w, s[3 : 3 + j], out=s[2:3])
        host = s[: 4 + j].tolist()
        return host[0], host[2], host[3 + j], host[3 : 3 + j]

    def _restart(self) -> None:
        """A random row orthogonal to V in place of the dropped one; at least two passes, as nearly all of it may lie in V's span."""
        j = self.size
        w = self._basis.row(j)
        w.copy_(normalised(self._draw()))
        before, after, passes = 1.0, 0.0, 0
        while passes < 2 or (after < _DROP**2 * before and passes < 2 * _MAX_PASSES):
            _, after, before, _ = self._pass(w, j, self._zero)
            passes += 1
        w.div_(math.sqrt(after))
        self.blocks.append(Block(j))

    def _rescale(self, w: torch.Tensor) -> None:
        """Choose 2^-shift at the first non-zero product; apply it to every product."""
        if self.shift is None:
            size = largest(w)
            if not math.isfinite(size):
                raise self._not_finite(f"largest entry {size}")
            if size > 0.0:
                e = exponent(size)
                self.shift = e if abs(e) > _SAFE_EXPONENT[w.dtype] else 0
        if self.shift:
            scale(w, -self.shift)

    def _watch_symmetry(self, c: list[float]) -> None:
        """c_i = v_i'A v_j for i <= j-2 must vanish: A v_i lies in the span of v_1 .. v_{i+1} if A is symmetric and V orthonormal.

        Rounding leaves O(eps ||A||), and the row beyond a breakdown at most 160 eps ||A||, far below the gate sqrt(eps) ||T||.
        Cheap products leave their noise in place of eps. The breakdown threshold stays at eps: after an invariant space the noise
        itself is the next vector, and a threshold of 160 times bf16's noise would cut every run.
        """
        worst = max(map(abs, c), default=0.0)
        gate = math.sqrt(max(self.eps, self.operator.noise)) * self.norm
        if worst > gate:
            i = max(range(len(c)), key=lambda i: abs(c[i]))
            raise NotSymmetricError(
                f"lanczos: v_{i + 1}'A v_{len(c) + 2} is {worst / self.norm:.2g} ||A|| at product {self.n_matvec}, "
                f"where a symmetric A gives rounding (gate {gate / self.norm:.2g} ||A||).\n"
                "Pass (A + A') / 2, or make the product the same matrix at every call."
            )

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"lanczos: product {self.n_matvec} of the operator contains NaN or Inf ({what}).\n"
            "Check the matrix, or the loss and its second derivative, for bad values."
        )
