"""What an operator asks of one batch: its products, whatever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsharp.curvature.form import Form
from fastsharp.losses import Value
from fastsharp.objective import Objective


class BatchProducts(ABC):
    """Products of one batch's matrix, linearised at the present weights; kept between products where memory allows.

    unused      numbers of the parameters that the loss has no path to
    not_finite  numbers of those whose gradient has NaN or Inf
    plain       products run neither the model nor autograd: no mode or flag of the caller's matters to them
    islands     single calls that torch's double backward computed within another backend, for the notes
    uncapturable  why a product cannot become a CUDA graph; "" where it only launches kernels: always the same ones, on memory that stays
    """

    unused: tuple[int, ...] = ()
    not_finite: tuple[int, ...] = ()
    islands: tuple[str, ...] = ()
    plain: bool = False
    uncapturable: str = "its backend does not promise that it can be"

    @abstractmethod
    def add_products(self, V: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """out += scale V A for rows V (b, n) and out (b, n)."""

    def products(self, V: torch.Tensor, out: torch.Tensor, scale: float, divisor: float) -> None:
        """out = scale V A / divisor, with the bits of `add_products` to zero and a division."""
        self.add_products(V, out.zero_(), scale)
        if divisor != 1.0:
            out.div_(divisor)

    @abstractmethod
    def nbytes(self, ignore: set[int]) -> int:
        """Bytes held between products, storages at the addresses in `ignore` (weights, data) left out."""

    def check_twice_differentiable(self) -> None:
        """DoubleBackwardError where a derivative is known to be missing before a product is computed."""


@dataclass(frozen=True)
class Request:
    """A batch to be linearised for the matrix of this form; `bf16` runs it under autocast.

    constants   of the form's stand-in, from an exact evaluation; None: those of this evaluation
    """

    objective: Objective
    index: Any  # of the batch; frozen statistics, masks and draws go by it
    batch: Any
    form: Form
    bf16: bool = False
    constants: Any = None

    @property
    def gauss(self) -> bool:
        """Whether products are those of a Gauss-Newton matrix."""
        return self.form.gauss

    def evaluate(self) -> tuple[torch.Tensor | None, Value]:
        """(the network's output, None for a Hessian; the batch's loss or what stands in for it), with their graph.

        No cache of autocast: it may hold casts that were made without a graph, and hides the casts from a tape.
        """
        objective = self.objective
        with torch.autocast(objective.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            value = objective.evaluate(self.index, self.batch)
        selection = objective.selection
        drawn = objective.draw_seed(self.index)
        return self.form.of(value, self.batch, objective.loss, selection.params, selection.names, drawn, self.constants)

    def exact(self) -> Request:
        """The same with the constants of an evaluation in full precision: cheap products are those of the same matrix."""
        stand_in = self.form.stand_in
        if stand_in is None:
            return self
        with self.objective.quiet():
            value = self.objective.evaluate(self.index, self.batch)
            constants = self.form.constants(value, self.batch, self.objective.loss, self.objective.draw_seed(self.index))
        return replace(self, constants=constants)


@dataclass(frozen=True)
class Made:
    """Products, with the batch's scale and count in L = sum scale loss / sum count."""

    products: BatchProducts
    scale: float
    count: float | None


class Unavailable(Exception):
    """A backend that cannot compute this model's products; the message is the reason, and another backend may be tried."""


Maker = Callable[[Request], Made]  # raises Unavailable
