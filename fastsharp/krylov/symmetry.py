"""Is it one symmetric matrix?  u'Hv = v'Hu for random u, v, and H u twice gives the same vector.

Note on numerical properties
----------------------------
|u'Hv - v'Hu| is held against max||u|| max||Hv|| over the three probes, not against |u'Hv|, which is small by chance. Let e be the
rounding of a product. For a random probe u independent of e, |u'e| is about ||e||, not ||u|| ||e||, so a gate of 16 eps ||u|| ||Hv||
with ||u|| = sqrt(n) admits ||e|| up to 16 sqrt(n) eps ||Hv|| (at three sigma a third of that). Sums of n terms in working precision
err by sqrt(n) eps ||Hv|| as a random walk, less with blocked summation: no false alarm at any n. (Healthy networks stay below
0.5 eps, the weakest broken product seen reaches 4.5e-6.) The maximum over the probes keeps the scale away from a single product that
cancels by chance.
"""

from __future__ import annotations

import math

import torch

from fastsharp import rng
from fastsharp.errors import NondeterministicOperatorError, NonFiniteError, NotSymmetricError
from fastsharp.krylov.rows import dot, exponent, largest, norm, scale
from fastsharp.operator import DenseOperator, SymmetricOperator

PROBE_PRODUCTS = 4
CHECKS = ("auto", "on", "off")

_SYMMETRY_GATE = 16.0
_REPEAT_GATE = 64.0  # for devices whose reductions need not be ordered


def needs_probes(operator: SymmetricOperator, check: str) -> bool:
    """Whether `check` asks for probes; a DenseOperator was compared with its transpose at construction."""
    return check == "on" or (check == "auto" and not isinstance(operator, DenseOperator))


def probe(operator: SymmetricOperator, seed: int, name: str) -> None:
    """Three symmetry pairs and one repeated product: 4 matvecs; `name` is the call that messages begin with.

    Raises NotSymmetricError, NondeterministicOperatorError or NonFiniteError, each with the numbers seen.
    """
    g = rng.generator(seed)
    U = torch.stack([rng.normal(operator.n, g, operator.dtype, operator.device) for _ in range(3)])
    HU = operator.apply(U)
    size = largest(HU)
    if not math.isfinite(size):
        raise NonFiniteError(f"{name}: a product of the operator with a random probe contains NaN or Inf. Check the matrix or callable.")
    again = operator.apply(U[:1])[0]
    scale(HU, -exponent(size))
    scale(again, -exponent(size))
    eps = torch.finfo(operator.dtype).eps

    difference, first = norm(again - HU[0]), norm(HU[0])  # NaN in `again` alone fails the test below
    if not difference <= (0.0 if operator.device.type == "cpu" else _REPEAT_GATE * eps * first):
        raise NondeterministicOperatorError(
            f"{name}: two products with the same vector differ by {difference / first if first else math.inf:.2g} of their norm.\n"
            "A run needs one fixed matrix: fix the data order, seeds, dropout masks and batch statistics."
        )
    size = max(norm(u) for u in U) * max(norm(h) for h in HU)
    defect = max(abs(dot(U[i], HU[j]) - dot(U[j], HU[i])) for i, j in ((0, 1), (0, 2), (1, 2)))
    if defect > _SYMMETRY_GATE * eps * size:
        raise NotSymmetricError(
            f"{name}: |u'Hv - v'Hu| is {defect / size:.2g} ||u|| ||Hv|| for random u and v, "
            f"beyond rounding ({_SYMMETRY_GATE * eps:.2g}).\n"
            "Pass the symmetric part (A + A') / 2 if it is meant, or check the product."
        )
