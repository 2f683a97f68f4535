"""GGNSpectrum: the whole non-zero spectrum of a Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsharp.errors import InputError
from fastsharp.params import ParamLayout
from fastsharp.results.result import Result


@dataclass(frozen=True, eq=False)
class GGNSpectrum(Result):
    """All non-zero eigenvalues of a Gauss-Newton matrix G (n, n), to rounding; nothing here is an estimate."""

    eigenvalues: torch.Tensor  # (rank,) float64 on the host, descending
    eigenvectors: torch.Tensor | None  # (rank, n) rows of unit norm in the model's dtype; None unless asked for
    n: int
    rows: int  # of the Gram matrix: samples times the rank of the loss's Hessian
    trace: float  # exact, from the Gram matrix
    frobenius: float
    error: float  # ||G v - (its product from the Gram matrix)|| / ||G v|| for one v: a check by the products of `fastsharp.GGN`
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    layout: ParamLayout | None = None

    def __len__(self) -> int:
        return self.eigenvalues.numel()

    @property
    def rank(self) -> int:
        """Eigenvalues apart from zero to rounding."""
        return len(self)

    @property
    def equivalent_products(self) -> float:
        """FLOPs of the Gram matrix and its decomposition, in products with G: a Lanczos run of fewer products is the cheaper way."""
        flops = self.settings["flops"]
        return float(flops["gram"] + flops["eigh"]) / flops["product"] if flops["product"] else math.inf

    def logdet(self, shift: float) -> float:
        """log det(G + c I) for c = `shift`; InputError unless all of G + c I is positive."""
        least = min(0.0, float(self.eigenvalues.min())) if len(self) else 0.0
        zeros = self.n - len(self)
        if not (math.isfinite(shift) and shift + least > 0.0):
            raise InputError(f"logdet: shift is {shift}, the smallest eigenvalue {least:.6g}: G + shift I is not positive definite.")
        return float((self.eigenvalues + shift).log().sum()) + zeros * math.log(shift)

    def effective_dimension(self, shift: float) -> float:
        """tr G (G + c I)^-1 = sum lambda / (lambda + c), for c = `shift` > 0 and a positive semidefinite G."""
        if not (math.isfinite(shift) and shift > 0.0) or (len(self) and float(self.eigenvalues.min()) + shift <= 0.0):
            raise InputError(f"effective_dimension: shift is {shift}; expected a finite number > 0 that makes G + shift I positive.")
        return float((self.eigenvalues / (self.eigenvalues + shift)).sum())

    def stable_rank(self) -> float:
        """||G||_F^2 / ||G||^2."""
        return (self.frobenius / self._largest("stable_rank")) ** 2

    def participation(self) -> float:
        """(tr G)^2 / ||G||_F^2: how many eigenvalues share the trace."""
        self._largest("participation")
        return (self.trace / self.frobenius) ** 2

    def as_dict(self, i: int) -> dict[str, torch.Tensor]:
        """Eigenvector i as {parameter name: tensor of the parameter's shape}."""
        if self.eigenvectors is None or self.layout is None:
            raise InputError("as_dict: the eigenvectors were not asked for. Pass vectors=True.")
        return self.layout.unflatten(self.eigenvectors[i])

    def _largest(self, call: str) -> float:
        if not len(self):
            raise InputError(f"{call}: the Gauss-Newton matrix is zero, so it has no effective rank.")
        return float(self.eigenvalues.abs().max())
