"""The Hessian of a loss over data as a SymmetricOperator."""

from __future__ import annotations

from typing import final

from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import HESSIAN


@final
class Hessian(FiniteSum):
    """H = d^2 L / d theta^2 of the weighted mean (or sum) of a loss over frozen data, at the present weights.

    Arguments are those of `fastsharp.lanczos`. `H @ v`, `H @ M` (columns), `H.apply(V)` (rows), `.to_scipy()`.
    Cost: a product is 6U a vector for a batch that is kept (U: one forward pass's matrix products; a gradient is 3U). Batches are
    linearised in the first product, 3U, and those that exceed the memory budget again in every later one, once for all vectors of a
    block: b vectors cost 6U b + 3U there.
    At kinks (ReLU, max-pool) it is the Hessian almost everywhere, as autograd defines it.
    Raises StaleOperatorError when weights, buffers or data change afterwards; `.refresh()` takes the new weights.
    """

    form = HESSIAN
    splits = False
    label = "the Hessian"
