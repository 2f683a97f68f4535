"""SymmetricOperator: a symmetric matrix known by its products, and nothing about models or solvers.

Solvers call `apply` with rows, since a block of Lanczos vectors is stored row-wise; `@` is linear algebra, columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, final

import torch

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, NotSymmetricError, ShapeError

if TYPE_CHECKING:
    import scipy.sparse.linalg

_DTYPES = (torch.float32, torch.float64)
BF16_NOISE, TF32_NOISE = 2.0**-8, 2.0**-11  # unit roundoffs: 8 and 11 significant bits


class SymmetricOperator(ABC):
    """A symmetric linear map on R^n; subclasses define `_apply` alone. Concrete ones are final.

    n         dimension
    dtype     float32 or float64: of the vectors that go in and come out
    device    where they live
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        if dtype not in _DTYPES:
            raise DtypeError(f"operator: dtype is {dtype}, supported are float32 and float64. Convert the matrix or model first.")
        self.n = n
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.n, self.n)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a result computed with this operator must say (kernels switched, parameters left out, ...)."""
        return ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the matrix comes from, for the record of a result."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """How the operator was built and checked; merged into the settings of a result."""
        return {}

    @property
    def layout(self) -> Any:
        """Names and shapes behind the n coordinates (a ParamLayout), None for a plain matrix."""
        return None

    @property
    def noise(self) -> float:
        """Relative error ||Av - (product)|| / ||Av|| of a product beyond the rounding of `dtype`: 0 unless the products are cheap ones."""
        return 0.0

    def cheap(self, precision: str) -> SymmetricOperator:
        """The same matrix by faster, less exact products, for `krylov.ladder`; InputError where the operator has none."""
        raise InputError(
            f"{type(self).__name__} has no products in precision {precision!r}. Use precision='auto', which takes the exact products."
        )

    @abstractmethod
    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        """out <- V A for checked rows V (b, n); out (b, n) does not overlap V and may hold NaN on entry."""

    def check_unchanged(self) -> None:
        """Raise StaleOperatorError if the matrix is no longer the one of construction; solvers call it around a run."""

    @final
    def apply(self, V: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of V times A: (b, n) -> (b, n), b matvecs. Wrong dtype, device or shape raise before any work is done."""
        self._check(V, "V")
        if V.ndim != 2 or V.shape[1] != self.n:
            raise ShapeError(f"apply: V has shape {tuple(V.shape)}, expected (b, {self.n}): rows are vectors. For one vector use A @ v.")
        if V.stride(1) != 1:
            V = V.contiguous()
        if out is None:
            out = torch.empty_like(V)
        else:
            self._check(out, "out")
            if out.shape != V.shape:
                raise ShapeError(f"apply: out has shape {tuple(out.shape)}, expected {tuple(V.shape)}, the shape of V.")
            if out.stride(1) != 1 and self.n > 1:
                raise ShapeError(f"apply: out has strides {out.stride()}, its rows must be contiguous. Allocate it with torch.empty(b, n).")
            if _overlap(V, out):
                raise ShapeError("apply: out shares memory with V, which is read while out is written. Pass another tensor as out.")
        if V.shape[0]:
            self._apply(V, out)
        return out

    @final
    def __matmul__(self, M: torch.Tensor) -> torch.Tensor:
        """A @ v for v (n,), A @ M for columns M (n, b)."""
        self._check(M, "the right-hand side")
        if M.ndim not in (1, 2) or M.shape[0] != self.n:
            raise ShapeError(f"A @ M: M has shape {tuple(M.shape)}, expected ({self.n},) or ({self.n}, b). For rows use A.apply(V).")
        if M.ndim == 1:
            return self.apply(M.contiguous().unsqueeze(0)).squeeze(0)
        return self.apply(M.T.contiguous()).T

    # A + B, A - B, c A, A / c and -A: see `fastsharp.composite`. numpy's numbers leave c * A to A.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> SymmetricOperator:
        return _combined((1.0, self), (1.0, other))

    def __radd__(self, other: Any) -> SymmetricOperator:
        return self if isinstance(other, int) and other == 0 else _combined((1.0, other), (1.0, self))  # sum() begins with 0

    def __sub__(self, other: Any) -> SymmetricOperator:
        return _combined((1.0, self), (-1.0, other))

    def __rsub__(self, other: Any) -> SymmetricOperator:
        return _combined((1.0, other), (-1.0, self))

    def __mul__(self, factor: Any) -> SymmetricOperator:
        return _combined((factor, self))

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> SymmetricOperator:
        return _combined((1.0 / _divisor(factor), self))

    def __neg__(self) -> SymmetricOperator:
        return _combined((-1.0, self))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same matrix as a scipy LinearOperator on host arrays of this dtype; products run on `device`."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        dtype = np.dtype("float32" if self.dtype == torch.float32 else "float64")

        def matmat(M: Any) -> Any:
            rows = torch.from_numpy(np.ascontiguousarray(np.asarray(M, dtype=dtype).reshape(self.n, -1).T))
            return self.apply(rows.to(self.device)).T.cpu().numpy()

        def matvec(v: Any) -> Any:
            return matmat(v)[:, 0]

        return LinearOperator(self.shape, matvec=matvec, matmat=matmat, rmatvec=matvec, rmatmat=matmat, dtype=dtype)

    def _check(self, t: torch.Tensor, name: str) -> None:
        if not isinstance(t, torch.Tensor):
            raise ArgumentTypeError(f"operator: {name} is a {type(t).__name__}, expected a torch.Tensor.")
        if t.dtype != self.dtype:
            raise DtypeError(f"operator: {name} is {t.dtype}, the operator is {self.dtype}. Convert with .to({self.dtype}).")
        if t.device != self.device:
            raise DeviceError(f"operator: {name} is on {t.device}, the operator on {self.device}. Move it with .to('{self.device}').")


