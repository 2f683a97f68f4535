"""A space whose part of the trace is known exactly: from a Lanczos run, from its pairs, or from a sketch.

For orthonormal rows V, with Q = V' V the projector and P = I - Q:
    tr H      = tr(V H V') + tr(P H P)
    ||H||_F^2 = 2 ||H V'||_F^2 - ||V H V'||_F^2 + ||P H P||_F^2
A Lanczos run has V H V' = T and ||H V'||_F^2 = ||T||_F^2 + beta^2 already: after it these parts cost nothing, whether the Ritz
values converged or not. Source: Chen and Hallman 2023 (arXiv 2205.01736), without their second block Krylov space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastsharp import ops
from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, ShapeError
from fastsharp.krylov.products import Products
from fastsharp.krylov.rows import norm, scaled
from fastsharp.krylov.tridiagonal import Tridiagonal, breakdown_threshold
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

_ORTHONORMAL = 1024.0  # units of eps: rows of a Lanczos run stay below ten
_SAME = 1024.0  # units of eps max(||H V'||_F, ||Hx||): rounding of trained float32 networks stays below 250


@dataclass(frozen=True, eq=False)
class KrylovSpace:
    """Orthonormal rows V with what is known of H on them."""

    V: torch.Tensor  # (m, n), the operator's dtype and device
    T: torch.Tensor  # (m, m) float64 on the host: V H V'
    leak: float  # ||(I - V'V) H V'||_F

    @staticmethod
    def empty(operator: SymmetricOperator) -> KrylovSpace:
        """The zero space."""
        V = torch.empty((0, operator.n), dtype=operator.dtype, device=operator.device)
        return KrylovSpace(V, torch.zeros((0, 0), dtype=torch.float64), 0.0)

    @staticmethod
    def of_run(state: Tridiagonal) -> KrylovSpace:
        """The whole basis of a Lanczos run; V is a view, valid until the run's next step."""
        T = torch.zeros((state.size, state.size), dtype=torch.float64)
        for block in state.blocks:
            rows = slice(block.start, block.start + block.size)
            if block.size:
                T[rows, rows] = block.matrix()
        leak = math.hypot(*(block.leak for block in state.blocks))
        shift = state.shift or 0
        return KrylovSpace(state.V, scaled(T, shift), math.ldexp(leak, shift))

    @staticmethod
    def of_pairs(pairs: Eigenpairs) -> KrylovSpace:
        """Ritz vectors, converged or not: V H V' = diag(values), and H V' leaves the space by the residuals."""
        return KrylovSpace(pairs.eigenvectors, torch.diag(pairs.eigenvalues), math.hypot(*pairs.residuals.tolist()))

    @property
    def size(self) -> int:
        return self.V.shape[0]

    def scaled(self, e: int) -> KrylovSpace:
        """The same space for 2^e H."""
        return KrylovSpace(self.V, scaled(self.T, e), math.ldexp(self.leak, e))

    def project(self, W: torch.Tensor) -> torch.Tensor:
        """W <- W (I - V'V) in place, one pass: rows W (b, n)."""
        return _remove(self.V, W)

    def grown(self, W: torch.Tensor, products: Products) -> KrylovSpace:
        """The space with the span of rows W (b, n) added, their images taken by at most b products.

        Projection and QR, both twice; rows that lie in the space already, up to rounding, are dropped.
        """
        if not bool(W.any()):
            return self
        Q, R = torch.linalg.qr(self.project(W.clone()).T)
        size = R.diagonal().abs()
        keep = size > 128 * products.eps * size.max()
        Q, R = torch.linalg.qr(self.project(Q.T[keep].contiguous()).T)
        Q = Q.T[R.diagonal().abs() > 0.5].contiguous()
        if not Q.shape[0]:
            return self
        return self.extended(Q, products(Q))

    def lengthened(self, w: torch.Tensor, steps: int, products: Products) -> tuple[KrylovSpace, torch.Tensor | None]:
        """The space with up to `steps` Lanczos vectors of (I - V'V) H (I - V'V) from w (n,) added, one product each.

        ->  also w for the next call, None where w lies in the space, up to rounding: the Krylov space is invariant then
        """
        Q = torch.empty((steps, w.numel()), dtype=w.dtype, device=w.device)
        U = torch.empty_like(Q)
        scale, taken = float(self.T.diagonal().abs().max()) if self.size else 0.0, 0
        ahead: torch.Tensor | None = w
        while taken < steps and ahead is not None:
            scale = max(scale, norm(ahead))
            q, length = self._outside(ahead, Q[:taken])
            if length <= breakdown_threshold(w.numel(), products.eps, scale):
                ahead = None
            else:
                Q[taken] = q
                U[taken] = products(q[None])[0]
                ahead, taken = U[taken], taken + 1
        return (self.extended(Q[:taken], U[:taken]) if taken else self), ahead

    def _outside(self, w: torch.Tensor, Q: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The part of w outside of V and of further rows Q, with norm one, and the norm it had: two passes."""
        length = norm(w)
        q = w.clone()[None]
        for _ in range(2):
            if length > 0.0:
                q /= norm(q[0])
                _remove(Q, self.project(q))
                length *= norm(q[0])
        return (q[0] / norm(q[0]) if length > 0.0 else q[0]), length

    def extended(self, Q: torch.Tensor, U: torch.Tensor) -> KrylovSpace:
        """The space with orthonormal rows Q (b, n), orthogonal to V, of known images U = Q H."""
        V = torch.cat([self.V, Q])
        C = torch.empty((Q.shape[0], V.shape[0] + 1), dtype=torch.float64, device=V.device)
        ops.dots(V, U, out=C)
        C = C.cpu()
        m, total = self.size, V.shape[0]
        T = torch.empty((total, total), dtype=torch.float64)
        T[:m, :m] = self.T
        T[m:, :m], T[:m, m:] = C[:, :m], C[:, :m].T
        T[m:, m:] = (C[:, m:total] + C[:, m:total].T) / 2
        images = float(self.T.square().sum()) + self.leak**2 + float(C[:, total].sum())
        return KrylovSpace(V, T, math.sqrt(max(images - float(T.square().sum()), 0.0)))

    @property
    def trace(self) -> float:
        """tr(V H V')."""
        return float(self.T.diagonal().sum())

    @property
    def squares(self) -> float:
        """2 ||H V'||_F^2 - ||V H V'||_F^2: what ||H||_F^2 owes to the space."""
        return float(self.T.square().sum()) + 2 * self.leak**2


def check_space(space: KrylovSpace, products: Products, seed: int) -> None:
    """The space must fit the operator, be orthonormal, and carry this operator's values: one product.

    c'V H V'c = c'T c is asked of a random sign vector c, which shows any entry of T that belongs to another matrix.
    Raises ArgumentTypeError, ShapeError, DtypeError, DeviceError or InputError.
    """
    operator, name, V = products.operator, products.name, space.V
    if V.ndim != 2 or V.shape[1] != operator.n:
        raise ShapeError(
            f"{name}: pairs has vectors of shape {tuple(V.shape)}, the operator n = {operator.n}. They belong to another matrix."
        )
    if V.dtype != operator.dtype:
        raise DtypeError(f"{name}: the vectors of pairs are {V.dtype}, the operator is {operator.dtype}. Run both in one dtype.")
    if V.device != operator.device:
        raise DeviceError(f"{name}: the vectors of pairs are on {V.device}, the operator on {operator.device}. Run both on one device.")
    if space.T.shape != (space.size, space.size) or not bool(torch.isfinite(space.T).all()) or not math.isfinite(space.leak):
        raise InputError(f"{name}: the values of pairs are not {space.size} finite numbers. Pass the result of a lanczos run as it is.")
    if not space.size:
        return
    gram = torch.empty((space.size, space.size + 1), dtype=torch.float64, device=V.device)
    ops.dots(V, V.clone(), out=gram)
    defect = float((gram[:, :-1].cpu() - torch.eye(space.size, dtype=torch.float64)).abs().max())
    if not defect <= _ORTHONORMAL * products.eps:
        raise InputError(f"{name}: the vectors of pairs are not orthonormal: max|VV' - I| is {defect:.2g}. Pass those of one lanczos run.")
    c = torch.empty((1, space.size), dtype=torch.float64)
    ops.probes("rademacher", out=c, seed=seed)
    x = ops.combine(c.to(V.device), V, out=torch.empty((1, operator.n), dtype=V.dtype, device=V.device))
    u = products(x).double()
    there = space.scaled(-products.unit)
    found, stated = float((x.double() * u).sum()), float(c[0] @ there.T @ c[0])
    size = max(math.hypot(float(there.T.norm()), there.leak), float(u.norm()))
    if not abs(found - stated) <= _SAME * products.eps * size:
        found, stated = (math.ldexp(v / space.size, products.unit) for v in (found, stated))
        raise InputError(
            f"{name}: pairs belong to another matrix: a combination of their vectors has the Rayleigh quotient {found:.6g}, "
            f"their values say {stated:.6g}.\nRun lanczos on this operator, at these weights and data."
        )


def _remove(V: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """W <- W (I - V'V) in place, one pass: orthonormal rows V (m, n), rows W (b, n)."""
    if V.shape[0] and W.shape[0]:
        out = torch.empty((W.shape[0], V.shape[0] + 1), dtype=torch.float64, device=W.device)
        ops.dots(V, W, out=out)
        ops.update(V, W, out[:, :-1].contiguous(), out=torch.empty(W.shape[0], dtype=torch.float64, device=W.device))
    return W


def space_of(pairs: object, operator: SymmetricOperator, name: str) -> KrylovSpace:
    """What the caller handed in as `pairs`."""
    if pairs is None:
        return KrylovSpace.empty(operator)
    if isinstance(pairs, KrylovSpace):
        return pairs
    if isinstance(pairs, Eigenpairs):
        return KrylovSpace.of_pairs(pairs)
    raise ArgumentTypeError(f"{name}: pairs is a {type(pairs).__name__}, expected the Eigenpairs of a lanczos run on the same operator.")
