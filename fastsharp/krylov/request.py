"""What the caller of a solver asked for, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, NonFiniteError, ShapeError
from fastsharp.krylov.stopping import CRITERIA, WHICH
from fastsharp.krylov.symmetry import CHECKS
from fastsharp.operator import SymmetricOperator

METHODS = ("auto", "lanczos", "dense")


@dataclass(frozen=True)
class Request:
    """Checked arguments of `lanczos`; `method` and `max_iter` hold what will be used, never "auto" or None."""

    k: int
    which: str
    tol: float
    criterion: str
    max_iter: int
    method: str
    verify: bool
    seed: int
    strict: bool
    check: str

    def settings(self) -> dict[str, Any]:
        """The arguments, for the record of a result."""
        return dict(vars(self))


def check_arguments(
    n: int,
    *,
    k: int,
    which: str,
    tol: float,
    criterion: str,
    max_iter: int | None,
    method: str,
    verify: bool = True,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
) -> Request:
    """The arguments of `lanczos` for an operator on R^n, checked and completed; costs nothing, so callers may check before they build.

    Raises ArgumentTypeError or InputError, naming the argument, its value and what is possible."""
    _integer("k", k)
    if k < 1:
        raise InputError(f"lanczos: k is {k}, expected at least 1: the number of eigenpairs wanted.")
    if k > n:
        raise InputError(f"lanczos: k = {k} eigenpairs were asked for, but the operator has n = {n}. Pass k <= {n}.")
    _choice("which", which, WHICH)
    _choice("criterion", criterion, CRITERIA)
    _choice("method", method, METHODS)
    _choice("check", check, CHECKS)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise ArgumentTypeError(f"lanczos: tol is a {type(tol).__name__}, expected a float.")
    if not (tol > 0.0 and math.isfinite(tol)):
        raise InputError(f"lanczos: tol is {tol}, expected a finite number > 0, such as 1e-3.")
    _integer("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"lanczos: seed is {seed}, expected a 64-bit integer.")
    if max_iter is None:
        max_iter = max(20 * k, 300)
    else:
        _integer("max_iter", max_iter)
        if max_iter < k:
            raise InputError(f"lanczos: max_iter = {max_iter} products cannot give k = {k} eigenpairs. Pass max_iter >= k, or a smaller k.")
    if method == "auto":
        method = "dense" if n <= max(64, 2 * k) else "lanczos"
    return Request(k, which, float(tol), criterion, min(n, max_iter), method, bool(verify), seed, bool(strict), check)


def check_start(operator: SymmetricOperator, v0: torch.Tensor) -> None:
    """v0 must be a finite, non-zero vector that fits the operator."""
    if not isinstance(v0, torch.Tensor):
        raise ArgumentTypeError(f"lanczos: v0 is a {type(v0).__name__}, expected a torch.Tensor of shape ({operator.n},).")
    if v0.shape != (operator.n,):
        raise ShapeError(f"lanczos: v0 has shape {tuple(v0.shape)}, expected ({operator.n},).")
    if v0.dtype != operator.dtype:
        raise DtypeError(f"lanczos: v0 is {v0.dtype}, the operator is {operator.dtype}. Convert with v0.to({operator.dtype}).")
    if v0.device != operator.device:
        raise DeviceError(f"lanczos: v0 is on {v0.device}, the operator on {operator.device}. Move it with v0.to('{operator.device}').")
    if not bool(torch.isfinite(v0).all()):
        raise NonFiniteError("lanczos: v0 contains NaN or Inf. Pass a finite vector, or v0=None for a random one.")
    if not bool(v0.any()):
        raise InputError("lanczos: v0 is the zero vector, which starts no Krylov space. Pass v0=None for a random one.")


def _integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"lanczos: {name} is {value!r}, a {type(value).__name__}; expected an int.")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"lanczos: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}.")
