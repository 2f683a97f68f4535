"""Samples of tr f(H) by stochastic Lanczos quadrature: z'f(H)z from the Krylov space of z.

With the eigenpairs (theta_j, s_j) of T after m steps from z,  z'f(H)z = ||z||^2 sum_j s_j1^2 f(theta_j), exact for polynomials up to
degree 2 m - 1 (Golub and Meurant 2010, section 3), and f(H) z = ||z|| V' f(T) e_1.

Note on numerical properties. What the quadrature misses is taken as its change over the last 4 steps, and a run goes on until that
is below a tenth of the tolerance, or to `max_steps`; the mean over the probes is added to both sides of the interval. That is an
estimate, not a bound: it is reliable for f smooth on the spectrum, where the change falls geometrically, and grows honest rather
than small for jumps. The number of steps depends on the quadrature of the probe alone, not on the mean over probes, so that it
biases no interval beyond this term.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastsharp import ops, rng
from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.krylov.hutchinson import trace_samples
from fastsharp.krylov.products import Products
from fastsharp.krylov.rows import exponent, largest, scaled
from fastsharp.krylov.stages import BLOCK, Drawn
from fastsharp.krylov.tridiagonal import Tridiagonal

Function = Callable[[torch.Tensor], torch.Tensor]

_LOOK_BACK = 4
_SHARE = 0.1  # of the tolerance, for the quadrature


class Quadrature:
    """Draws samples of tr f(H), block by block; a sample costs the steps that its quadrature takes."""

    known = known_energy = 0.0

    def __init__(self, products: Products, f: Function, seed: int, rtol: float, atol: float, max_steps: int) -> None:
        self.products = products
        self.f = f
        self.seed = seed
        self.rtol, self.atol = _SHARE * rtol, _SHARE * atol
        self.max_steps = max_steps
        self.drawn = 0
        self.steps = 0  # of the longest run
        self.rounding = 0.0

    def draw(self) -> Drawn:
        """BLOCK samples."""
        operator = self.products.operator
        z = torch.empty((BLOCK, operator.n), dtype=operator.dtype, device=operator.device)
        ops.probes("rademacher", out=z, seed=self.seed, first=self.drawn)
        self.drawn += BLOCK
        u = torch.empty_like(z)
        values, missed = zip(*(self._quadrature(probe, image) for probe, image in zip(z, u, strict=True)), strict=True)
        drawn = trace_samples(z, u)
        largest = max(float(row.double().norm()) for row in u)
        self.rounding = max(self.rounding, 8 * self.products.eps * math.sqrt(operator.n) * largest)
        return Drawn(torch.tensor(values, dtype=torch.float64), drawn.variance, drawn.energy, sum(missed) / BLOCK)

    def _quadrature(self, z: torch.Tensor, image: torch.Tensor) -> tuple[float, float]:
        """z'f(H)z and what it may be off by; image <- f(H) z."""
        operator = self.products.operator

        def draw() -> torch.Tensor:  # a closed block ends the run, so none is ever drawn
            return rng.normal(operator.n, rng.generator(0), operator.dtype, operator.device)

        run = Tridiagonal(operator, z, draw, min(operator.n, self.max_steps), call=self.products.name)
        square = float(operator.n)  # ||z||^2 for signs
        history: list[float] = []
        while True:
            run.step()
            self.products.count += 1
            theta, S = run.blocks[0].solve()
            values = evaluate(self.f, scaled(theta, run.shift or 0), self.products.name)
            history.append(square * float((S[:, 0].square() * values).sum()))
            if run.blocks[0].closed:
                value, missed = history[-1], 0.0
                break
            value, missed = self._known(history, run, square)
            if missed <= max(self.rtol * abs(value), self.atol) or len(history) >= self.max_steps:
                missed = missed if math.isfinite(missed) else abs(value)
                break
        self.steps = max(self.steps, len(history))
        weights = (math.sqrt(square) * (S.T @ (values * S[:, 0])))[None].to(image.device)
        ops.combine(weights, run.V, out=image[None])
        return value, missed

    def _known(self, history: list[float], run: Tridiagonal, square: float) -> tuple[float, float]:
        """z'f(H)z and what it may be off by, from the quadratures so far; `square` is ||z||^2."""
        missed = max(abs(history[-1] - v) for v in history[-1 - _LOOK_BACK : -1]) if len(history) > _LOOK_BACK else math.inf
        return history[-1], missed


def evaluate(f: Function, nodes: torch.Tensor, name: str) -> torch.Tensor:
    """f on the nodes (m,) float64, checked: same shape, real, finite. Raises ArgumentTypeError or InputError."""
    values = f(nodes.clone())
    if not isinstance(values, torch.Tensor):
        raise ArgumentTypeError(f"{name}: f returned a {type(values).__name__}, expected a float64 tensor of the shape of its argument.")
    if values.shape != nodes.shape or values.is_complex():
        raise InputError(
            f"{name}: f returned {values.dtype} of shape {tuple(values.shape)}, expected real values of shape {tuple(nodes.shape)}."
        )
    values = values.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(values).all()):
        i = int((~torch.isfinite(values)).nonzero()[0, 0])
        raise InputError(f"{name}: f({float(nodes[i]):.6g}) is {float(values[i])}. Pass a function that is finite on the whole spectrum.")
    return values


def log_shifted(shift: float, name: str) -> Function:
    """lambda -> log(lambda + shift), refusing lambda <= -shift."""

    def f(nodes: torch.Tensor) -> torch.Tensor:
        lowest = float(nodes.min())
        if not lowest > -shift:
            raise InputError(
                f"{name}: a Ritz value is {lowest:.6g}, so H + {shift:g} I is not positive definite and has no real log-determinant.\n"
                f"Pass shift > {-lowest:.6g}."
            )
        return (nodes + shift).log()

    return f


def spectral_sum(products: Products, f: Function) -> tuple[float, float]:
    """sum_i f(lambda_i) of the assembled matrix, n products and n^2 numbers; and 8 eps sum_i |f(lambda_i)|."""
    operator = products.operator
    eye = torch.eye(operator.n, dtype=operator.dtype, device=operator.device)
    A = torch.cat([products(rows).double().cpu() for rows in torch.split(eye, 64)])
    e = exponent(largest(A))
    A = scaled(A, -e)
    values = evaluate(f, scaled(torch.linalg.eigvalsh((A + A.T) / 2), e), products.name)
    return float(values.sum()), 8 * products.eps * float(values.abs().sum())
