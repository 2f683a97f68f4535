"""Rayleigh-Ritz on the vectors multiplied so far, beside a model of the rest from the pairs of a nearby matrix.

Note on numerical properties
----------------------------
*Model.* A is known on the rows V that were multiplied: A V gives V A V' and every coupling of V to the rest exactly. On the complement
it is taken for that of the last matrix, A0 = X' diag(values) X + mu (I - X'X), with mu the smallest kept value, or 0
where that is negative (the largest, if it is negative too). The model lives on
B = [V, X outside V, A V outside both], to which both A V and X belong; what is orthogonal to B has the value mu in it.
*Next vector.* The model's own top eigenvector, its part outside V: to first order in A - A0 the new eigenvector (Davidson's correction
with the old pairs as preconditioner). Among old pairs a component counts by 1 / (theta - lambda_i), not by 1 as in a Krylov space.
*Bound.* Were the complement risen by `rise` as a whole, lambda_i would be at most the i-th of the model's values with that
rise (Weyl, restricted to the complement); theta_i <= lambda_i always. What has to be guessed is the rise, nothing else: an old pair
about to overtake and a coupling not yet followed are in the model.

Sources: Davidson 1975; Parlett 1998, sections 10.1 and 11; recycled pairs as in Krylov recycling, Parks et al. 2006.
"""

from __future__ import annotations

import math

import torch

from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.rows import chunks, norm, normalised
from fastsharp.operator import SymmetricOperator

_OUTSIDE = 0.1  # of an old vector: less outside of the rows before it is dropped
_ROUNDING = 32.0  # units of eps ||A||: a residual below is no direction


class Recycled:
    """Pairs of A on V, and the model of A on B = [V, W, R].

    operator  SymmetricOperator on R^n
    X, values old eigenvectors, orthonormal rows (m, n), and their values, descending

    One step costs one matvec and O((m + 2 j)^2 n) arithmetic. Raises NonFiniteError and NotSymmetricError with the product's number.
    """

    def __init__(self, operator: SymmetricOperator, X: torch.Tensor, values: tuple[float, ...]) -> None:
        self.operator, self.X, self.values = operator, X, torch.tensor(values, dtype=torch.float64)
        self.mu = max(values[-1], min(0.0, values[0]))  # a kept value may be of the negative end
        self.V = X[:0]
        self.AV = X[:0]
        self.B, self.F = self.V, torch.empty(0, 0, dtype=torch.float64)
        self.norm = 0.0
        self.eps = torch.finfo(operator.dtype).eps

    @property
    def size(self) -> int:
        """Rows multiplied so far."""
        return len(self.V)

    def step(self, v: torch.Tensor) -> None:
        """Multiply v, unit and orthogonal to V, and make the model anew."""
        w = torch.empty_like(v)
        self.operator.apply(v[None], out=w[None])
        size = norm(w)
        if not math.isfinite(size):
            raise NonFiniteError(
                f"tracker: product {self.size + 1} of the operator contains NaN or Inf (norm {size}).\n"
                "Check the matrix, or the loss and its second derivative, for bad values."
            )
        self.V, self.AV = torch.cat([self.V, v[None]]), torch.cat([self.AV, w[None]])
        self.norm = max(self.norm, size)
        W = _outside(self.X, self.V, _OUTSIDE)
        B = torch.cat([self.V, W])
        R = _outside(self.AV, B, _ROUNDING * self.eps * self.norm)
        self.B = torch.cat([B, R])
        known = gram(self.B, self.AV)
        self._watch_symmetry(known[: self.size])
        P = gram(W, self.X)
        F = self.mu * torch.eye(len(self.B), dtype=torch.float64)
        rest = slice(self.size, len(B))
        F[rest, rest] += P @ torch.diag(self.values - self.mu) @ P.T
        F[:, : self.size] = known
        F[: self.size] = known.T
        F[: self.size, : self.size] = (known[: self.size] + known[: self.size].T) / 2
        self.F = F

    def _watch_symmetry(self, T: torch.Tensor) -> None:
        """V A V' must be symmetric to rounding; the gate is that of the recurrence."""
        worst = float((T - T.T).abs().max())
        if worst > math.sqrt(max(self.eps, self.operator.noise)) * self.norm:
            raise NotSymmetricError(
                f"tracker: v_i'A v_j and v_j'A v_i differ by {worst / self.norm:.2g} ||A|| after product {self.size}.\n"
                "Pass (A + A') / 2, or make the product the same matrix at every call."
            )

    def last(self, v: torch.Tensor) -> torch.Tensor:
        """A0 v."""
        c = gram(self.X, v[None])[:, 0] * (self.values - self.mu)
        return self.mu * v + c.to(v) @ self.X

    def ritz(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k largest Ritz values on V, descending, their residuals, both (k,) float64, and coefficients S (k, j)."""
        theta, Q = torch.linalg.eigh(self.F[: self.size, : self.size])
        theta, S = theta.flip(0)[:k], Q.T.flip(0)[:k]
        inside = S @ self.F[: self.size]  # rows of A x on B, which holds all of it but rounding
        inside[:, : self.size] -= theta[:, None] * S
        return theta, torch.linalg.vector_norm(inside, dim=1), S

    def above(self, theta: torch.Tensor, rise: float) -> torch.Tensor:
        """How far above theta (k,) the model's values are when everything outside V has risen by `rise`."""
        if self.size == self.operator.n:
            return torch.zeros_like(theta)
        F = self.F.clone()
        F.diagonal()[self.size :] += rise
        top = torch.linalg.eigvalsh(F).flip(0)
        top = torch.nn.functional.pad(top, (0, len(theta)), value=-math.inf)[: len(theta)]
        return (top.clamp(min=self.mu + rise) - theta).clamp(min=0.0)

    def outside(self, i: int) -> torch.Tensor | None:
        """The model's i-th eigenvector, its part outside V, as a unit vector; None where there is nothing outside."""
        s = torch.linalg.eigh(self.F)[1].T.flip(0)
        if i >= len(s) or float(torch.linalg.vector_norm(s[i, self.size :])) <= self.eps:
            return None
        v = normalised(s[i, self.size :].to(self.B) @ self.B[self.size :])
        return normalised(project(v, self.V))


def gram(B: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """B Y' of rows (p, n) and (q, n), summed in float64, on the host."""
    total = torch.zeros(len(B), len(Y), dtype=torch.float64, device=B.device)
    for c in chunks(B.shape[1]):
        total += B[:, c].double() @ Y[:, c].double().T
    return total.cpu()


def project(x: torch.Tensor, *blocks: torch.Tensor) -> torch.Tensor:
    """x less its components along the rows of the blocks, orthonormal together; twice, as once leaves rounding of what was removed."""
    for _ in range(2):
        for B in blocks:
            if len(B):
                x = x - (gram(B, x[None])[:, 0].to(x) @ B)
    return x


def _outside(Y: torch.Tensor, B: torch.Tensor, least: float) -> torch.Tensor:
    """Orthonormal rows for what lies outside of B of the rows of Y, where that is longer than `least`."""
    found = B[:0]
    for y in Y:
        y = project(y, B, found)
        if norm(y) > least:
            found = torch.cat([found, project(normalised(y), B, found)[None]])
    return found
