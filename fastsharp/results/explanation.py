"""Explanation: which backend computes the products of a model, and what serves each of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastsharp.errors import listing
from fastsharp.results.result import Result

_SHOWN = 4  # modules of a line


@dataclass(frozen=True)
class Calls:
    """All calls of one ATen operation that depend on the parameters."""

    op: str
    count: int
    by: str  # "rule", or "island": torch's double backward of that one call
    modules: tuple[str, ...]  # that make them, in the order of their first call; "" for the model itself and the loss


@dataclass(frozen=True, eq=False)
class Explanation(Result):
    """What `backend="auto"` does with a model; `print(explanation)` shows it as a table."""

    backend: str  # that "auto" takes
    refusals: Mapping[str, str]  # backends that cannot compute the products, with their reasons
    calls: tuple[Calls, ...]  # of the recorder, most frequent first; empty where it cannot record the model
    cuda_graph: str  # why products of that backend on a GPU are not replayed as CUDA graphs; "" where kept batches are
    declined: Mapping[str, str] = field(default_factory=dict)  # backends that can, but that "auto" leaves to `backend=`, with its reasons

    @property
    def islands(self) -> tuple[str, ...]:
        """Operations without a rule."""
        return tuple(c.op for c in self.calls if c.by == "island")

    def __str__(self) -> str:
        why = ": a plain fully connected net, a product is one native call" if self.backend == "mlp" else ""
        lines = [f"backend='auto' takes {self.backend!r}{why}"]
        lines += [f"{name!r} is not available: {reason}" for name, reason in self.refusals.items()]
        lines += [f"{name!r} would do, but 'auto' leaves it: {reason}" for name, reason in self.declined.items()]
        if self.cuda_graph:
            lines.append(f"on a GPU its products are launched call by call, not as a CUDA graph: {self.cuda_graph}")
        if self.calls:
            by_rule = sum(c.count for c in self.calls if c.by == "rule")
            total = sum(c.count for c in self.calls)
            lines.append(f"'rop' sees {total} calls that depend on the parameters: {by_rule} by a rule, {total - by_rule} as islands")
            width = max(len("op"), *(len(c.op) for c in self.calls))
            lines += ["", f"{'op':<{width}}  count  by      modules"]
            lines += [f"{c.op:<{width}}  {c.count:>5}  {c.by:<6}  {_names(c.modules)}" for c in self.calls]
        return "\n".join(lines)


def _names(modules: tuple[str, ...]) -> str:
    return listing([name or "the model or loss" for name in modules], _SHOWN)
