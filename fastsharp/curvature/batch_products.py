"""What an operator asks of one batch: its products, whatever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

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
    """A batch to be linearised: for the Hessian or, with `gauss`, for the Gauss-Newton matrix; `bf16` runs it under autocast."""

    objective: Objective
    index: Any  # of the batch; frozen statistics and masks go by it
    batch: Any
    gauss: bool = False
    bf16: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """For the evaluation. No cache: it may hold casts that were made without a graph, and hides the casts from a tape."""
        return torch.autocast(self.objective.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)


@dataclass(frozen=True)
class Made:
    """Products, with the batch's scale and count in L = sum scale loss / sum count."""

    products: BatchProducts
    scale: float
    count: float | None


class Unavailable(Exception):
    """A backend that cannot compute this model's products; the message is the reason, and another backend may be tried."""


Maker = Callable[[Request], Made]  # raises Unavailable
