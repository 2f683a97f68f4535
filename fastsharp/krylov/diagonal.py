"""The diagonal and the row norms of a symmetric operator by random probes, every entry with its standard error.

Note on numerical properties
----------------------------
Entries of A z differ by rounding of eps ||A_i|| sqrt(n) at worst and a few eps ||A_i|| as a rule; standard errors include
4 eps rms_k |(A z_k)_i|, the same size up to chance, so that the interval of an entry without variance (a diagonal A) holds it.
Samples are added up in float64, centred at the first one: the variance of nearly equal samples does not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastsharp import ops, quantiles
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted
from fastsharp.krylov.products import Products
from fastsharp.krylov.symmetry import CHECKS, PROBE_PRODUCTS, needs_probes, probe
from fastsharp.operator import SymmetricOperator
from fastsharp.results import DiagonalEstimate

METHODS = ("auto", "hutchinson", "xdiag", "exact")
BLOCK = 8  # probes of one product
LEAST = 16  # samples: quantiles of Student's and the chi-square law are good from there on
_UNITS = 64  # unit vectors of one product
_ROUNDING = 4.0  # eps times the size of a product's entry

OnStep = Callable[[int, tuple[float, ...], float], None]


class _Law(Protocol):
    """What a sample is, and the interval that its law gives."""

    name: str
    probe: str

    def __call__(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor: ...

    def finish(self, seen: _Moments, confidence: float) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]: ...


class _Entries:
    """x_i = z_i (A z)_i for signs z: mean A_ii, variance sum_{j != i} A_ij^2."""

    name, probe = "diagonal", "rademacher"

    def __call__(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return z * u

    def finish(self, seen: _Moments, confidence: float) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
        t = quantiles.student((1 + confidence) / 2, seen.count - 1)
        return seen.mean, seen.stderr(), (-t, t)


class _Rows:
    """x_i = (A z)_i^2 for normal z: ||A_i||^2 times a chi-square variable of one degree of freedom, whatever A is."""

    name, probe = "row_norms", "normal"

    def __call__(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u

    def finish(self, seen: _Moments, confidence: float) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
        m = seen.count
        value = seen.square.sqrt()
        low, high = (quantiles.chi_square_over_dof(p, m) for p in ((1 + confidence) / 2, (1 - confidence) / 2))
        scale = math.sqrt(2 * m)  # the standard error of the root is value / sqrt(2 m)
        return value, value / scale, ((low**-0.5 - 1) * scale, (high**-0.5 - 1) * scale)


class _Moments:
    """Means, centred sums of squares and mean squares of the samples, entry by entry in float64."""

    def __init__(self, n: int, device: torch.device, eps: float) -> None:
        self.count, self.eps = 0, eps
        self._shift: torch.Tensor | None = None
        self._sum, self._squares, self._raw = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(3))

    def add(self, X: torch.Tensor) -> None:
        for x in X:
            x = x.double()
            if self._shift is None:
                self._shift = x.clone()
            self._raw.addcmul_(x, x)
            x = x - self._shift
            self._sum += x
            self._squares.addcmul_(x, x)
            self.count += 1

    @property
    def mean(self) -> torch.Tensor:
        assert self._shift is not None
        return self._shift + self._sum / self.count

    @property
    def square(self) -> torch.Tensor:
        return self._raw / self.count

    def stderr(self) -> torch.Tensor:
        """Of the mean: the samples' own, and what the products are off by."""
        centred = (self._squares - self._sum.square() / self.count).clamp_(min=0.0)
        chance = centred / (self.count * (self.count - 1))
        return (chance + (_ROUNDING * self.eps) ** 2 * self.square).sqrt_()


def check_arguments(name: str, *, products: int, method: str, confidence: float, seed: int, check: str = "auto") -> None:
    """The arguments of both estimates, checked before any work. Raises ArgumentTypeError or InputError."""
    for argument, number in (("products", products), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ArgumentTypeError(f"{name}: {argument} is {number!r}, a {type(number).__name__}; expected an int.")
    choices = tuple(m for m in METHODS if m != "xdiag") if name == "row_norms" else METHODS
    for argument, value, known in (("method", method, choices), ("check", check, CHECKS)):
        if value not in known:
            raise InputError(f"{name}: {argument} is {value!r}, expected one of {', '.join(map(repr, known))}.")
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)):
        raise ArgumentTypeError(f"{name}: confidence is {confidence!r}, a {type(confidence).__name__}; expected a float.")
    if not 0.5 <= confidence <= 0.99:
        raise InputError(f"{name}: confidence is {confidence}, expected a share between 0.5 and 0.99, such as 0.95.")
    least = 2 * LEAST if method == "xdiag" else LEAST
    if products < least and method != "exact":
        raise InputError(f"{name}: products is {products}, too few for an interval. Pass at least {least}.")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"{name}: seed is {seed}, expected a 64-bit integer.")


