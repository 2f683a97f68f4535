"""The one fixture around every row of the catalogue of bad input: no trace, and messages as promised (P14, P15)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import fastsharp
from fastsharp.batches import tensors_of
from fastsharp.errors import FastsharpError
from tests.unchanged import check_message, unchanged

MEASURES = ("lanczos", "spectrum", "density", "trace", "frobenius", "bracket", "Hessian", "GGN")


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each measurement of the test leaves model, data, random states and flags bitwise as they were, however it ends, and each error
    it ends with has its code, at most five lines and advice. A test that measures nothing fails."""
    calls: list[str] = []
    for name in MEASURES:
        monkeypatch.setattr(fastsharp, name, _watched(getattr(fastsharp, name), calls))
    yield
    assert calls, "no measurement was made through fastsharp's own functions"


def _watched(measure: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    @functools.wraps(measure, updated=())
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(measure.__name__)
        data = tensors_of(list(args[0])) if args and isinstance(args[0], (list, tuple)) else []
        with unchanged(model if isinstance(model, nn.Module) else None, *data):
            try:
                return measure(model, *args, **kwargs)
            except FastsharpError as e:
                check_message(e)
                raise

    return call
