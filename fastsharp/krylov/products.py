"""The products of one run: counted, scaled by one power of two, and checked for NaN and Inf."""

from __future__ import annotations

import math

import torch

from fastsharp.errors import NonFiniteError
from fastsharp.krylov.rows import exponent, largest, scale
from fastsharp.operator import SymmetricOperator

_SAFE_EXPONENT = {torch.float32: 32, torch.float64: 128}  # fourth powers of entries stay inside the range of float64


class Products:
    """W -> 2^-shift A W for rows W; everything computed from it is in units of 2^shift.

    The shift is fixed by the first non-zero product, 0 unless that is far from one. Powers of two are exact, so runs of A and 2^p A
    are bitwise the same.
    """

    def __init__(self, operator: SymmetricOperator, name: str, shift: int | None = None) -> None:
        self.operator = operator
        self.name = name  # of the call, for messages
        self.count = 0
        self.shift = shift
        self.eps = torch.finfo(operator.dtype).eps

    def __call__(self, W: torch.Tensor) -> torch.Tensor:
        """(b, n) -> (b, n), b matvecs. Raises NonFiniteError."""
        U = self.operator.apply(W)
        self.count += W.shape[0]
        size = largest(U) if U.numel() else 0.0
        if not math.isfinite(size):
            raise NonFiniteError(
                f"{self.name}: one of the products {self.count - W.shape[0] + 1} to {self.count} contains NaN or Inf.\n"
                "Check the matrix or callable; a float32 product beyond 3e38 overflows: scale it, or use float64."
            )
        if self.shift is None and size > 0.0:
            e = exponent(size)
            self.shift = e if abs(e) > _SAFE_EXPONENT[U.dtype] else 0
        return scale(U, -self.shift) if self.shift else U

    @property
    def unit(self) -> int:
        """The shift, 0 before the first non-zero product."""
        return self.shift or 0
