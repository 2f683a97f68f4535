"""All of a small matrix: n products with the unit vectors, then a float64 eigendecomposition."""

from __future__ import annotations

import math

import torch

from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.request import Request
from fastsharp.krylov.rows import exponent, largest, scaled
from fastsharp.krylov.stopping import Targets, floor_note, rounding, select, value_bounds
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

_ROWS = 64  # unit vectors per product
_ASYMMETRY_GATE = 256.0  # of eps ||A||_F: columns of healthy float32 Hessians err by up to 84 eps of their norm

_NO_KRYLOV = {"restarts": 0, "thick_restarts": 0, "breakdowns": 0, "second_passes": 0, "probe_products": 0}


def dense(operator: SymmetricOperator, request: Request) -> Eigenpairs:
    """A = X' diag(theta) X by LAPACK in float64; X rounded to the operator's dtype.

    Costs n products and 8 n^2 bytes. Residuals are those of the rounded vectors against the assembled, unsymmetrised products, so
    they are true without further products (n_verify = 0). Raises NotSymmetricError if ||A - A'||_F > 256 eps ||A||_F and
    NonFiniteError.
    """
    n, eps = operator.n, torch.finfo(operator.dtype).eps
    A = _assemble(operator)
    size = largest(A)
    if not math.isfinite(size):
        column = int((~torch.isfinite(A)).nonzero()[0, 0])
        raise NonFiniteError(f"lanczos: the product with unit vector {column} contains NaN or Inf. Check the matrix or callable.")
    shift = exponent(size)
    A = scaled(A, -shift)
    defect, size = float((A - A.T).norm()), float(A.norm())
    if defect > _ASYMMETRY_GATE * eps * size:
        raise NotSymmetricError(
            f"lanczos: ||A - A'||_F is {defect / size:.2g} ||A||_F for the assembled {n} x {n} matrix, "
            f"beyond rounding ({_ASYMMETRY_GATE * eps:.2g}).\n"
            "Pass (A + A') / 2 if its symmetric part is meant, or check the product."
        )
    theta, Q = torch.linalg.eigh((A + A.T) / 2)
    chosen = select(theta.cpu(), request.which, request.k)
    X = Q.T[chosen.to(Q.device)].to(operator.dtype)
    theta = theta.cpu()
    values = theta[chosen]
    residuals = (X.double() @ A - values.to(A.device)[:, None] * X.double()).norm(dim=1).cpu()
    all_residuals = torch.zeros(n, dtype=torch.float64)
    all_residuals[chosen] = residuals
    norm = float(theta.abs().max())
    bounds = value_bounds(theta, all_residuals)[chosen].clamp(min=rounding(eps, norm))
    targets = Targets(request.tol, request.criterion, eps)
    converged = targets.met(values, residuals, bounds, norm)
    notes = [f"all {n} products were taken and the matrix was decomposed in float64; residuals come from the assembled matrix"]
    if bool((converged & targets.by_floor(values, residuals, bounds)).any()):
        notes.append(floor_note(eps, norm, shift))
    return Eigenpairs(
        eigenvalues=scaled(values, shift),
        eigenvectors=X,
        residuals=scaled(residuals, shift),
        error_bounds=scaled(bounds, shift),
        converged=converged,
        verified=True,
        n_matvec=n,
        n_verify=0,
        notes=(*operator.notes, *notes),
        settings={**operator.settings, **request.settings(), "norm": math.ldexp(norm, shift), **_NO_KRYLOV},
        provenance=operator.provenance,
        layout=operator.layout,
    )


def _assemble(operator: SymmetricOperator) -> torch.Tensor:
    """Row i is A e_i: (n, n) float64 on the operator's device."""
    n = operator.n
    A = torch.empty((n, n), dtype=torch.float64, device=operator.device)
    for i in range(0, n, _ROWS):
        b = min(_ROWS, n - i)
        E = torch.zeros((b, n), dtype=operator.dtype, device=operator.device)
        E.diagonal(i).fill_(1.0)
        A[i : i + b] = operator.apply(E)
    return A
