"""Calls that are linear in one input and take each sample alone: b joins the batch, and torch's own kernels serve both halves.

y = A x gives y_t = A x_t and x_gt = A' y_gt: the call itself and its `*_backward`, with b N samples in place of N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsharp.curvature.rop.parts import Layout, Linear
from fastsharp.curvature.rop.rule import Call, Part

aten = torch.ops.aten


def join(t: torch.Tensor, dims: int) -> torch.Tensor:
    """(b, N, ...) as (b N, ...) of `dims` dimensions; a primal without a batch leaves (b, ...) as it is."""
    return t.flatten(0, t.dim() - dims)


def sample_wise(space: int) -> Callable[[Call], Part]:
    """The rule of calls over channels and `space` dimensions whose first argument is x."""
    dims = space + 2

    def make(call: Call) -> Part:
        forward = call.func
        transpose = getattr(aten, forward._schema.name.removeprefix("aten::") + "_backward").default
        x, y = Layout(call.inputs[0]), Layout(call.outputs[0])
        options = _options(call)
        names = [argument.name for argument in transpose._schema.arguments]

        def apply(t: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = forward(join(t, dims), *options.values())
            return y.like(out.view(t.shape[0], *y.shape))

        def adjoint(g: torch.Tensor) -> torch.Tensor:
            blank = join(x.empty(g), dims)  # its shape and layout are read, never its values
            known = {**options, "grad_output": join(g, dims), "self": blank, "input_size": blank.shape}
            out: torch.Tensor = transpose(*(known[name] for name in names))
            return x.like(out.view(g.shape[0], *x.shape))

        return Linear(call, apply, adjoint)

    return make


def _options(call: Call) -> dict[str, Any]:
    """All arguments but the first, by name."""
    rest = list(enumerate(call.func._schema.arguments))[1:]
    return {a.name: call.argument(i, a.name, a.default_value if a.has_default_value() else None) for i, a in rest}
