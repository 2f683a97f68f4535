"""Messages that arise in the recurrence begin with the call that the user made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastsharp
from fastsharp.errors import NonFiniteError, NotSymmetricError

N = 100_000  # rows of 400 kB: long enough for a budget to matter
SHORT = 2 * 17_000_000  # half of it is for the basis: one probe on float16 rows

CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lanczos": ("lanczos", lambda A: fastsharp.lanczos(A, k=2, preflight="off")),
    "density": ("density", lambda A: fastsharp.density(A, steps=70, probes=2, preflight="off")),
    "density on float16 rows": ("density", lambda A: fastsharp.density(A, steps=70, probes=2, preflight="off", memory=SHORT)),
    "spectrum": ("spectrum", lambda A: fastsharp.spectrum(A, k=1, steps=20, preflight="off")),
    "trace_function": ("trace_function", lambda A: fastsharp.trace_function(A, f=torch.exp, preflight="off")),
    "logdet": ("logdet", lambda A: fastsharp.logdet(A, shift=0.1, preflight="off")),
}


def matrix(spoil: Callable[[int, torch.Tensor], torch.Tensor]) -> fastsharp.CallableOperator:
    """A diagonal matrix whose product is handed to `spoil` with its number."""
    d, calls = torch.linspace(0.5, 2.0, N), [0]

    def product(v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return spoil(calls[0], d * v)

    return fastsharp.CallableOperator(product, N, torch.float32)


@pytest.mark.parametrize("call", CALLS)
def test_a_product_that_is_not_finite(call: str) -> None:
    name, measure = CALLS[call]
    with pytest.raises(NonFiniteError, match=f"^{name}: .*NaN"):
        measure(matrix(lambda i, w: w * float("nan") if i == 6 else w))


@pytest.mark.parametrize("call", CALLS)
def test_a_product_that_is_not_symmetric(call: str) -> None:
    name, measure = CALLS[call]
    with pytest.raises(NotSymmetricError, match=f"^{name}: "):
        measure(matrix(lambda i, w: w + 0.3 * w.roll(1)))


def test_the_budget_of_the_test_stores_float16() -> None:
    plan = fastsharp.density(matrix(lambda i, w: w), steps=70, probes=1, preflight="off", memory=SHORT).settings["plan"]
    assert plan["storage"] == "float16"
