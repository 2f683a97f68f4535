"""The Hessian of loss + weight decay: the matrix of the loss, and a diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, final

import torch

from fastsharp.composite import LinearCombination, combined
from fastsharp.curvature.coordinates import layout_of, matching, parameters_of
from fastsharp.curvature.optimizer import Named, check_optimizer, groups_of, steps_as
from fastsharp.errors import ArgumentTypeError, InputError, StaleOperatorError
from fastsharp.operator import SymmetricOperator

_optim = torch.optim
# their step adds wd * p to the gradient, unless a group says `decoupled_weight_decay`
_IN_THE_LOSS = (
    _optim.SGD, _optim.Adam, _optim.NAdam, _optim.RAdam, _optim.Adagrad, _optim.Adadelta, _optim.Adamax, _optim.ASGD, _optim.RMSprop,
)  # fmt: skip
Decay = float | Mapping[str, float] | torch.optim.Optimizer


def with_weight_decay(A: SymmetricOperator, decay: Decay, *, decoupled: bool = False) -> LinearCombination:
    """A + diag(wd): the Hessian of L + sum_p (wd_p / 2) ||p||^2, where A is that of L.

    A          an operator of a model, over any selection of parameters
    decay      a number for all parameters; {name or glob: number}, others have none; or the live optimizer, whose groups say
               `weight_decay`. Read now and at every `refresh()`; another value later is StaleOperatorError
    decoupled  True takes decoupled decay (AdamW) as if it were that penalty. It is not: it shrinks weights outside of the loss, whose
               Hessian has no such term, and the result says so. False refuses it

    Cost: that of A. The decay is one of the training loss: with a loss summed over samples it has to be scaled as training scales it.
    Raises InputError, ParamError (a parameter that the optimizer does not hold, a glob that matches nothing).
    """
    return combined((1.0, A), (1.0, WeightDecay(A, decay, decoupled=decoupled)))


@final
class WeightDecay(SymmetricOperator):
    """diag(wd_p) over the parameters of an operator: the second term of `with_weight_decay`, by itself."""

    def __init__(self, A: SymmetricOperator, decay: Decay, *, decoupled: bool = False) -> None:
        self._layout = layout_of(A, "with_weight_decay")
        super().__init__(A.n, A.dtype, A.device)
        self._of, self._source, self._decoupled = A, decay, decoupled
        self._outside = False
        self._values = self._present()

    @property
    def settings(self) -> dict[str, Any]:
        known = set(self._values)
        return {"operator": "weight decay", "weight_decay": known.pop() if len(known) == 1 else list(self._values)}

    @property
    def notes(self) -> tuple[str, ...]:
        return ("decoupled weight decay was added as if it were a penalty in the loss",) if self._outside else ()

    @property
    def layout(self) -> Any:
        return self._layout

    def cheap(self, precision: str) -> SymmetricOperator:
        """Itself: its products are exact and cost nothing."""
        return self

    def refresh(self) -> WeightDecay:
        """Read the source again. Returns self."""
        self._values = self._present()
        return self

    def check_unchanged(self) -> None:
        if self._present() != self._values:
            raise StaleOperatorError("weight_decay changed since the operator was built. Call refresh(), or build a new one.")

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        bounds = zip(self._layout.offsets, self._layout.offsets[1:], strict=False)
        for value, (a, b) in zip(self._values, bounds, strict=True):
            torch.mul(V[:, a:b], value, out=out[:, a:b])

    def _present(self) -> tuple[float, ...]:
        source = self._source
        if isinstance(source, torch.optim.Optimizer):
            return self._of_groups(parameters_of(self._of, "with_weight_decay"), source)
        if isinstance(source, Mapping):
            found: dict[str, float] = {}
            for pattern, value in source.items():
                for name in matching(self._layout, pattern, "with_weight_decay"):
                    if found.setdefault(name, _number(value)) != value:
                        raise InputError(f"with_weight_decay: {name!r} gets {found[name]:g} and {value:g}. Let the patterns not overlap.")
            return tuple(found.get(name, 0.0) for name in self._layout.names)
        return (_number(source),) * len(self._layout.names)

    def _of_groups(self, parameters: Named, optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
        check_optimizer(optimizer, "with_weight_decay")
        groups = groups_of(optimizer, parameters, "with_weight_decay")
        values = tuple(_number(group.get("weight_decay", 0.0)) for group in groups)
        outside = isinstance(optimizer, _optim.AdamW) or any(group.get("decoupled_weight_decay", False) for group in groups)
        if any(values) and outside and not self._decoupled:
            raise InputError(
                f"with_weight_decay: {type(optimizer).__name__} decays weights outside of the loss, whose Hessian has no such term.\n"
                "Use the operator as it is; decoupled=True adds the term as if the decay were a penalty in the loss."
            )
        if any(values) and not outside and not steps_as(optimizer, *_IN_THE_LOSS):
            raise InputError(
                f"with_weight_decay: what weight_decay means to {type(optimizer).__name__} is not known.\n"
                "If it is a penalty in the loss, give the numbers: {'*': 5e-4}."
            )
        self._outside = outside and any(values)
        return values


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"with_weight_decay: got a {type(value).__name__}, expected a number, {{glob: number}} or an optimizer.")
    number = float(value)
    if not (math.isfinite(number) and number >= 0.0):
        raise InputError(f"with_weight_decay: weight decay {number} is not a finite number >= 0.")
    return number
