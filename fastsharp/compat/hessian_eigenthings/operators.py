"""Curvature operators with `size`, `device`, `dtype` and `matvec`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

import fastsharp
from fastsharp.compat._shared import refuse
from fastsharp.compat.hessian_eigenthings.loss_fns import OwnLoss, SupervisedLoss, SupervisedLossOfOutput, supervised_forward
from fastsharp.compat.hessian_eigenthings.param_utils import ParamFilter
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.errors import InputError, StaleOperatorError
from fastsharp.operator import CallableOperator, SymmetricOperator

REASONS = {
    "full_dataset": "a product with the next batch each time is no fixed matrix; num_batches takes the first ones",
    "microbatch_size": "memory is planned by fastsharp",
    "microbatch_unsafe": "memory is planned by fastsharp",
    "method": "products are exact",
    "fd_eps": "products are exact",
    "backend": "vectors are handled by fastsharp's own kernels",
}


class CurvatureOperator(ABC):
    """A symmetric matrix known by its products with flat vectors; subclasses of the caller's are served by every algorithm here."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of a vector."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the vectors."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the vectors."""

    @abstractmethod
    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """The product with v (size,)."""

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        """The same, by symmetry."""
        return self.matvec(v)

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        return self.matvec(v)

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        return self.matvec(v)


class LambdaOperator(CurvatureOperator):
    """A callable as an operator."""

    def __init__(
        self,
        matvec_fn: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.symmetric = CallableOperator(matvec_fn, size, dtype, device)

    @property
    def size(self) -> int:
        return self.symmetric.n

    @property
    def device(self) -> torch.device:
        return self.symmetric.device

    @property
    def dtype(self) -> torch.dtype:
        return self.symmetric.dtype

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.symmetric @ v


class _ModelOperator(CurvatureOperator):
    """A matrix of fastsharp's, `symmetric`, at the model's present weights."""

    symmetric: FiniteSum

    @property
    def size(self) -> int:
        return self.symmetric.n

    @property
    def device(self) -> torch.device:
        return self.symmetric.device

    @property
    def dtype(self) -> torch.dtype:
        return self.symmetric.dtype

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        try:
            return self.symmetric @ v
        except StaleOperatorError:
            return self.symmetric.refresh() @ v


class HessianOperator(_ModelOperator):
    """The Hessian of `loss_fn(model, batch)` over the batches, weighted by their numbers of examples.

    param_filter  f(name, parameter) -> bool
    num_batches   the first so many batches; None: all
    Data are read at construction. The other arguments stand for what fastsharp decides itself: anything but their default raises
    InputError, as do bad inputs of `fastsharp.Hessian`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        loss_fn: Callable[[nn.Module, Any], torch.Tensor],
        *,
        param_filter: ParamFilter | None = None,
        full_dataset: bool = True,
        num_batches: int | None = None,
        microbatch_size: int | None = None,
        microbatch_unsafe: bool = False,
        method: str = "autograd",
        fd_eps: float | None = None,
        backend: Any = None,
    ) -> None:
        refuse(
            "HessianOperator",
            REASONS,
            full_dataset=(full_dataset, True),
            microbatch_size=(microbatch_size, None),
            microbatch_unsafe=(microbatch_unsafe, False),
            method=(method, "autograd"),
            fd_eps=(fd_eps, None),
            backend=(backend, None),
        )
        loss: Any = fastsharp.batch_loss(loss_fn)
        if isinstance(loss_fn, SupervisedLoss):
            loss = loss_fn.criterion
        elif isinstance(loss_fn, OwnLoss):
            loss = None
        self.symmetric = fastsharp.Hessian(model, _first(dataloader, num_batches), loss, params=param_filter, reduction="mean")


class GGNOperator(_ModelOperator):
    """J' H_L J of `loss_of_output_fn(forward_fn(model, batch), batch)` over the batches, weighted by their numbers of examples.

    Arguments as for HessianOperator.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        forward_fn: Callable[[nn.Module, Any], torch.Tensor],
        loss_of_output_fn: Callable[[torch.Tensor, Any], torch.Tensor],
        *,
        param_filter: ParamFilter | None = None,
        full_dataset: bool = True,
        num_batches: int | None = None,
        backend: Any = None,
    ) -> None:
        refuse("GGNOperator", REASONS, full_dataset=(full_dataset, True), backend=(backend, None))
        batches = _first(dataloader, num_batches)
        if forward_fn is supervised_forward and isinstance(loss_of_output_fn, SupervisedLossOfOutput):
            self.symmetric = fastsharp.GGN(model, batches, loss_of_output_fn.criterion, params=param_filter, reduction="mean")
            return
        inner = None if param_filter is None else (lambda name, p: param_filter(name.removeprefix("model."), p))
        whole = _Batches(batches, lambda batch: ((batch,), batch))
        self.symmetric = fastsharp.GGN(_Forward(model, forward_fn), whole, loss_of_output_fn, params=inner, reduction="mean")


class _Forward(nn.Module):
    """forward_fn(model, batch) as a module of the batch; its parameters are called "model." and their name."""

    def __init__(self, model: nn.Module, forward_fn: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._forward = (forward_fn,)  # a tuple, so that a module among them is not registered twice

    def forward(self, batch: Any) -> torch.Tensor:
        return self._forward[0](self.model, batch)


class _Batches:
    """A loader cut short or with its batches changed; a sampler or generator of the loader is still found."""

    def __init__(self, loader: Iterable[Any], change: Callable[[Any], Any] | None = None, most: int | None = None) -> None:
        self._loader, self._change, self._most = loader, change, most

    def __iter__(self) -> Iterator[Any]:
        cut = itertools.islice(self._loader, self._most)
        return cut if self._change is None else map(self._change, cut)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def _first(loader: Iterable[Any], num_batches: int | None) -> Iterable[Any]:
    if num_batches is None:
        return loader
    if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
        raise InputError(f"num_batches is {num_batches!r}, expected an int of at least 1, or None for all batches.")
    return _Batches(loader, most=num_batches)


def symmetric_of(operator: Any) -> SymmetricOperator:
    """An operator of this package, of fastsharp, or of the caller's, for fastsharp's solvers."""
    if isinstance(operator, SymmetricOperator):
        return operator
    if isinstance(operator, LambdaOperator | _ModelOperator):
        return operator.symmetric
    if isinstance(operator, CurvatureOperator) or all(hasattr(operator, name) for name in ("matvec", "size", "dtype", "device")):
        return CallableOperator(operator.matvec, int(operator.size), operator.dtype, operator.device)
    raise InputError(f"operator is a {type(operator).__name__}, expected one with matvec, size, dtype and device.")
