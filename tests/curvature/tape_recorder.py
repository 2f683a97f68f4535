"""A recorder of CUDA graphs without a GPU: the ATen calls of a capture, run again on the very tensors that they had.

As under a capture, what Python decided is decided once, memory is that of the capture, and a call that would make the host wait for
the device is refused. Unlike under a capture the calls are also executed while they are recorded. Native kernels are not seen: run it
under ops.force("reference").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsharp.curvature.cuda_graph import Recorder
from fastsharp.curvature.rop.tree import tensors

aten = torch.ops.aten
_WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default, aten.equal.default)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS or (func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nmore of torch's text")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(result)))
        return result

    def replay(self) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            for func, args, kwargs, held in self.calls:
                for old, new in zip(held, tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class TapeRecorder(Recorder):
    """Counts what is asked of it; `held` is what a capture is said to hold, `failure` what it raises."""

    def __init__(self, held: int = 0, failure: Exception | None = None) -> None:
        self.held, self.failure = held, failure
        self.warm_ups = self.captures = self.replays = self.turns = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warm_ups += 1
        work()

    def capture(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        self.captures += 1
        if self.failure is not None:
            raise self.failure
        with _Calls() as seen:
            work()

        def replay() -> None:
            self.replays += 1
            seen.replay()

        return replay, self.held

    def turn(self) -> None:
        self.turns += 1
