"""The tape at its point: products with the Hessian or the Gauss-Newton matrix for b vectors at once.

With R = d/d eps at theta + eps v, the product is R of the gradient (Pearlmutter 1994):
    forward    R y = J R x                                  along the tape, from R theta = v
    backward   R x_g = J' R y_g + (R J') y_g                against it, from R of the loss's adjoint = 0
The adjoints y_g do not depend on v and are kept. Without the second term in the calls that lead to the network's output, what is
left is J' L J v (Schraudolph 2002): L is the Hessian of the loss by the output.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import fastsharp.curvature.rop.rules  # noqa: F401
from fastsharp.curvature.rop.fold import fold
from fastsharp.curvature.rop.island import Island
from fastsharp.curvature.rop.parts import width
from fastsharp.curvature.rop.rule import RULES, Call, Part, Tangents
from fastsharp.curvature.rop.tape import Tape

# Bytes of the largest value's tangents, for the vectors that a pass takes at once on a CPU. More of them save only the cost of starting
# operations, and where their tangents outgrow the cache and what the allocator keeps (glibc: 32 MiB a block) they cost more than they save.
TOGETHER = 8 << 20


class Step(NamedTuple):
    part: Part
    inputs: tuple[int, ...]  # slot of each input, -1 where it is not active
    outputs: tuple[int, ...]
    network: bool  # leads to the network's output
    last: tuple[int, ...]  # slots whose tangents are not needed after this step


class Row(NamedTuple):
    """A line of the table of calls: how often a module makes a call, and what serves it: "rule" or "island"."""

    op: str
    module: str
    by: str
    calls: int


class Linearised:
    """Products of one batch. Takes the calls off the tape: what the parts do not keep is freed.

    scale      of the loss: the products and the gradient are those of scale * loss, at no cost
    loss       its value, without the scale
    gradient   by parameter, None where there is no path; set the attribute to None to free it
    unused     numbers of the parameters without a path to the loss
    islands    names of the calls that have no rule
    names      (op, module) of every call, in order
    largest    bytes of the largest value
    outputs    (slot, shape) of the network's outputs
    bypassed   whether the loss depends on parameters other than through the network's outputs: then there is no Gauss-Newton matrix
    """

    def __init__(self, tape: Tape, *, scale: float = 1.0, rules: int | None = None) -> None:
        """rules: only the first so many calls by their rules, the others as islands; to find the rule that is at fault."""
        self.loss = tape.loss.detach().clone()
        calls = fold(tape.calls, _uses(tape))
        tape.calls = []
        made = [t for call in calls for t in call.outputs]
        self.largest = max([1, *(t.nbytes for t in made)])
        self._together = max(TOGETHER // self.largest, 1) if all(t.device.type == "cpu" for t in made) else sys.maxsize
        network = _leading_to(calls, tape.outputs)
        self.bypassed = _bypassed(calls, network, tape)
        slots = {id(t): i for i, t in enumerate(tape.params)}
        wired: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        last: dict[int, int] = {}
        for i, call in enumerate(calls):
            inputs = tuple(slots[id(t)] if a else -1 for t, a in zip(call.inputs, call.active, strict=True))
            outputs = tuple(slots.setdefault(id(t), len(slots)) for t in call.outputs)
            last.update((s, i) for s in (*outputs, *inputs) if s >= 0)
            wired.append((inputs, outputs))
        self._end, self._slots, self._params = slots[id(tape.loss)], len(slots), len(tape.params)
        self.outputs = [(slots[id(t)], tuple(t.shape)) for t in tape.outputs]
        used = {s for inputs, _ in wired for s in inputs}
        self.unused = tuple(i for i in range(self._params) if i not in used)
        frees: list[list[int]] = [[] for _ in calls]
        for s, i in last.items():
            frees[i].append(s)

        self._steps: list[Step] = []
        self.names = [(_name(call.func), call.module) for call in calls]
        rows: Counter[tuple[str, str, str]] = Counter()
        calls.reverse()
        for i, ((inputs, outputs), leading, free) in enumerate(zip(wired, network, frees, strict=True)):
            call = calls.pop()  # what its part does not keep is freed before the next part is made
            part, by = _part(call, rules is None or i < rules)
            rows[_name(call.func), call.module, by] += 1
            self._steps.append(Step(part, inputs, outputs, leading, tuple(free)))
        self._table = [Row(*key, n) for key, n in rows.items()]
        self.islands = tuple(dict.fromkeys(row.op for row in self._table if row.by == "island"))
        self.gradient: list[torch.Tensor | None] | None = self._adjoints(torch.full_like(tape.loss, scale))

    def product(self, tangents: Tangents, into: Sequence[torch.Tensor], *, scale: float = 1.0, gauss: bool = False) -> None:
        """into += scale * H tangents, each given by parameter as (b, *shape), strided as they come; None is zero.

        gauss   the Gauss-Newton matrix in place of H. A scale other than 1 costs a pass over the tangents; that of the constructor none
        """
        with torch.no_grad():
            b, step = width(tangents), self._together
            if b > step:
                for k in range(0, b, step):
                    some = [None if t is None else t[k : k + step] for t in tangents]
                    self.product(some, [t[k : k + step] for t in into], scale=scale, gauss=gauss)
                return
            values: list[torch.Tensor | None] = [None] * self._slots
            for i in range(self._params):
                t = tangents[i]
                values[i] = t if scale == 1.0 or t is None else t * scale
            kept = self._forward(values, gauss)
            self._backward(kept, into)

    def nbytes(self, ignore: set[int]) -> int:
        """Bytes held between products: storages, each once, those at addresses in `ignore` (weights, data) left out."""
        storages: dict[int, int] = {}
        for step in self._steps:
            for t in step.part.held():
                storage = t.untyped_storage()
                if storage.data_ptr() not in ignore:
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def table(self) -> list[Row]:
        """What served each call, for `explain`."""
        return list(self._table)

    @property
    def steps(self) -> Sequence[Step]:
        """The parts in the order of evaluation; slots below the number of parameters are the parameters."""
        return self._steps

    def _adjoints(self, seed: torch.Tensor) -> list[torch.Tensor | None]:
        """One gradient, in which each part keeps its adjoint."""
        with torch.no_grad():
            sums = Sums(self._slots)
            sums.add(self._end, seed)
            for step in reversed(self._steps):
                y_g = [sums.take(s) for s in step.outputs]
                if all(g is None for g in y_g):
                    continue
                for s, g in zip(step.inputs, step.part.adjoint(y_g), strict=True):
                    if g is not None and s >= 0:
                        sums.add(s, g)
            return [sums.take(i) for i in range(self._params)]

    def _forward(self, values: list[torch.Tensor | None], gauss: bool) -> list[Any]:
        kept: list[Any] = []
        for part, inputs, outputs, network, last in self._steps:
            x_t = [None if s < 0 else values[s] for s in inputs]
            if all(t is None for t in x_t):
                kept.append(None)
                continue
            y_t, keep = part.tangent(x_t)
            kept.append(None if gauss and network else keep)
            for s, t in zip(outputs, y_t, strict=True):
                values[s] = t
            for s in last:
                values[s] = None
        return kept

    def _backward(self, kept: list[Any], into: Sequence[torch.Tensor]) -> None:
        sums = Sums(self._slots)
        n = self._params
        for step in reversed(self._steps):
            keep = kept.pop()
            y_gt = [sums.take(s) for s in step.outputs]
            if keep is None and all(g is None for g in y_gt):
                continue
            x_gt = step.part.backward(y_gt, keep, [into[s] if 0 <= s < n else None for s in step.inputs])
            for s, g in zip(step.inputs, x_gt, strict=True):
                if g is None or s < 0:
                    continue
                if s < n:
                    into[s].add_(g)
                else:
                    sums.add(s, g)


class Sums:
    """Adjoints by slot. The first one to arrive may be seen elsewhere as well and is not written; a sum of two is our own."""

    def __init__(self, slots: int) -> None:
        self._values: list[torch.Tensor | None] = [None] * slots
        self._own = bytearray(slots)

    def add(self, slot: int, value: torch.Tensor) -> None:
        present = self._values[slot]
        if present is None:
            self._values[slot] = value
        elif self._own[slot]:
            present.add_(value)
        else:
            self._values[slot] = present + value
            self._own[slot] = True

    def take(self, slot: int) -> torch.Tensor | None:
        value, self._values[slot] = self._values[slot], None
        return value


def _part(call: Call, by_rule: bool) -> tuple[Part, str]:
    # a call that folding made is no operation of torch: it has its rule alone
    make = RULES.get(call.func) if by_rule or not isinstance(call.func, torch._ops.OpOverload) else None
    part = None if make is None else make(call)
    return (Island(call), "island") if part is None else (part, "rule")


def _name(func: Any) -> str:
    """addmm.default; a call that `fold` made by the name of its function."""
    return str(func).removeprefix("aten.") if isinstance(func, torch._ops.OpOverload) else str(func.__name__)


def _uses(tape: Tape) -> Counter[int]:
    """See `fold.fold`."""
    uses = Counter(id(t) for call in tape.calls for t, a in zip(call.inputs, call.active, strict=True) if a)
    uses.update(id(t) for t in [*tape.outputs, tape.loss])
    return uses


def _leading_to(calls: Sequence[Call], outputs: Sequence[torch.Tensor]) -> list[bool]:
    """For each call, whether an output follows from it."""
    wanted = {id(t) for t in outputs}
    leading = [False] * len(calls)
    for i in range(len(calls) - 1, -1, -1):
        if any(id(t) in wanted for t in calls[i].outputs):
            leading[i] = True
            wanted.update(id(t) for t, a in zip(calls[i].inputs, calls[i].active, strict=True) if a)
    return leading


def _bypassed(calls: Sequence[Call], network: Sequence[bool], tape: Tape) -> bool:
    """Whether a call of the loss takes an active value that is neither an output of the network nor made by the loss."""
    own = {id(t) for t in tape.outputs} | {id(t) for call, leading in zip(calls, network, strict=True) if not leading for t in call.outputs}
    return any(
        a and id(t) not in own
        for call, leading in zip(calls, network, strict=True)
        if not leading
        for t, a in zip(call.inputs, call.active, strict=True)
    )
