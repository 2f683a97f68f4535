"""numpy's and scipy's symmetric matrices as operators: what they may be, and what they may not.

float64 and float32 stay; integers and booleans multiply as float64, which holds their values; complex numbers, half and extended
precision are refused, since neither a rounding nor a dropped part would show in the result.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch

from fastsharp.errors import DtypeError, NonFiniteError, NotSymmetricError, ShapeError
from fastsharp.operator import DenseOperator, SymmetricOperator


def from_numpy(A: Any) -> SymmetricOperator:
    """A numpy array (n, n), a scipy sparse matrix or a LinearOperator, as an operator on host vectors.

    Arrays and sparse matrices are compared with their transpose, LinearOperators tested with probes by the solver.
    Raises ShapeError, DtypeError, NotSymmetricError, NonFiniteError.
    """
    what = type(A).__name__
    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ShapeError(f"{what}: shape is {shape}, expected (n, n) with n >= 1.")
    dtype = _dtype(A.dtype, what)
    if isinstance(A, np.ndarray):
        return DenseOperator(torch.from_numpy(np.array(A, dtype=dtype)))
    if hasattr(A, "tocsr"):
        A = A.tocsr().astype(dtype)
        _check_symmetric(A, what)
    return NumpyOperator(A, shape[0], dtype)


@final
class NumpyOperator(SymmetricOperator):
    """The products of a scipy LinearOperator or sparse matrix. Cost: its own, on the host, and a copy of each vector."""

    def __init__(self, A: Any, n: int, dtype: np.dtype[Any]) -> None:
        super().__init__(int(n), torch.float32 if dtype == np.float32 else torch.float64, torch.device("cpu"))
        self._A, self._numpy = A, dtype

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        for v, o in zip(V, out, strict=True):
            x = v.numpy().copy()  # of its own: what is done with it is not seen from here
            y = np.asarray(self._A.matvec(x) if hasattr(self._A, "matvec") else self._A @ x)
            if np.iscomplexobj(y):
                raise DtypeError(f"{type(self._A).__name__}: the product of a real vector is {y.dtype}. A real symmetric matrix is needed.")
            if y.size != self.n:
                raise ShapeError(f"{type(self._A).__name__}: a product has shape {y.shape}, expected ({self.n},).")
            o.copy_(torch.from_numpy(np.array(y.reshape(-1), dtype=self._numpy)))


def _dtype(dtype: Any, what: str) -> np.dtype[Any]:
    """The precision to multiply in; None, as an unfinished LinearOperator has it, is float64."""
    found: np.dtype[Any] = np.dtype("float64" if dtype is None else dtype).newbyteorder("=")
    if found.kind in "biu":
        return np.dtype("float64")
    if found not in (np.dtype("float32"), np.dtype("float64")):
        why = "a real symmetric matrix is needed" if found.kind == "c" else "supported are float32, float64 and integers"
        raise DtypeError(f"{what}: dtype is {found}, {why}. Convert it with .astype, if that is what is meant.")
    return found


def _check_symmetric(A: Any, what: str) -> None:
    if A.nnz and not np.isfinite(A.data).all():
        raise NonFiniteError(f"{what}: the matrix holds NaN or Inf. Find where it was built from bad data.")
    scale, difference = (float(abs(M).max()) if M.nnz else 0.0 for M in (A, A - A.T))
    if difference > 16 * A.shape[0] * np.finfo(A.dtype).eps * scale:
        raise NotSymmetricError(
            f"{what}: max|A - A'| is {difference:.3g} with max|A| = {scale:.3g}, so the matrix is not symmetric.\n"
            "Pass (A + A.T) / 2 if its symmetric part is meant."
        )
