"""The Hessian of a loss over data as a SymmetricOperator."""

from __future__ import annotations

from typing import final

from fastsharp.curvature.finite_sum import FiniteSum


@final
class Hessian(FiniteSum):
    """H = d^2 L / d theta^2 of the weighted mean (or sum) of a loss over frozen data, at the present weights.

    Arguments are those of `fastsharp.lanczos`. `H @ v`, `H @ M` (columns), `H.apply(V)` (rows), `.to_scipy()`.
    Cost: a product is 6U a vector where a batch's graph is kept, 8U to 9U where memory does not allow it (U: one forward
    pass's matrix products; a gradient is 3U); graphs are built in the first product and shared by all vectors of a block.
    At kinks (ReLU, max-pool) it is the Hessian almost everywhere, as autograd defines it.
    Raises StaleOperatorError when weights, buffers or data change afterwards; `.refresh()` takes the new weights.
    """

    kind = "hessian"
    label = "the Hessian"