class EnsembleOperator(ABC):
    """E symmetric matrices of one dimension, multiplied together; subclasses define `_apply` and `member`.

    E, n      members and their dimension
    dtype     float32 or float64
    device    where vectors live
    """

    def __init__(self, E: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.E, self.n, self.dtype, self.device = E, n, dtype, torch.device(device)

    @abstractmethod
    def _apply(self, V: torch.Tensor, member: torch.Tensor, out: torch.Tensor) -> None:
        """out[r] <- A_member[r] V[r] for checked rows."""

    @abstractmethod
    def member(self, e: int) -> SymmetricOperator:
        """Matrix number e by itself, with its notes, settings, provenance and layout."""

    def check_unchanged(self) -> None:
        """Raise StaleOperatorError if a matrix is no longer the one of construction."""

    @final
    def apply(self, V: torch.Tensor, member: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Row r of the result is the matrix number member[r] times V[r]; V (r, n), member (r,) int64 on the host, None: V is (E, n).

        out (r, n) is contiguous and apart from V; it is written and returned.

        Rows of members that are finished are left out, and cost nothing.
        """
        if V.dtype != self.dtype:
            raise DtypeError(f"ensemble: V is {V.dtype}, the operators are {self.dtype}. Convert with .to({self.dtype}).")
        if V.device != self.device:
            raise DeviceError(f"ensemble: V is on {V.device}, the operators on {self.device}. Move it with .to('{self.device}').")
        member = torch.arange(self.E) if member is None else member
        if V.ndim != 2 or V.shape[1] != self.n or member.shape != V.shape[:1]:
            raise ShapeError(
                f"ensemble: V has shape {tuple(V.shape)}, expected ({member.numel()}, {self.n}), one row for each entry of member."
            )
        if V.shape[0] and (int(member.min()) < 0 or int(member.max()) >= self.E):
            raise InputError(f"ensemble: member holds {int(member.min())} to {int(member.max())}, expected 0 to {self.E - 1}.")
        if out is None:
            out = torch.empty_like(V, memory_format=torch.contiguous_format)
        elif out.shape != V.shape or out.dtype != V.dtype or not out.is_contiguous() or _overlap(V, out):
            raise ShapeError(
                f"ensemble: out is {tuple(out.shape)} {out.dtype}, expected contiguous {tuple(V.shape)} {V.dtype} outside of V."
            )
        if V.shape[0]:
            self._apply(V.contiguous(), member, out)
        return out


@final
class DenseOperator(SymmetricOperator):
    """A symmetric matrix given in full, (n, n); a matrix that is not symmetric to 16 n eps is refused."""

    def __init__(self, A: torch.Tensor) -> None:
        if A.layout != torch.strided:
            raise ArgumentTypeError(
                f"DenseOperator: the matrix is stored as {A.layout}. Pass A.to_dense(), or (lambda v: A @ v, n, dtype) for its products."
            )
        if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
            raise ShapeError(f"DenseOperator: the matrix has shape {tuple(A.shape)}, expected (n, n) with n >= 1.")
        super().__init__(A.shape[0], A.dtype, A.device)
        A = A.detach()
        if not bool(torch.isfinite(A).all()):
            from fastsharp.errors import NonFiniteError

            i, j = (int(v) for v in (~torch.isfinite(A)).nonzero()[0])
            raise NonFiniteError(
                f"DenseOperator: entry ({i}, {j}) of the matrix is {float(A[i, j])}. Find where the matrix was built from bad data."
            )
        scale = float(A.abs().max())
        defect = float((A - A.T).abs().max())
        if defect > 16 * self.n * torch.finfo(A.dtype).eps * scale:
            raise NotSymmetricError(
                f"DenseOperator: max|A - A'| is {defect:.3g} with max|A| = {scale:.3g}, so the matrix is not symmetric.\n"
                "Pass (A + A.T) / 2 if its symmetric part is meant."
            )
        self._A = A

    def cheap(self, precision: str) -> SymmetricOperator:
        """ "bf16": matrix and vectors rounded to bfloat16 before they are multiplied, and the result once more."""
        return _RoundedDense(self._A) if precision == "bf16" else super().cheap(precision)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        torch.matmul(V, self._A, out=out)


@final
class _RoundedDense(SymmetricOperator):
    """A dense matrix whose products are those of its bfloat16 rounding."""

    noise = BF16_NOISE

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__(A.shape[0], A.dtype, A.device)
        self._A = A.bfloat16()

    @property
    def notes(self) -> tuple[str, ...]:
        return ("products in bf16",)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(V.bfloat16() @ self._A)


@final
class CallableOperator(SymmetricOperator):
    """A symmetric map given by a function of one vector, v (n,) -> (n,) of the same dtype and device.

    Symmetry cannot be seen from outside: solvers test it with probes before they use it.
    """

    def __init__(
        self,
        matvec: Callable[[torch.Tensor], torch.Tensor],
        n: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise ArgumentTypeError(f"CallableOperator: n is a {type(n).__name__}, expected an int.")
        if n < 1:
            raise InputError(f"CallableOperator: n is {n}, expected n >= 1.")
        super().__init__(n, dtype, torch.device(device))
        self._matvec = matvec

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        for v, o in zip(V, out, strict=True):
            written = None if v.is_inference() else v._version
            y = self._matvec(v)
            if written is not None and v._version != written:
                raise InputError("CallableOperator: the callable writes to its argument, a vector of the solver. Let it work on a clone.")
            self._check(y, "the result of the callable")
            if y.shape != v.shape:
                raise ShapeError(f"CallableOperator: the callable returned shape {tuple(y.shape)}, expected ({self.n},).")
            o.copy_(y)


@final
class CountingOperator(SymmetricOperator):
    """The same matrix, counting products: `count` is the number of vectors multiplied so far."""

    def __init__(self, inner: SymmetricOperator) -> None:
        super().__init__(inner.n, inner.dtype, inner.device)
        self._inner = inner
        self.count = 0

    @property
    def notes(self) -> tuple[str, ...]:
        return self._inner.notes

    @property
    def provenance(self) -> dict[str, Any]:
        return self._inner.provenance

    @property
    def settings(self) -> dict[str, Any]:
        return self._inner.settings

    @property
    def layout(self) -> Any:
        return self._inner.layout

    @property
    def noise(self) -> float:
        return self._inner.noise

    def cheap(self, precision: str) -> SymmetricOperator:
        """The inner matrix's cheap products; they are not counted here."""
        return self._inner.cheap(precision)

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.count += V.shape[0]
        self._inner.apply(V, out)


def _combined(*terms: tuple[Any, Any]) -> SymmetricOperator:
    from fastsharp.composite import combined  # it is made of these classes

    return combined(*terms)


def _divisor(c: Any) -> float:
    if isinstance(c, bool) or not isinstance(c, Real) or c == 0:
        raise InputError(f"an operator divided by {c!r}: expected a number that is not zero.")
    return float(c)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors with contiguous rows meet."""
    (a0, a1), (b0, b1) = _addresses(a), _addresses(b)
    return max(a0, b0) < min(a1, b1)


def _addresses(t: torch.Tensor) -> tuple[int, int]:
    if t.is_contiguous():
        return t.data_ptr(), t.data_ptr() + t.nbytes
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + span * t.element_size()


def as_operator(A: Any) -> SymmetricOperator:
    """A as an operator: a SymmetricOperator itself, a square tensor or array, a scipy LinearOperator or sparse matrix, `(callable, n)`.

    A tuple goes on with dtype and device: `(callable, n, torch.float64, "cuda")`; the callable gets vectors of these.
    """
    if isinstance(A, SymmetricOperator):
        return A
    if isinstance(A, torch.Tensor):
        return DenseOperator(A)
    if isinstance(A, tuple) and len(A) in (2, 3, 4) and callable(A[0]):
        return CallableOperator(*A)
    if hasattr(A, "shape") and (hasattr(A, "matvec") or hasattr(A, "tocsr") or type(A).__module__ == "numpy"):
        from fastsharp.linear_map import from_numpy  # numpy's and scipy's world is entered on demand

        return from_numpy(A)
    more = "\nA function alone does not say its dimension: pass (function, n)." if callable(A) else ""
    raise ArgumentTypeError(
        f"cannot make a symmetric operator of a {type(A).__name__}.{more}\n"
        "Pass a SymmetricOperator, a square tensor, a scipy LinearOperator, (callable, n) or (callable, n, dtype)."
    )
