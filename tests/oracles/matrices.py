"""Symmetric matrices with known eigenvalues: families built to break eigensolvers, and two large operators with exact spectra.

Every family is independent of fastsharp: the spectrum is prescribed or has a closed form, the matrix is assembled by numpy in float64.
`exact` is None where no closed form is used (random symmetric, W21+): the oracle is then LAPACK's `eigvalsh` of the float64 matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
import torch

from fastsharp.operator import CallableOperator

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """name, A (n, n) float64 exactly representable in `dtype`, its exact eigenvalues ascending (those of the stored A, by LAPACK)."""

    name: str
    A: Array
    exact: Array

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """A copy of A."""
        return torch.tensor(self.A, dtype=dtype)

    @property
    def norm(self) -> float:
        return float(np.abs(self.exact).max(initial=0.0))


@cache
def orthogonal(n: int, seed: int = 1) -> Array:
    """A Haar-distributed orthogonal matrix."""
    Q, R = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return Q * np.sign(np.diag(R))


def _rotated(d: Array, seed: int = 1) -> Array:
    Q = orthogonal(d.size, seed)
    A = (Q * d) @ Q.T
    return (A + A.T) / 2


def _signs(n: int) -> Array:
    return np.where(np.random.default_rng(7).random(n) < 0.5, -1.0, 1.0)


def _even(n: int, ulp: float) -> Array:
    return np.linspace(ulp, 1.0, n)


def _geometric(n: int, ulp: float) -> Array:
    return ulp ** (np.arange(n) / max(n - 1, 1))


def _clustered(n: int, ulp: float) -> Array:
    return np.r_[1.0, np.full(n - 1, ulp)]


def _outliers(n: int, ulp: float) -> Array:
    bulk = np.random.default_rng(3).random(n)
    top = min(3, n)
    bulk[:top] = [100.0, 60.0, 30.0][:top]
    return bulk


def _gap(g: float) -> Callable[[int, float], Array]:
    return lambda n, ulp: np.r_[1.0, 1.0 - g, np.linspace(0.5, 0.0, n)][:n]


def _top(copies: int) -> Callable[[int, float], Array]:
    return lambda n, ulp: np.r_[np.full(copies, 2.0), np.linspace(1.0, -1.0, n)][:n]


def _sizes(n: int, ulp: float) -> Array:
    """Clusters of 1, 2, 4, 8, ... equal values, width ulp."""
    out: list[float] = []
    size, value = 1, 1.0
    while len(out) < n:
        out += [value * (1 - i * ulp) for i in range(size)]
        size, value = 2 * size, value / 2
    return np.array(out[:n])


_SPECTRA: dict[str, Callable[[int, float], Array]] = {
    "even": lambda n, ulp: _even(n, ulp) * _signs(n),
    "geometric": lambda n, ulp: _geometric(n, ulp) * _signs(n),
    "clustered": lambda n, ulp: _clustered(n, ulp) * _signs(n),
    "rank1": lambda n, ulp: np.r_[2.0, np.zeros(n)][:n],
    "rank3": lambda n, ulp: np.r_[5.0, 3.0, -2.0, np.zeros(n)][:n],
    "rank_n_minus_1": lambda n, ulp: np.linspace(0.0, 1.0, n),
    "double_top": _top(2),
    "fivefold_top": _top(5),
    "gap_1e-3": _gap(1e-3),
    "gap_1e-6": _gap(1e-6),
    "gap_1e-9": _gap(1e-9),
    "plus_minus": lambda n, ulp: np.r_[3.0, -3.0, np.linspace(1.0, -1.0, n)][:n],
    "all_negative": lambda n, ulp: -np.linspace(1.0, 2.0, n),
    "outliers": _outliers,
    "null_90": lambda n, ulp: np.r_[np.linspace(1.0, 3.0, max(n // 10, 1)), np.zeros(n)][:n],
    "clusters_1_2_4_8": _sizes,
}
_DIAGONAL = ("even", "geometric", "clustered")


def _wilkinson(n: int) -> Array:
    """W_{2m+1}+: pairs of eigenvalues that agree to working precision, all distinct."""
    return np.diag(np.abs(np.arange(n) - (n - 1) / 2)) + np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)


def _glued_wilkinson(glue: float) -> Array:
    blocks, size = 5, 21
    A = np.kron(np.eye(blocks), _wilkinson(size))
    for i in range(size, blocks * size, size):
        A[i, i - 1] = A[i - 1, i] = glue
    return A


def _plain(n: int) -> dict[str, Callable[[], Array]]:
    R = np.random.default_rng(5).standard_normal((n, n))
    out: dict[str, Callable[[], Array]] = {
        "zero": lambda: np.zeros((n, n)),
        "identity": lambda: np.eye(n),
        "c_identity": lambda: -0.7 * np.eye(n),
        "random": lambda: (R + R.T) / 2,
        "laplacian_1d": lambda: 2 * np.eye(n) - np.diag(np.ones(n - 1), 1) - np.diag(np.ones(n - 1), -1),
        "mikota_squares": lambda: np.diag(np.arange(1.0, n + 1) ** 2),
        "arpack_1315": lambda: np.diag(np.arange(1.0, n + 1)),
    }
    if n % 2:
        out["wilkinson"] = lambda: _wilkinson(n)
    if n >= 100:
        out["wilkinson_21_glued_1e-8"] = lambda: _glued_wilkinson(1e-8)
        out["wilkinson_21_glued_1e-14"] = lambda: _glued_wilkinson(1e-14)
        out["wilkinson_21"] = lambda: _wilkinson(21)
    return out


def _builders(n: int, dtype: torch.dtype) -> dict[str, Callable[[], Array]]:
    ulp = float(torch.finfo(dtype).eps)
    out = _plain(n)
    for name, spectrum in _SPECTRA.items():
        if name in _DIAGONAL:
            out[f"{name}_diagonal"] = lambda s=spectrum: np.diag(s(n, ulp))
        out[f"{name}_rotated"] = lambda s=spectrum: _rotated(s(n, ulp))
    return out


def families(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """All families at size n; the glued Wilkinson matrices, of fixed size, come with n >= 100."""
    return (family(name, n, dtype) for name in _builders(n, dtype))


@cache
def family(name: str, n: int, dtype: torch.dtype) -> Case:
    """One family by name; built once and read-only."""
    return _stored(name, _builders(n, dtype)[name](), dtype)


def scaled_families(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """Five families times sqrt(overflow), sqrt(underflow), 1e30, 1e-30."""
    info = torch.finfo(dtype)
    for name in ("even_rotated", "rank3_rotated", "outliers_rotated", "plus_minus_rotated", "random"):
        case = family(name, n, dtype)
        for label, factor in (("sqrt_overflow", info.max**0.5), ("sqrt_underflow", info.tiny**0.5), ("1e30", 1e30), ("1e-30", 1e-30)):
            A = case.A * (factor / max(case.norm, 1.0))
            yield _stored(f"{name}_x_{label}", A, dtype)


def _stored(name: str, A: Array, dtype: torch.dtype) -> Case:
    """A rounded to dtype: the eigenvalues are those of what the solver is given."""
    A = torch.tensor(A, dtype=dtype).double().numpy()
    A.flags.writeable = False
    scale = 2.0 ** -np.frexp(np.abs(A).max(initial=0.0))[1]
    return Case(name, A, np.linalg.eigvalsh(A * scale) / scale)


N_LARGE = 32_768


def outlier_spectrum(n: int = N_LARGE, seed: int = 0) -> Array:
    """12 values from 60 to 3, a positive and a negative exponential bulk, a quarter at 1e-4: like the Hessian of a trained network."""
    g = np.random.default_rng(seed)
    rest = n - 12 - n // 2 - n // 4
    return np.r_[np.geomspace(60, 3, 12), g.exponential(0.08, n // 2), -g.exponential(0.03, n // 4), 1e-4 * g.standard_normal(rest)]


def power_law_spectrum(n: int = N_LARGE, seed: int = 0) -> Array:
    """60 i^-0.8 and -4 i^-0.8 around a bulk of 1e-4: no gap between outliers and bulk, so that a value can be missed."""
    g = np.random.default_rng(seed)
    return np.r_[60 * np.arange(1, 2001) ** -0.8, -4 * np.arange(1, 1001) ** -0.8, 1e-4 * g.standard_normal(n - 3000)]


class DctSpectrum:
    """H = D C' L C D: C the orthonormal DCT-II, D random signs, L the eigenvalues in random order; O(n log n) per product.

    Eigenvector of L_p is D C' e_p. `operator` is fp32 or fp64 as asked for.
    """

    def __init__(self, eigenvalues: Array, dtype: torch.dtype, seed: int = 0) -> None:
        g = np.random.default_rng(seed + 1)
        self.n = eigenvalues.size
        self.dtype = dtype
        self.eigenvalues = np.sort(eigenvalues)[::-1].copy()
        self._np = np.float32 if dtype == torch.float32 else np.float64
        self._L = g.permutation(eigenvalues).astype(self._np)
        self._D = np.where(g.random(self.n) < 0.5, -1, 1).astype(self._np)
        self.operator = CallableOperator(self._product, self.n, dtype)

    def eigenvector(self, rank: int) -> torch.Tensor:
        """The eigenvector of the rank-th largest eigenvalue, rank 0 the top."""
        e = np.zeros(self.n, dtype=self._np)
        e[np.argsort(-self._L, kind="stable")[rank]] = 1
        return torch.from_numpy(self._D * scipy.fft.idct(e, norm="ortho", workers=2))

    def _product(self, v: torch.Tensor) -> torch.Tensor:
        x = scipy.fft.dct(self._D * v.numpy(), norm="ortho", workers=2)
        return torch.from_numpy(self._D * scipy.fft.idct(self._L * x, norm="ortho", workers=2))