def diagonal(
    operator: SymmetricOperator,
    *,
    products: int = 128,
    method: str = "auto",
    confidence: float = 0.95,
    seed: int = 0,
    check: str = "auto",
    on_step: OnStep | None = None,
) -> DiagonalEstimate:
    """diag(A) = E z o (A z) for random signs z; with "xdiag", diag(Q Q'A) exactly and the rest by probes that Q does not know.

    products   products to be made; n of them and more give the diagonal without chance, by unit vectors
    method     "hutchinson": one sample a product, 40 n bytes; "xdiag": one a pair of products, 2 (products / 2) n numbers, far
               smaller errors where the spectrum decays, an approximate interval; "exact": n products, whatever `products` is;
               "auto": "exact" where products >= n, else "hutchinson"
    check      as in `lanczos`: 4 products that probe symmetry and repeatability
    ->         DiagonalEstimate

    Raises InputError, ArgumentTypeError, NonFiniteError, NotSymmetricError, NondeterministicOperatorError, StaleOperatorError.
    Ctrl-C: Interrupted with `.partial`, from the probes so far ("hutchinson").
    Sources: Bekas, Kokiopoulou and Saad 2007; XDiag: Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45 (2024).
    """
    return _estimate(_Entries(), operator, products, method, confidence, seed, check, on_step)


def row_norms(
    operator: SymmetricOperator,
    *,
    products: int = 128,
    method: str = "auto",
    confidence: float = 0.95,
    seed: int = 0,
    check: str = "auto",
    on_step: OnStep | None = None,
) -> DiagonalEstimate:
    """||A_i|| = sqrt(E (A z)_i^2) for normal z, which makes (A z)_i normal for every A: the interval is that of the chi-square law.

    `value**2` is the unbiased estimate of sum_j A_ij^2. Arguments and errors as for `diagonal`, without "xdiag".
    """
    return _estimate(_Rows(), operator, products, method, confidence, seed, check, on_step)


