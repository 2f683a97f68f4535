"""Which matrix of a loss is meant: its Hessian, J' H_L J, or the same of a function that stands in for the loss.

With z = f(theta) the network's output and J = dz / dtheta, a stand-in s(z) makes other matrices out of the same two kinds of products:
    s = sum_i <r_i, z>^2 / 2    J' (d^2 s / dz^2) J = sum_i (J' r_i)(J' r_i)'    Fisher matrices: r_i is the loss's derivative by z
    s = <dL/dz, z>              d^2 s / dtheta^2 = sum_k (dL/dz_k) d^2 z_k / dtheta^2 = H - G, at no cancellation
so that no backend has to know of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from fastsharp.curvature.network_output import check_separable, network_output
from fastsharp.losses import Loss, Value


class StandIn(ABC):
    """A function of the network's output in the loss's place; what it takes of the loss is constant, as at the weights."""

    @abstractmethod
    def constants(self, value: Value, output: torch.Tensor, batch: Any, loss: Loss, seed: int) -> Any:
        """What the loss gives at this evaluation, without a graph; random draws come from `seed`."""

    @abstractmethod
    def at(self, output: torch.Tensor, constants: Any) -> torch.Tensor:
        """s(z), a scalar with its graph."""


@final
@dataclass(frozen=True)
class Form:
    """A matrix of a batch, by what `operator=` calls it: of the loss or its stand-in, with `gauss` J' H_L J in place of the Hessian."""

    kind: str
    gauss: bool = False
    stand_in: StandIn | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the Hessian or the Gauss-Newton matrix of the loss itself."""
        return self.stand_in is None

    def constants(self, value: Value, batch: Any, loss: Loss, seed: int) -> Any:
        """Those of the stand-in at an evaluation of the loss."""
        assert self.stand_in is not None
        return self.stand_in.constants(value, network_output(value, self.kind), batch, loss, seed)

    def of(
        self,
        value: Value,
        batch: Any,
        loss: Loss,
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        seed: int,
        constants: Any = None,
    ) -> tuple[torch.Tensor | None, Value]:
        """(the output at which products are split, None for a Hessian; the loss or its stand-in in `Value`).

        InputError where there is no such output, or the loss depends on the parameters beside it.
        """
        if not self.gauss and self.plain:
            return None, value
        output = network_output(value, self.kind)
        check_separable(value.loss, output, params, names, self.kind)
        if self.stand_in is not None:
            if constants is None:
                constants = self.stand_in.constants(value, output, batch, loss, seed)
            value = replace(value, loss=self.stand_in.at(output, constants), output=None)
        return output if self.gauss else None, value


HESSIAN, GAUSS_NEWTON = Form("hessian"), Form("ggn", gauss=True)


def slope(value: Value, output: torch.Tensor) -> torch.Tensor:
    """dL/dz of the batch's loss, a constant."""
    (found,) = torch.autograd.grad(value.loss, output, retain_graph=True, allow_unused=True, materialize_grads=True)
    return found.detach()
