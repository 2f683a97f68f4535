"""A stricter world: known seeds, and memory from `torch.empty` that holds NaN until somebody writes to it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.rows import row as row

if not torch.cuda.is_available():
    # Triton chooses between its compiler and its interpreter as it is first imported, and this file comes before every test.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell; tests of Ctrl-C raise it themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(20_240)
    np.random.seed(20_240)
    random.seed(20_240)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN: what is read before it is written shows."""
    for holder, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, _filled(getattr(holder, name)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks of a few hundred parameters: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = make(*args, **kwargs)
        if t.is_floating_point() and not t.is_meta and not t.requires_grad:
            t.fill_(float("nan"))
        return t

    return empty