def _estimate(
    law: _Law,
    operator: SymmetricOperator,
    wanted: int,
    method: str,
    confidence: float,
    seed: int,
    check: str,
    on_step: OnStep | None,
) -> DiagonalEstimate:
    check_arguments(law.name, products=wanted, method=method, confidence=confidence, seed=seed, check=check)
    if method == "auto":
        method = "exact" if wanted >= operator.n else "hutchinson"
    if method == "xdiag" and wanted > operator.n:
        raise InputError(f"{law.name}: {wanted} products are more than n = {operator.n}. Pass method='exact', or fewer products.")
    products = Products(operator, law.name)
    settings = {"products": wanted, "method": method, "confidence": confidence, "seed": seed}
    operator.check_unchanged()
    if needs_probes(operator, check):
        probe(operator, seed, law.name)
        products.count += PROBE_PRODUCTS
    if method == "exact":
        result = _result(products, _exact(law, products, on_step), confidence, 0, settings, "nothing is left to chance")
    elif method == "xdiag":
        result = _xdiag(products, wanted // 2, confidence, seed, on_step, settings)
    else:
        result = _sampled(law, products, wanted, confidence, seed, on_step, settings)
    operator.check_unchanged()
    return result


def _sampled(
    law: _Law, products: Products, m: int, confidence: float, seed: int, on_step: OnStep | None, settings: dict[str, Any]
) -> DiagonalEstimate:
    operator = products.operator
    seen = _Moments(operator.n, operator.device, products.eps)

    def estimate(*notes: str) -> DiagonalEstimate:
        return _result(products, law.finish(seen, confidence), confidence, seen.count, settings, *notes)

    try:
        while seen.count < m:
            z = torch.empty((min(BLOCK, m - seen.count), operator.n), dtype=operator.dtype, device=operator.device)
            ops.probes(law.probe, out=z, seed=seed, first=seen.count)
            seen.add(law(z, products(z)))
            if on_step is not None:
                on_step(seen.count, (), m)
    except KeyboardInterrupt as interrupt:
        partial = estimate("the run was interrupted") if seen.count >= LEAST else None
        raise Interrupted(f"{law.name}: interrupted after {seen.count} of {m} probes.", partial) from interrupt
    return estimate()


def _xdiag(products: Products, m: int, confidence: float, seed: int, on_step: OnStep | None, settings: dict[str, Any]) -> DiagonalEstimate:
    """The mean over i of diag(P_i A) + w_i o (I - P_i) A w_i, where P_i projects on the images of all probes but w_i.

    With A W = Q R and s_i the normalised column i of R^-*, P_i = Q (I - s_i s_i') Q', and (I - P_i) A w_i = (s_i'r_i) Q s_i.
    """
    operator = products.operator
    W = torch.empty((m, operator.n), dtype=operator.dtype, device=operator.device)
    ops.probes("rademacher", out=W, seed=seed)
    Y = torch.cat([_step(products, part, on_step, 2 * m) for part in torch.split(W, BLOCK)])
    Q, R = torch.linalg.qr(Y.T)  # (n, m), (m, m)
    size = R.abs().max()
    if not bool(R.diagonal().abs().min() > m * products.eps * size):
        raise InputError(
            f"diagonal: the images of {m} probes are dependent to rounding: the rank of the matrix is below {m}.\n"
            "Pass fewer products, or method='hutchinson'."
        )
    Z = torch.cat([_step(products, part.contiguous(), on_step, 2 * m) for part in torch.split(Q.T, BLOCK)])
    R = R.double()
    S = torch.linalg.solve_triangular(R, torch.eye(m, dtype=R.dtype, device=R.device), upper=True).T  # R^-*: columns s_i
    S /= S.norm(dim=0)
    through = (S * R).sum(0)
    value = torch.empty(operator.n, dtype=torch.float64, device=operator.device)
    stderr = torch.empty_like(value)
    for part in torch.split(torch.arange(operator.n, device=operator.device), 1 << 12):
        q, z = Q[part].double(), Z[:, part].double().T
        qs = q @ S
        base = (q * z).sum(1)
        sample = W[:, part].double().T * qs * through - qs * (z @ S)  # (part, m)
        value[part] = base + sample.mean(1)
        rounding = (_ROUNDING * products.eps) ** 2 * z.square().sum(1)
        stderr[part] = (sample.var(1) / m + rounding).sqrt()
    t = quantiles.student((1 + confidence) / 2, m - 1)
    note = "xdiag: leave-one-out estimates share their other probes, so intervals are approximate: stated 95 % held 85 to 95 % on test matrices"
    return _result(products, (value, stderr, (-t, t)), confidence, m, settings, note)


def _step(products: Products, rows: torch.Tensor, on_step: OnStep | None, total: int) -> torch.Tensor:
    U = products(rows)
    if on_step is not None:
        on_step(products.count, (), total)
    return U


def _exact(law: _Law, products: Products, on_step: OnStep | None) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """The quantity by unit vectors; the standard error is the rounding of a product."""
    operator = products.operator
    value = torch.empty(operator.n, dtype=torch.float64, device=operator.device)
    stderr = torch.empty_like(value)
    for i in range(0, operator.n, _UNITS):
        b = min(_UNITS, operator.n - i)
        E = torch.zeros((b, operator.n), dtype=operator.dtype, device=operator.device)
        E.diagonal(i).fill_(1.0)
        U = _step(products, E, on_step, operator.n)
        norms = torch.linalg.vector_norm(U, dim=1, dtype=torch.float64)
        value[i : i + b] = norms if law.name == "row_norms" else U.diagonal(i)[:b].double()
        stderr[i : i + b] = _ROUNDING * products.eps * norms
    return value, stderr, (-2.0, 2.0)


def _result(
    products: Products,
    found: tuple[torch.Tensor, torch.Tensor, tuple[float, float]],
    confidence: float,
    samples: int,
    settings: dict[str, Any],
    *notes: str,
) -> DiagonalEstimate:
    value, stderr, spread = found
    scale = math.ldexp(1.0, products.unit)
    operator = products.operator
    return DiagonalEstimate(
        value=value * scale,
        stderr=stderr * scale,
        spread=spread,
        confidence=confidence,
        samples=samples,
        n_matvec=products.count,
        notes=(*operator.notes, *notes),
        settings={**operator.settings, **settings},
        provenance=operator.provenance,
        layout=operator.layout,
    )
