"""z'f(H)z between two bounds, for H >= 0 and f(x) = x / (x + c): Gauss from above, Gauss-Radau with a node at 0 from below.

The error of the Gauss rule of m nodes is f^(2m)(xi) / (2m)! times a positive number, that of the rule with one more node at a = 0
f^(2m+1)(xi) / (2m+1)! times a positive number where the spectrum is at or above a. Derivatives of x / (x + c) = 1 - c / (x + c) alternate
in sign from f' > 0 on, so that f^(2m) < 0 < f^(2m+1). The value is the middle, and half the distance is certain, unlike the last change.

Source: Golub and Meurant, Matrices, Moments and Quadrature (2010), sections 6.2 and 6.3.
"""

from __future__ import annotations

import torch

from fastsharp.krylov.block import Block
from fastsharp.krylov.functions import Quadrature, evaluate
from fastsharp.krylov.rows import scaled
from fastsharp.krylov.tridiagonal import Tridiagonal

_BELOW = 8.0  # units of eps ||T|| by which rounding moves the zero eigenvalues of H >= 0


class RadauQuadrature(Quadrature):
    """Samples of tr f(H) whose quadrature error is bounded; for H >= 0 and f as above."""

    def _known(self, history: list[float], run: Tridiagonal, square: float) -> tuple[float, float]:
        theta, weights = with_node(run.blocks[0], -_BELOW * run.eps * run.norm)
        below = square * float((weights * evaluate(self.f, scaled(theta, run.shift or 0), self.products.name)).sum())
        return (history[-1] + below) / 2, abs(history[-1] - below) / 2


def with_node(block: Block, a: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights (m + 1,) of the Gauss-Radau rule: T with the row more that makes `a`, below its spectrum, an eigenvalue."""
    T, beta = block.matrix(), block.beta[block.size - 1]
    m = block.size
    last = torch.zeros(m, dtype=torch.float64)
    last[-1] = beta * beta
    longer = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    longer[:m, :m] = T
    longer[m, m - 1] = longer[m - 1, m] = beta
    longer[m, m] = a + float(torch.linalg.solve(T - a * torch.eye(m, dtype=torch.float64), last)[-1])
    theta, S = torch.linalg.eigh(longer)
    return theta, S[0].square()
