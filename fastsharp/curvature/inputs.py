"""Second derivatives by what flows through a network: by its input, or by the output of one of its modules.

The tensor becomes a parameter of a model around the model, so that the engine, the preflight and the watch over weights and data are those
of every other matrix. The batch carries the numbers of its samples in place of them: where a check looks at a few samples, it gets theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from fastsharp.batches import as_loader, count_of, tensors_of, tree_map
from fastsharp.composite import Composite
from fastsharp.curvature.gauss_newton import GGN
from fastsharp.curvature.hessian import Hessian
from fastsharp.errors import ArgumentTypeError, BatchFormatError, DtypeError, InputError, OutputFormatError, ShapeError, listing
from fastsharp.guard import Modes, untouched
from fastsharp.losses import TARGET_KEYS, BatchLoss, call_model, split
from fastsharp.objective import weights_hash

_KINDS: dict[str, type[Hessian] | type[GGN]] = {"hessian": Hessian, "ggn": GGN}
Where = str | int | None
_NUMBERS = "numbers of the samples"  # no argument of a model has spaces in its name


class _OfData(Composite):
    """What the two operators share: one matrix over a parameter that stands for data."""

    def __init__(self, around: nn.Module, model: nn.Module, batch: Any, loss_fn: Any, operator: str, options: dict[str, Any]) -> None:
        if operator not in _KINDS:
            raise InputError(f"operator={operator!r} is none of {', '.join(map(repr, _KINDS))}.")
        inner = _KINDS[operator](around, [batch], loss_fn, params=list(around._parameters), **options)
        super().__init__([inner], inner.n)
        self._model = model

    @property
    def provenance(self) -> dict[str, Any]:
        """With the model's own name, and a hash of its weights."""
        own = super().provenance
        name = type(self._model).__name__
        return {**own, "model": name, "input_hash": own["weights_hash"], "weights_hash": weights_hash(self._model.parameters())}

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.parts[0].apply(V, out)


@final
class InputHessian(_OfData):
    """d^2 L / dx^2 for the loss L of one batch by its input x (N, ...), all N samples' coordinates in one vector of n = x.numel().

    model, loss_fn   as in `fastsharp.Hessian`; a `batch_loss` calls the model itself and is refused
    batch      one batch `(x, y)` or a dict; one sample is a batch of one
    wrt        which input, where there are several floating-point ones: its place among the positional ones, or its key
    operator   "hessian", or "ggn": J' H_L J with J = d output / dx
    reduction, bn, dropout, backend, memory, seed   as in `fastsharp.lanczos`

    Where the model treats samples apart, the matrix is block-diagonal over them, and the mean over N samples makes each block 1/N of the
    sample's own Hessian: for those take a loss with reduction="sum", or batches of one. Vectors in the shape of the input:
    `layout.views(v)[0]`. Cost of a product: as of a Hessian by the parameters of the first layer.
    Raises InputError (no floating-point input, several without wrt), DtypeError (an integer input), BatchFormatError (several batches).
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Any = None,
        *,
        wrt: Where = None,
        operator: str = "hessian",
        params: None = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        backend: str = "auto",
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        batch = _one_batch("InputHessian", model, batch, loss_fn, params)
        args, kwargs, _ = split(batch, keep_target=loss_fn is None)
        self._wrt = _chosen(args, kwargs, wrt)
        x = args[self._wrt] if isinstance(self._wrt, int) else kwargs[self._wrt]
        dtype, device = _of(model)
        if x.dtype != dtype:
            raise DtypeError(f"InputHessian: the input is {x.dtype}, the model {dtype}. Convert one of them.")
        around = _WithInput(model, x.detach().to(device), self._wrt)
        options = {"reduction": reduction, "bn": bn, "dropout": dropout, "backend": backend, "memory": memory, "seed": seed}
        super().__init__(around, model, _replaced(batch, self._wrt, torch.arange(len(x))), loss_fn, operator, options)

    @property
    def kind(self) -> str:
        return f"{self.parts[0].settings['operator']} by the input"

    @property
    def facts(self) -> dict[str, Any]:
        return {"wrt": self._wrt}


@final
class ActivationHessian(_OfData):
    """d^2 L / da^2 for the loss L of one batch by the output a (N, ...) of a named module: what lies behind it is a function of a.

    module     its name in `model.named_modules()`, as "layer1.0.conv2"; called once a forward pass, with one floating-point tensor as output,
               samples first
    Other arguments, the factor 1/N of a mean, shapes and errors: as in `InputHessian`; the batch may hold integers (tokens). The derivative
    is taken as that by a zero added to a. Cost of a product: that of the layers behind the module, and a forward pass where graphs are not kept.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Any = None,
        *,
        module: str,
        operator: str = "hessian",
        params: None = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        backend: str = "auto",
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        batch = _one_batch("ActivationHessian", model, batch, loss_fn, params)
        known = dict(model.named_modules())
        if module not in known:
            near = [name for name in known if name]
            raise InputError(f"ActivationHessian: the model has no module {module!r}. It has {listing(near)}.")
        self._module = module
        _, device = _of(model)
        batch = tree_map(lambda t: t.to(device), batch)
        around = _WithShift(model, known[module], module)
        modes = Modes(model, bn, dropout)
        with untouched(model, device), modes.applied("shape", seed), torch.no_grad():
            args, kwargs, _ = split(batch, keep_target=loss_fn is None)
            around.measure(args, kwargs, count_of(batch))
        options = {"reduction": reduction, "bn": bn, "dropout": dropout, "backend": backend, "memory": memory, "seed": seed}
        super().__init__(around, model, _numbered(batch), loss_fn, operator, options)

    @property
    def kind(self) -> str:
        return f"{self.parts[0].settings['operator']} by the output of {self._module}"

    @property
    def facts(self) -> dict[str, Any]:
        return {"module": self._module}


