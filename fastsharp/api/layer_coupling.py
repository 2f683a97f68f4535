"""How much of a matrix its diagonal blocks leave out, from random signs z: E ||(H - D) z||^2 = ||H - D||_F^2, D the blocks.

The part of a layer's rows is E ||((H - D) z)_l||^2, exact in expectation; so is a single block, ||H_lm||_F^2 = E ||(H z_m)_l||^2 for z_m that
is zero outside of layer m. Norms of diagonal blocks take the layer's eigenpairs exactly and sample the rest. The standard errors are those
of the probes' means; that of the share is a jackknife.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastsharp import ops
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Coupling, Eigenpairs

Tensor = torch.Tensor


class CouplingProbes:
    """H z for `count` probes z of the whole matrix; then, layer by layer, what the block does to them.

    columns  for each layer, the places of its parameters among the n coordinates
    pairs    estimate every ||H_lm||_F: count products a layer in place of count in all
    """

    def __init__(self, matrix: SymmetricOperator, columns: Sequence[Tensor], count: int, seed: int, *, pairs: bool) -> None:
        self.n_matvec = count * (len(columns) if pairs else 1)
        self._columns, self._count = columns, count
        self._z = torch.empty((count, matrix.n), dtype=matrix.dtype, device=matrix.device)
        ops.probes("rademacher", out=self._z, seed=seed, first=0)
        self._blocks: dict[int, Tensor] = {}
        self._rest: dict[int, Tensor] = {}
        self._pairs: Tensor | None = None
        if not pairs:
            self._Hz = matrix.apply(self._z)
            return
        self._Hz = torch.zeros_like(self._z)
        self._pairs = torch.zeros(count, len(columns), len(columns), dtype=torch.float64)
        for m, places in enumerate(columns):
            z = torch.zeros_like(self._z)
            z[:, places] = self._z[:, places]
            y = matrix.apply(z)
            self._Hz += y
            for i, rows in enumerate(columns):
                self._pairs[:, i, m] = _squares(y[:, rows])

    def see(self, i: int, block: SymmetricOperator | None, found: Eigenpairs | None) -> None:
        """Multiply the probes by the block of layer i (None: zero), whose leading pairs are known; `count` products of the block."""
        places = self._columns[i]
        rest = self._Hz[:, places]
        if block is None or found is None:
            self._blocks[i] = torch.zeros(self._count, dtype=torch.float64)
        else:
            z = self._z[:, places].contiguous()
            y = block.apply(z)
            rest = rest - y
            X, values = found.eigenvectors, found.eigenvalues
            known = (z @ X.T) * values.to(z)
            self._blocks[i] = float(values.square().sum()) + _squares(y - known @ X)
        self._rest[i] = _squares(rest)

    def norms(self, i: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """(||H_ll||_F, ||the rest of layer l's rows||_F), each with its standard error."""
        return _root(self._blocks[i]), _root(self._rest[i])

    def coupling(self) -> Coupling:
        """Of the whole matrix, after every layer has been seen."""
        rest, blocks = (sum(parts.values(), torch.zeros(self._count, dtype=torch.float64)) for parts in (self._rest, self._blocks))
        pairs = stderr = None
        if self._pairs is not None:
            twice = (self._pairs + self._pairs.mT) / 2  # H_lm and H_ml, from different parts of the same probes
            means, errors = twice.mean(0), twice.std(0) / math.sqrt(self._count)
            pairs = means.sqrt()
            stderr = torch.where(means > 0, errors / (2 * pairs), 0.0)
        return Coupling(_root(rest), _root(blocks), _share(rest, blocks), self._count, pairs, stderr)


def _squares(y: Tensor) -> Tensor:
    """||y||^2 by rows, in float64 on the host."""
    squares: Tensor = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).square().cpu()
    return squares


def _root(samples: Tensor) -> tuple[float, float]:
    """The square root of the mean, and its standard error."""
    mean, error = float(samples.mean()), float(samples.std()) / math.sqrt(len(samples))
    return math.sqrt(mean), error / (2 * math.sqrt(mean)) if mean > 0.0 else 0.0


def _share(rest: Tensor, blocks: Tensor) -> tuple[float, float]:
    """rest / (rest + blocks) of the means, and the jackknife's standard error."""

    def share(a: Tensor, b: Tensor) -> Tensor:
        part: Tensor = torch.where(a + b == 0.0, 0.0, a / (a + b))
        return part

    p = len(rest)
    without = share((rest.sum() - rest) / (p - 1), (blocks.sum() - blocks) / (p - 1))
    error = math.sqrt((p - 1) / p * float((without - without.mean()).square().sum()))
    return float(share(rest.mean(), blocks.mean())), error
