"""Products of one batch by the R-operator: `rop` behind the interface of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsharp.curvature.autograd import lacks_second_derivative, no_second_derivative
from fastsharp.curvature.batch_products import BatchProducts, Made, Request, Unavailable
from fastsharp.curvature.rop.linearise import Linearised, Row
from fastsharp.curvature.rop.tape import Tape, Unrecorded, record
from fastsharp.errors import listing
from fastsharp.losses import Value
from fastsharp.params import ParamLayout


def tape_products(request: Request) -> Made:
    """Products of any model whose evaluation can be recorded call by call; Unavailable with the reason elsewhere."""
    selection = request.objective.selection
    values: list[Value] = []  # of the one evaluation

    def evaluate() -> tuple[torch.Tensor | None, torch.Tensor]:
        output, value = request.evaluate()
        values.append(value)
        return output, value.loss

    try:
        with _attention(selection.params):
            tape = record(evaluate, selection.params, modules=request.objective.model)
        (value,) = values
        products = TapeProducts(tape, selection.layout, request.gauss, value.scale)
    except Unrecorded as reason:
        raise Unavailable(f"the engine cannot record {reason}") from None
    return Made(products, value.scale, value.count)


def _attention(params: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """Attention as one call where it has a rule of its own: nothing here is differentiated by autograd, which needs the MATH kernel."""
    if any(p.device.type != "cpu" for p in params):
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


@final
class TapeProducts(BatchProducts):
    """Products by a linearised tape: 6U a vector for the Hessian, 4U for the Gauss-Newton matrix."""

    def __init__(self, tape: Tape, layout: ParamLayout, gauss: bool, scale: float) -> None:
        self._layout, self._gauss = layout, gauss
        self._scale = scale if 0.0 < abs(scale) < float("inf") else 1.0  # put into the adjoints, where it costs nothing
        self._linearised = linearised = Linearised(tape, scale=self._scale)
        self.unused = linearised.unused
        self.islands = linearised.islands
        self.uncapturable = f"torch's double backward computes {listing(list(self.islands), 4)}" if self.islands else ""
        gradient = linearised.gradient or ()
        self.not_finite = tuple(i for i, g in enumerate(gradient) if g is not None and not bool(torch.isfinite(g).all()))
        linearised.gradient = None  # n numbers a batch would outweigh a small tape

    @property
    def linearised(self) -> Linearised:
        """The tape at its point."""
        return self._linearised

    def table(self) -> list[Row]:
        """What served each call."""
        return self._linearised.table()

    def add_products(self, V: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        try:
            self._linearised.product(self._layout.rows(V), self._layout.rows(out), scale=scale / self._scale, gauss=self._gauss)
        except RuntimeError as e:
            if lacks_second_derivative(e):  # of an island
                raise no_second_derivative(e) from e
            raise

    def nbytes(self, ignore: set[int]) -> int:
        return self._linearised.nbytes(ignore)
