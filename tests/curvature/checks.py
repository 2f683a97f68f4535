"""How far an operator is from a dense Hessian, as numbers; used on the Hessian and on broken ones."""

from __future__ import annotations

import functools
import warnings

import torch

import fastsharp
from fastsharp.errors import UnusedParamWarning
from fastsharp.operator import SymmetricOperator
from tests.cases import net
from tests.oracles.dense import dense_hessian, eigenvalues

PRODUCT_GATE = {torch.float64: 1e-10, torch.float32: 1e-5}  # P4
DTYPES = (torch.float64, torch.float32)


@functools.cache
def exact(name: str) -> torch.Tensor:
    """The oracle's Hessian (n, n) float64 of a network of `tests.cases`."""
    n = net(name)
    return dense_hessian(n.model, n.objective, n.whole)


@functools.cache
def spectrum(name: str) -> torch.Tensor:
    """Its eigenvalues, descending."""
    return eigenvalues(exact(name))


def hessian(name: str, dtype: torch.dtype = torch.float64, **options: object) -> fastsharp.Hessian:
    """fastsharp's operator of that network over its uneven batches."""
    n = net(name, dtype)
    return fastsharp.Hessian(n.model, n.batches, n.loss_fn, **options)


def product_error(operator: SymmetricOperator, H: torch.Tensor, columns: int = 3) -> float:
    """max ||Av - Hv|| / ||Hv|| over random v, both as vectors (A @ v) and as rows of a block (A.apply(V))."""
    V = torch.randn(columns, operator.n, dtype=torch.float64).to(operator.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedParamWarning)
        single = torch.stack([operator @ v for v in V]).double()
        block = operator.apply(V).double()
    want = V.double() @ H
    return max(float(((got - want).norm(dim=1) / want.norm(dim=1)).max()) for got in (single, block))


def eigenvalue_error(name: str, dtype: torch.dtype) -> float:
    """max |lambda_i - exact_i| / ||H|| over the top five: by Weyl what a product error of that size may do to an eigenvalue."""
    n = net(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedParamWarning)
        result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, method="lanczos", tol=1e-9 if dtype == torch.float64 else 1e-5)
    assert bool(result.converged.all())
    return float((result.eigenvalues - spectrum(name)[:5]).abs().max() / spectrum(name).abs().max())
