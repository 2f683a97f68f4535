"""What a rule is: one ATen call at one point, with its tangent and the tangent of its adjoint, for b vectors at once.

For y = f(x) with adjoint y_g the engine asks three things of a part:
    y_t  = J x_t                              forward half of a product
    x_g  = J' y_g                             once, when the batch is linearised
    x_gt = J' y_gt + d/dx (J' y_g) x_t        backward half of a product; without its second term it serves the Gauss-Newton matrix
Tangents carry b as their first dimension: x_t is (b, *x.shape). None stands for zero everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fastsharp.curvature.rop.tree import tensors

Tangents = Sequence[torch.Tensor | None]


class Call:
    """One ATen call of a tape: what was called, the tensors that went in and came out, which of them depend on the parameters.

    inputs    tensors of args and kwargs, flattened in order; one that appears twice is listed twice
    active    for each input, whether it depends on the parameters
    outputs   tensors of the result, flattened in order
    module    path of the module that made the call, "" where none is known
    """

    __slots__ = ("active", "args", "func", "inputs", "kwargs", "module", "outputs")

    def __init__(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], outputs: Any, active: Callable[[torch.Tensor], bool], module: str = ""
    ) -> None:
        self.func = func
        self.args = tuple(args)
        self.kwargs = kwargs
        self.inputs = tensors((self.args, kwargs))
        self.outputs = tensors(outputs)
        self.active = [active(t) for t in self.inputs]
        self.module = module

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument given by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


class Part(ABC):
    """A call linearised at its inputs. A part keeps the tensors it needs and nothing else: the tape goes when all parts stand."""

    second_order = True  # False: J does not depend on x, so y_g need not be kept

    y_g: Tangents = ()

    @abstractmethod
    def tangent(self, x_t: Tangents) -> tuple[list[torch.Tensor | None], Any]:
        """(y_t, kept): tangents of the outputs, and what `backward` needs of this product. At least one x_t is not None.

        x_t is read only; y_t may be a view of it.
        """

    @abstractmethod
    def backward(self, y_gt: Tangents, kept: Any, into: Tangents) -> list[torch.Tensor | None]:
        """x_gt, None for inputs that are not active. `kept` None: J' y_gt alone.

        y_gt may be None for all outputs where only the second term is left. Where into[i] is a tensor (b, *shape; strided, a view
        of the flat result) the part may add its result there and return None in its place: that saves a pass.
        """

    def adjoint(self, y_g: Tangents) -> list[torch.Tensor | None]:
        """x_g; keeps y_g for the second term of `backward`."""
        lifted = [None if g is None else g.unsqueeze(0) for g in y_g]
        x_g = self.backward(lifted, None, ())
        if self.second_order:
            self.y_g = tuple(y_g)
        return [None if g is None else g.squeeze(0) for g in x_g]

    def held(self) -> Iterator[torch.Tensor]:
        """Every tensor kept between products."""
        yield from tensors(vars(self))


RULES: dict[Any, Callable[[Call], Part | None]] = {}  # a maker returns None where its rule does not cover these arguments

Maker = TypeVar("Maker", bound=Callable[[Call], "Part | None"])


def rule(*funcs: Any) -> Callable[[Maker], Maker]:
    """Enter a maker of parts (a Part subclass, or a function that chooses one) as the rule of these ATen overloads."""

    def enter(maker: Maker) -> Maker:
        for func in funcs:
            assert func not in RULES, f"two rules for {func}"
            RULES[func] = maker
        return maker

    return enter
