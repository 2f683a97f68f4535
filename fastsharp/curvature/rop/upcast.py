"""Rules for float32 on calls under autocast, whose activations are in half precision beside float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastsharp.curvature.rop.rule import Call, Maker, Part, Tangents
from fastsharp.curvature.rop.tree import mapped

_HALF = (torch.float16, torch.bfloat16)


def also_in_half(make: Maker) -> Maker:
    """The maker of a rule, which then covers half-precision and mixed arguments too: as torch's own kernels it works in float32 inside."""

    def maker(call: Call) -> Part | None:
        if not any(t.dtype in _HALF for t in call.inputs):
            return make(call)
        part = make(_wide(call))
        return None if part is None else Upcast(call, part)

    return maker  # type: ignore[return-value]


def _wide(call: Call) -> Call:
    """The same call with every half-precision tensor in float32."""
    wide = {id(t): t.float() for t in (*call.inputs, *call.outputs) if t.dtype in _HALF}
    args, kwargs = mapped(lambda leaf: wide.get(id(leaf), leaf), (call.args, call.kwargs))
    active = {id(wide.get(id(t), t)) for t, a in zip(call.inputs, call.active, strict=True) if a}
    return Call(call.func, args, kwargs, [wide.get(id(t), t) for t in call.outputs], lambda t: id(t) in active, call.module)


class Upcast(Part):
    """A part in float32 whose tangents and adjoints come and go in the dtypes of the call."""

    def __init__(self, call: Call, part: Part) -> None:
        self.part = part
        self.second_order = part.second_order
        self.inputs, self.outputs = [t.dtype for t in call.inputs], [t.dtype for t in call.outputs]

    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        y_t, kept = self.part.tangent([_floats(t) for t in x_t])
        return _given(y_t, self.outputs), kept

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        return _given(self.part.adjoint([_floats(t) for t in y_g]), self.inputs)

    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        return _given(self.part.backward([_floats(t) for t in y_gt], kept, into), self.inputs)

    def held(self) -> Iterator[torch.Tensor]:
        yield from self.part.held()


def _floats(t: torch.Tensor | None) -> torch.Tensor | None:
    return t.float() if t is not None and t.dtype in _HALF else t


def _given(values: Tangents, dtypes: list[torch.dtype]) -> list[torch.Tensor | None]:
    return [None if t is None else t.to(dtype) for t, dtype in zip(values, dtypes, strict=True)]
