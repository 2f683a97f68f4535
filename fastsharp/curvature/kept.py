"""The sum of batches that are all kept: call by call, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch

from fastsharp.curvature.batch_products import BatchProducts
from fastsharp.curvature.cuda_graph import Graphs, Recorder
from fastsharp.objective import Objective


@final
class KeptSum:
    """V -> sum_b scale_b V A_b / denominator.

    recorder   what captures products on their device, None: nothing does
    """

    def __init__(
        self,
        batches: Collection[tuple[BatchProducts, float]],
        denominator: float,
        objective: Objective,
        *,
        tf32: bool,
        recorder: Recorder | None,
    ) -> None:
        self._batches, self._denominator, self._objective, self._tf32 = batches, denominator, objective, tf32
        self._plain = all(products.plain for products, _ in batches)
        refusal = next((products.uncapturable for products, _ in batches if products.uncapturable), None)
        self._graphs = None if recorder is None or refusal else Graphs(recorder)
        self._refusal = None if recorder is None else refusal

    @property
    def nbytes(self) -> int:
        """Bytes held by graphs."""
        return 0 if self._graphs is None else self._graphs.nbytes

    @property
    def refusal(self) -> str | None:
        """Why products are not replayed, where the device would have it."""
        return self._refusal if self._graphs is None else self._graphs.refusal

    @property
    def replayed(self) -> tuple[int, ...]:
        """Numbers of rows for which products are replayed."""
        return () if self._graphs is None else self._graphs.sizes

    def product(self, V: torch.Tensor, out: torch.Tensor, fits: Callable[[int], bool]) -> None:
        """out <- V A. `fits` says whether so many more bytes may be held, by a graph."""
        if self._graphs is not None:
            self._graphs.product(self, V, out, fits)
            return
        with self.mode():
            self.run(V, out)

    def mode(self) -> AbstractContextManager[Any]:
        """In which `run` is called."""
        return torch.no_grad() if self._plain else self._objective.quiet(forward=False, tf32=self._tf32)

    def run(self, V: torch.Tensor, out: torch.Tensor) -> None:
        """out <- V A, call by call."""
        if len(self._batches) == 1 and not (V.is_inference() or out.is_inference()):
            ((products, scale),) = self._batches
            products.products(V, out, scale, self._denominator)
            return
        with writable(V, out) as (rows, total):
            for products, scale in self._batches:
                products.add_products(rows, total, scale)
            if self._denominator != 1.0:
                total.div_(self._denominator)


@contextmanager
def writable(V: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """V and zeros for out: autograd takes no tensor made under inference_mode, and writing into one is refused outside of it."""
    total = torch.zeros_like(V) if out.is_inference() else out.zero_()
    yield V.clone() if V.is_inference() else V, total
    if total is not out:
        with torch.inference_mode():
            out.copy_(total)