class _WithInput(nn.Module):
    """The model with one input taken from a parameter, by the numbers of the samples that come in its place."""

    def __init__(self, model: nn.Module, x: torch.Tensor, wrt: str | int) -> None:
        super().__init__()
        self.train(model.training)
        self.inner, self.input = model, nn.Parameter(x.clone())
        self._wrt = wrt

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._wrt, int):
            places = list(args)
            places[self._wrt] = self.input.index_select(0, args[self._wrt])
            return call_model(self.inner, tuple(places), kwargs)
        return call_model(self.inner, args, {**kwargs, self._wrt: self.input.index_select(0, kwargs[self._wrt])})


class _WithShift(nn.Module):
    """The model with a parameter, at zero, added to the output of one of its modules; the last argument has the samples' numbers."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str) -> None:
        super().__init__()
        self.train(model.training)
        self.inner, self._name = model, name
        self._module = (module,)  # not registered again: it is the model's
        self.activation: nn.Parameter

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> None:
        """Learn the shape of the output, and refuse what cannot be shifted."""
        seen: list[Any] = []
        self._hooked(lambda output: seen.append(output), args, kwargs)
        what = f"ActivationHessian: {self._name!r}"
        if len(seen) != 1:
            raise InputError(
                f"{what} was called {len(seen)} times in a forward pass, so that its output is not one tensor. Choose another module."
            )
        (output,) = seen
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise OutputFormatError(f"{what} returns {kind}, expected one floating-point tensor. Choose a module within or behind it.")
        if output.ndim == 0 or output.shape[0] != samples:
            raise ShapeError(
                f"{what} returns shape {tuple(output.shape)}, expected the batch's {samples} samples first. Choose another module."
            )
        self.activation = nn.Parameter(torch.zeros_like(output, memory_format=torch.contiguous_format))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *inputs, numbers = args if _NUMBERS not in kwargs else (*args, kwargs.pop(_NUMBERS))
        return self._hooked(lambda output: output + self.activation.index_select(0, numbers), tuple(inputs), kwargs)

    def _hooked(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handle = self._module[0].register_forward_hook(lambda module, inputs, output: f(output))
        try:
            return call_model(self.inner, args, kwargs)
        finally:
            handle.remove()


def _one_batch(call: str, model: Any, batch: Any, loss_fn: Any, params: Any) -> Any:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{call}: model is a {type(model).__name__}, expected a torch.nn.Module.")
    if params is not None:
        raise InputError(f"{call}: params= chooses parameters, this matrix has none of them as its coordinates. Leave it out.")
    if isinstance(loss_fn, BatchLoss):
        raise InputError(f"{call}: a batch_loss calls the model itself, so its input cannot be exchanged. Pass loss_fn(output, target).")
    if batch is None:
        raise InputError(f"{call}: a model needs data: pass one batch (x, y).")
    drawn = as_loader(batch)
    found = list(drawn) if isinstance(drawn, list) else [b for b, _ in zip(drawn, range(2), strict=False)]
    if len(found) != 1:
        raise BatchFormatError(
            f"{call}: got {'no batch' if not found else 'several batches'}, expected one: coordinates are those of its samples."
        )
    return found[0]


def _of(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the model's first floating-point parameter or buffer."""
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            return t.dtype, t.device
    raise InputError(f"{type(model).__name__} has no floating-point parameter, so its dtype and device are not known.")


def _chosen(args: tuple[Any, ...], kwargs: dict[str, Any], wrt: Where) -> str | int:
    """Place or key of the input to differentiate by."""
    inputs: dict[str | int, Any] = {**dict(enumerate(args)), **{k: v for k, v in kwargs.items() if k not in TARGET_KEYS}}
    listed = listing([f"{k!r} ({v.dtype if isinstance(v, torch.Tensor) else type(v).__name__})" for k, v in inputs.items()])
    real = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if wrt is not None:
        if wrt not in inputs:
            raise InputError(f"InputHessian: wrt={wrt!r} is none of the inputs {listed}.")
        if wrt not in real:
            raise DtypeError(
                f"InputHessian: the input {wrt!r} of {listed} is not floating-point, it has no derivative.\n"
                "For tokens use ActivationHessian(..., module=) with the embedding's name."
            )
        return wrt
    if not real:
        raise DtypeError(
            f"InputHessian: no input is floating-point: {listed}. Integers have no derivative.\n"
            "For tokens use ActivationHessian(..., module=) with the embedding's name."
        )
    if len(real) > 1:
        raise InputError(f"InputHessian: several inputs are floating-point: {listed}. Choose one by wrt=.")
    return real[0]


def _replaced(batch: Any, wrt: str | int, numbers: torch.Tensor) -> Any:
    """The batch with the numbers of its samples in place of one input."""
    if isinstance(batch, Mapping):
        return {**batch, wrt: numbers}
    x, y = batch
    if isinstance(x, Mapping):
        return {**x, wrt: numbers}, y
    if isinstance(x, (tuple, list)):
        return tuple(numbers if i == wrt else part for i, part in enumerate(x)), y
    return numbers, y


def _numbered(batch: Any) -> Any:
    """The batch with the numbers of its samples as one more input, the last one."""
    numbers = torch.arange(count_of(batch), device=tensors_of(batch)[0].device)
    if isinstance(batch, Mapping):
        return {**batch, _NUMBERS: numbers}
    x, y = batch
    if isinstance(x, Mapping):
        return {**x, _NUMBERS: numbers}, y
    return (*x, numbers) if isinstance(x, (tuple, list)) else (x, numbers), y
