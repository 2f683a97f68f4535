"""Samples of tr B and ||B||_F^2 for B = P H P, the part of H that a known space leaves: z'Bz and ||Bz||^2 for Rademacher z.

Source: Hutchinson 1990; the deflation is that of Hutch++ (Meyer, Musco, Musco and Woodruff 2021). For a diagonal B both are exact.
"""

from __future__ import annotations

import math

import torch

from fastsharp import ops
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.krylov.growth import grow
from fastsharp.krylov.products import Products
from fastsharp.krylov.rows import chunks
from fastsharp.krylov.stages import BLOCK, Drawn

_UNITS = 64  # unit vectors per product


class Complement:
    """Draws samples of B, block by block; every probe of the stream of `seed` is used once.

    squares  sample ||Bz||^2 in place of z'Bz
    """

    def __init__(self, products: Products, space: KrylovSpace, seed: int, *, squares: bool = False) -> None:
        self.products = products
        self.space = space
        self.squares = squares
        self.seed = seed
        self.drawn = 0
        self._largest = 0.0  # ||z|| ||Hz|| or ||Hz||^2 of a probe
        self._images: torch.Tensor | None = None
        self._ahead: torch.Tensor | None = None  # where the Krylov steps go on
        self._moved: float | None = None  # energy that the last of them moved

    @property
    def known(self) -> float:
        """The part that takes no sample."""
        return self.space.squares if self.squares else self.space.trace

    @property
    def rounding(self) -> float:
        """8 eps times what is added up: how far the products themselves may be off."""
        known = self.space.squares if self.squares else float(self.space.T.diagonal().abs().sum())
        return 8 * self.products.eps * (self._largest + known)

    @property
    def known_energy(self) -> float:
        return self.space.squares

    def draw(self) -> Drawn:
        """BLOCK samples for BLOCK products."""
        z, u, size = self.block()
        self.see(size)
        return (square_samples if self.squares else trace_samples)(z, u)

    def see(self, size: float) -> None:
        """Take note of ||Hz|| for the rounding."""
        self._largest = max(self._largest, size**2 if self.squares else math.sqrt(self.products.operator.n) * size)

    def block(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The next BLOCK probes z, their images u = Bz, and the largest ||Hz||."""
        operator = self.products.operator
        z = torch.empty((BLOCK, operator.n), dtype=operator.dtype, device=operator.device)
        ops.probes("rademacher", out=z, seed=self.seed, first=self.drawn)
        self.drawn += BLOCK
        u = self.products(self.space.project(z.clone()))
        size = max(float(torch.linalg.vector_norm(row, dtype=torch.float64)) for row in u)
        self.space.project(u)
        self._images = u
        return z, u, size

    def lengthen(self, samples: float, energy: float, left: float) -> bool:
        """Krylov steps from the space, or from an image of the last block, while they pay (`growth`); False if there was nothing to gain."""
        if self._moved is not None and samples * self._moved <= BLOCK * energy:
            return False

        def block() -> float:
            ahead = self._images[0] if self._ahead is None and self._images is not None else self._ahead
            if ahead is None or self.space.size + BLOCK > self.products.operator.n:
                return 0.0
            before = self.space.squares
            self.space, self._ahead = self.space.lengthened(ahead, BLOCK, self.products)
            self._images = None
            return self.space.squares - before

        grown, self._moved = grow(block, samples, energy, left)
        return grown

    def absorb(self, samples: float, energy: float, left: float) -> bool:
        """Put the images of the last block into the space, at most BLOCK products; False if there is nothing to gain."""
        if self._images is None or self.space.size + BLOCK > self.products.operator.n:
            return False
        grown = self.space.grown(self._images, self.products)
        self._images = None
        gained = grown.size > self.space.size
        self.space = grown
        return gained


def trace_samples(z: torch.Tensor, u: torch.Tensor) -> Drawn:
    """z'u per row, with variance 2 sum_i s_i^2(z_i u_i), for rows z (b, n) of signs and u = Bz; see `stages`."""
    values = torch.zeros(z.shape[0], dtype=torch.float64, device=z.device)
    variance, energy = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for c in chunks(z.shape[1]):
        y = z[:, c].double() * u[:, c].double()
        values += y.sum(1)
        variance += y.var(0).sum()
        energy += y.square().sum()
    return Drawn(values.cpu(), 2 * float(variance), float(energy) / z.shape[0])


def square_samples(z: torch.Tensor, u: torch.Tensor) -> Drawn:
    """||u||^2 per row for u = Bz, with its variance from pairs of rows: E (u_k'u_l)^2 = ||B^2||_F^2 for k != l.

    The variance of a quadratic form in signs leaves out the diagonal of B^2: E sum_i u_ki^2 u_li^2 = sum_i (B^2)_ii^2. Where all
    values agree to rounding, as for a diagonal B, the variance is zero. The pairs cancel where the diagonal rules, so the values' own
    variance, unbiased as well, takes over where it is the larger one: a little wide, never short.
    """
    b = u.shape[0]
    gram = torch.zeros((b, b), dtype=torch.float64, device=u.device)
    diagonal = torch.zeros_like(gram)
    for c in chunks(u.shape[1]):
        part = u[:, c].double()
        gram += part @ part.T
        diagonal += part.square() @ part.square().T
    values = gram.diagonal().clone()
    mean = float(values.mean())
    if float((values - mean).abs().max()) <= 8 * torch.finfo(u.dtype).eps * mean:
        return Drawn(values.cpu(), 0.0, mean)
    apart = ~torch.eye(b, dtype=torch.bool, device=u.device)
    pairs = float((gram.square() - diagonal)[apart].mean())
    return Drawn(values.cpu(), max(2 * pairs, float(values.var())), mean)


def diagonal(products: Products, *, squares: bool) -> tuple[float, float]:
    """sum_i e_i'H e_i, or sqrt(sum_i ||H e_i||^2), by n products with unit vectors; and its rounding."""
    operator = products.operator
    total, size = 0.0, 0.0
    for i in range(0, operator.n, _UNITS):
        b = min(_UNITS, operator.n - i)
        E = torch.zeros((b, operator.n), dtype=operator.dtype, device=operator.device)
        E.diagonal(i).fill_(1.0)
        U = products(E)
        for row, entry in zip(U, U.diagonal(i).tolist(), strict=True):
            norm = float(torch.linalg.vector_norm(row, dtype=torch.float64))
            total += norm**2 if squares else entry
            size += norm**2 if squares else norm
    if squares:
        return math.sqrt(total), 8 * products.eps * math.sqrt(size)
    return total, 8 * products.eps * size
