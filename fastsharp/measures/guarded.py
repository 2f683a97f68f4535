"""Measures that share a pass, each of which may turn out not to apply without stopping the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from fastsharp.errors import FastsharpError, NonFiniteError, in_a_line
from fastsharp.measures.facts import Accumulator, BatchFacts, Need
from fastsharp.measures.statistic import SampleEstimate


@final
class Guarded:
    """An accumulator whose refusal is kept as `reason` in place of being raised; a loss that is not finite is everyone's and is raised."""

    def __init__(self, name: str, make: Callable[[], Accumulator]) -> None:
        self.name, self.reason = name, ""
        self._inner: Accumulator | None = None
        self._guard(lambda: setattr(self, "_inner", make()))

    def refuse(self, reason: str) -> None:
        """Take no part."""
        self._inner, self.reason = None, self.reason or reason

    @property
    def needs(self) -> Need:
        return Need.NOTHING if self._inner is None else self._inner.needs

    @property
    def layers(self) -> frozenset[str]:
        return frozenset() if self._inner is None else self._inner.layers

    def update(self, facts: BatchFacts) -> None:
        inner = self._inner
        if inner is not None:
            self._guard(lambda: inner.update(facts))

    def result(self) -> SampleEstimate | None:
        """The measure, None where it refused."""
        inner, found = self._inner, list[SampleEstimate]()
        if inner is not None:
            self._guard(lambda: found.append(inner.result()))
        return found[0] if found else None

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except NonFiniteError:
            raise
        except FastsharpError as e:
            self._inner, self.reason = None, in_a_line(e)
