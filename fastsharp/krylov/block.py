"""T of one Krylov space: tridiagonal, or after a thick restart an arrowhead of kept Ritz values on top of it.

    T = [ diag(head)  coupling          ]
        [ coupling'   alpha_0  beta_0    ]
        [             beta_0   alpha_1 . ]

Source: Wu & Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22 (2000).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fastsharp.krylov.rows import exponent, scale, scaled


@dataclass(frozen=True)
class Epoch:
    """What a thick restart forgets but the stop rule needs: the values of T at its end, those it began with, and sum(log beta)."""

    theta: torch.Tensor  # (m,) float64
    head: torch.Tensor  # (l,) float64
    log_beta: float


@dataclass
class Block:
    """The projected matrix of one Krylov space: T is block diagonal, a new block begins after each breakdown.

    A row counts once its alpha is there: beta is appended first, so that an interrupt between the two leaves the rows so far whole.
    """

    start: int  # its first row of V
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)  # beta[i] couples tail rows i and i+1; the last one leads out of the block
    closed: bool = False  # the space is invariant
    head: list[float] = field(default_factory=list)  # Ritz values kept by a thick restart
    coupling: list[float] = field(default_factory=list)  # of each kept Ritz vector with the first tail row: its residual then
    past: list[Epoch] = field(default_factory=list)
    origin: int | None = None  # rows that its start vector was orthogonal to, where restarts moved it from `start`
    _solved: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def size(self) -> int:
        """Rows of V that belong to it."""
        return len(self.head) + len(self.alpha)

    @property
    def complement_of(self) -> int:
        """How many rows its start vector was made orthogonal to."""
        return self.start if self.origin is None else self.origin

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (m,) ascending and eigenvectors as rows (m, m), float64 on the host.

        Scaled by a power of two first: LAPACK then sees the same bits for T and 2^p T.
        """
        if self._solved is None or self._solved[0].numel() != self.size:
            T, e = self._scaled()
            theta, S = torch.linalg.eigh(T)
            self._solved = scaled(theta, e), S.T
        return self._solved

    def matrix(self) -> torch.Tensor:
        """T of this block, (m, m) float64 on the host."""
        T, e = self._scaled()
        return scale(T + T.tril(-1).T, e)

    def _scaled(self) -> tuple[torch.Tensor, int]:
        """The lower half of 2^-e T, which LAPACK reads, with its largest entry near one; and e."""
        m, kept = self.size, len(self.head)
        beta = self.beta[: m - kept - 1] if m > kept else []
        coupled = self.coupling if m > kept else []
        e = exponent(max(map(abs, self.head + coupled + self.alpha + beta)))
        T = torch.zeros(m, m, dtype=torch.float64)
        T.diagonal().copy_(scale(torch.tensor(self.head + self.alpha, dtype=torch.float64), -e))
        T.diagonal(-1)[kept:].copy_(scale(torch.tensor(beta, dtype=torch.float64), -e))
        if coupled:
            T[kept, :kept] = scale(torch.tensor(coupled, dtype=torch.float64), -e)
        return T, e

    def residuals(self) -> torch.Tensor:
        """||A x_i - theta_i x_i|| of each Ritz pair of `solve`: what leads out of the block, (m,) float64 on the host."""
        _, S = self.solve()
        if self.alpha:
            return self.beta[len(self.alpha) - 1] * S[:, -1].abs()
        return torch.tensor(self.coupling, dtype=torch.float64)[S.abs().argmax(1)].abs()

    @property
    def leak(self) -> float:
        """||A V' - V' T||_F of its rows."""
        if self.alpha:
            return self.beta[len(self.alpha) - 1]
        return math.hypot(*self.coupling)

    def epoch(self) -> Epoch:
        """This block's share of the record that a restart leaves behind."""
        logs = torch.tensor(self.beta[: len(self.alpha)], dtype=torch.float64).log()
        return Epoch(self.solve()[0], torch.tensor(self.head, dtype=torch.float64), float(logs.sum()))
