"""Products of kept batches as CUDA graphs: the kernels of a product are launched at once, not one by one from Python.

A product whose batches are all kept runs the same kernels on the same memory every time; only V and the result differ. So they are
captured with a V and a result of their own, for each number of rows b, and replayed between two copies. The first product of b rows
runs call by call. The second is the warm-up of the capture, on a stream beside, and its result is the one returned; the graph is captured
after it. From the third on it is replayed. No product is computed for the capture alone.

What a graph holds: 2 b n elements, and the intermediate values of a product in a pool that all graphs of an operator share. These bytes
count in the memory budget; a graph that does not fit is dropped.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, final

import torch

MOST = 4  # graphs of an operator: solvers use a block size or two; further ones run call by call


class Recorder(ABC):
    """How work is captured; tests put one in that needs no GPU."""

    @abstractmethod
    def warm_up(self, work: Callable[[], None]) -> None:
        """Run it as a capture wants it to have run before, in order with what the caller does next."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        """A function that runs the calls of `work` anew on the memory that they have now, and the bytes that it holds. Computes nothing."""

    @abstractmethod
    def turn(self) -> None:
        """Order what follows behind earlier products, which may have been asked for on another stream."""


@final
class CudaRecorder(Recorder):
    """torch.cuda.CUDAGraph on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._last: torch.cuda.Stream | None = None

    def warm_up(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._beside.wait_stream(current)
        with torch.cuda.stream(self._beside):
            work()
        current.wait_stream(self._beside)

    def capture(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # other threads, a loader's among them, may go on using the device
        kind = {"pool": self._pool, "stream": self._beside, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device), torch.cuda.graph(graph, **kind):
            before = torch.cuda.memory_reserved(self._device)
            work()
            held = torch.cuda.memory_reserved(self._device) - before

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay, held

    def turn(self) -> None:
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current


def recorder_of(device: torch.device) -> Recorder | None:
    """What captures on this device: None off CUDA, and where FASTSHARP_CUDA_GRAPHS=0 asks for products call by call."""
    if device.type != "cuda" or os.environ.get("FASTSHARP_CUDA_GRAPHS") == "0":
        return None
    return CudaRecorder(device)


class Product(Protocol):
    """What is captured. Everything but V that it reads must stay where it is while there are graphs of it."""

    def run(self, V: torch.Tensor, out: torch.Tensor) -> None:
        """out (b, n) <- the product of V (b, n), call by call."""

    def mode(self) -> AbstractContextManager[Any]:
        """In which it runs and is captured: gradients, flags. Replays need none."""


@final
class Graphs:
    """The graphs of one product at its present point, by number of rows. They hold no reference to what they were captured from."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: set[int] = set()
        self._captured: dict[int, tuple[torch.Tensor, torch.Tensor, Callable[[], None]]] = {}
        self.nbytes = 0
        self.refusal: str | None = None  # why there will be no further graphs

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that are replayed."""
        return tuple(self._captured)

    def product(self, of: Product, V: torch.Tensor, out: torch.Tensor, fits: Callable[[int], bool]) -> None:
        """out <- the product of V, replayed where it is captured; `fits` says whether so many more bytes may be held."""
        b = V.shape[0]
        self._recorder.turn()
        if b not in self._captured and (self.refusal is not None or b not in self._seen or len(self._captured) == MOST):
            self._seen.add(b)
            with of.mode():
                of.run(V, out)
            return
        with torch.no_grad():
            if b in self._captured:
                rows, total, replay = self._captured[b]
                rows.copy_(V)
                replay()
                out.copy_(total)
            else:
                self._capture(of, V, out, fits)

    def _capture(self, of: Product, V: torch.Tensor, out: torch.Tensor, fits: Callable[[int], bool]) -> None:
        """This product, as the warm-up of a graph for the following ones."""
        with torch.inference_mode(False), torch.no_grad():
            rows, total = (torch.empty(V.shape, dtype=V.dtype, device=V.device) for _ in range(2))
        rows.copy_(V)
        with of.mode():
            self._recorder.warm_up(lambda: of.run(rows, total))
        out.copy_(total)
        with of.mode():
            try:
                replay, held = self._recorder.capture(lambda: of.run(rows, total))
            except RuntimeError as e:  # of torch and CUDA: out of memory, an operation that a capture forbids
                self.refusal = f"the capture failed: {(str(e) or type(e).__name__).splitlines()[0]}"
                return
        held += rows.nbytes + total.nbytes
        if fits(held):
            self._captured[V.shape[0]] = rows, total, replay
            self.nbytes += held
        else:
            self.refusal = f"one for b = {V.shape[0]} holds {held / 2**20:.1f} MiB, more than the memory budget has left"
