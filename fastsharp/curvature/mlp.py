"""Products of a plain fully connected net by one native call: the net is recognised from the calls that one evaluation makes.

A net qualifies where the loss of a batch is computed by linear layers with one activation between them (ReLU, tanh, GELU) and
cross-entropy or mean squared error on top, and every chosen parameter is a weight or bias of one of them. Whatever else touches the
activations, the parameters or the loss on its way is a reason to leave the batch to another backend, which the message names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsharp.curvature.batch_products import BatchProducts, Made, Request, Unavailable
from fastsharp.losses import Value
from fastsharp.objective import Objective
from fastsharp.ops import mlp
from fastsharp.params import ParamLayout

_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.Tensor.relu: "relu",
    F.relu_: "relu",
    torch.relu_: "relu",
    torch.tanh: "tanh",
    torch.Tensor.tanh: "tanh",
    F.tanh: "tanh",
    F.gelu: "gelu",
}
_FLATTEN = (torch.flatten, torch.Tensor.flatten, torch.Tensor.view, torch.Tensor.reshape, torch.reshape)
_LOOKS = (
    "__get__", "dim", "size", "numel", "is_floating_point", "is_complex", "item", "isfinite", "__bool__", "__float__", "ndimension",
)  # fmt: skip


@dataclass
class _Layer:
    weight: Tensor
    bias: Tensor | None
    activation: str = "identity"


class _Trace(TorchFunctionMode):
    """Follows the activations from call to call; `refusal` is the first thing that does not belong to a plain net."""

    def __init__(self, params: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.layers: list[_Layer] = []
        self.x: Tensor | None = None
        self.loss: str | None = None
        self.options: dict[str, Any] = {}
        self.refusal: str | None = None
        self._params = {id(p) for p in params}
        self._at: Tensor | None = None  # the present end of the chain
        self._mine: dict[int, Tensor] = {}  # everything on the chain, alive so that identities stay unique
        self._value: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.refusal is None:
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", str(func))
        touched = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if func is F.linear:
            self._linear(*args, **kwargs)
            self._move(result)
        elif not any(id(t) in self._mine or id(t) in self._params or t is self._value for t in touched) or name in _LOOKS:
            return
        elif self._value is not None:
            if not (name in ("reshape", "detach") and touched[0] is self._value):
                self.refusal = f"the loss goes through {name}"
            elif name == "reshape":
                self._value = result
        elif not args or args[0] is not self._at:
            self.refusal = f"{name} is no part of a chain of layers"
        elif func in _ACTIVATIONS and self.layers[-1].activation == "identity":
            gelu = func is F.gelu and kwargs.get("approximate", "none") == "tanh"
            self.layers[-1].activation = "gelu_tanh" if gelu else _ACTIVATIONS[func]
            self._move(result)
        elif (func is F.dropout and not (args[2] if len(args) > 2 else kwargs.get("training", True))) or (
            func in _FLATTEN and result.shape == self._at.shape
        ):
            self._move(result)
        elif func in (F.cross_entropy, F.mse_loss) and self._at is not None:
            self._finish(func, args, kwargs, result)
        else:
            self.refusal = f"{name} is no linear layer, ReLU, tanh, GELU, cross-entropy or mean squared error"

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if self._at is None:
            self.x = input
        elif input is not self._at or self._value is not None:
            self.refusal = "a linear layer does not follow the layer before it"
        if not torch.is_grad_enabled():
            self.refusal = "a linear layer is evaluated under no_grad"
        if input.dim() != 2:
            self.refusal = f"the input of a linear layer has {input.dim()} dimensions"
        self.layers.append(_Layer(weight, bias))

    def _move(self, result: Tensor) -> None:
        self._at = result
        self._mine[id(result)] = result

    def _finish(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        squared = func is F.mse_loss
        names = ("input", "target") if squared else ("input", "target", "weight")
        given = dict(zip(names, args, strict=False)) | kwargs
        self.loss, self.options, self._value = "squared" if squared else "cross_entropy", given, result
        if given.get("label_smoothing", 0.0) or (not squared and given["target"].is_floating_point()):
            self.refusal = "cross-entropy has label smoothing or probabilities as its target"
        elif squared and (given.get("weight") is not None or given["target"].shape != given["input"].shape):
            self.refusal = "the squared error is weighted or broadcast"
        elif len(args) > len(names) or result.dim() != 0:
            self.refusal = "the loss is called in a way that is not followed"


@dataclass(frozen=True)
class Recognised:
    """A net with the weights and data of one batch; scale and count are the batch's in L = sum scale loss / sum count."""

    net: mlp.Net
    theta: Tensor  # (n,)
    x: Tensor
    target: Tensor
    weight: Tensor
    options: dict[str, Any]  # the loss's own arguments
    loss: float
    scale: float
    count: float | None

    def agrees(self, own: float) -> bool:
        """Whether the loss of the recognised net is that of the model."""
        return agree(own, self.loss)


def agree(value: float, loss: float) -> bool:
    """Whether the loss of a recognised net is that of the model."""
    return abs(value - loss) <= 1e-4 * max(abs(value), 1e-3)


def recognised(objective: Objective, index: Any, batch: Any, *, weights: torch.dtype | None = None) -> Recognised:
    """The plain net behind one evaluation of a batch, inside `objective.quiet()`; Unavailable with the reason where there is none.

    weights   the dtype of the samples' weights, the loss's where none is given
    """
    if objective.device.type != "cpu" and not mlp.native(objective.device):
        raise Unavailable(f"there is no native kernel for the model's device, {objective.device}, in this installation")
    selection = objective.selection
    return followed(objective.model, selection.params, selection.layout, lambda: objective.evaluate(index, batch), weights)


def followed(
    model: nn.Module,
    params: tuple[Tensor, ...],
    layout: ParamLayout,
    evaluate: Callable[[], Value],
    weights: torch.dtype | None = None,
) -> Recognised:
    """The plain net behind what `evaluate` computes with the chosen parameters of a model; Unavailable where there is none."""
    trace = _Trace(tuple(model.parameters()))
    with trace:
        value = evaluate()
    net = _net(trace, params, layout.offsets)
    theta = torch.cat([p.detach().reshape(-1) for p in params])
    x, target, weight = _data(trace, value.loss.dtype, weights or value.loss.dtype)
    options = {name: value for name, value in trace.options.items() if name not in ("input", "target")}
    return Recognised(net, theta, x, target, weight, options, float(value.loss.detach()), value.scale, value.count)


def double_product(objective: Objective, index: Any, batch: Any, v: Tensor, gauss: bool) -> Tensor:
    """The kernel's A v (n,) of the loss of one batch in float64, at the weights and data as they are; Unavailable as above."""
    found = recognised(objective, index, batch, weights=torch.float64)
    target = found.target.double() if found.target.is_floating_point() else found.target
    parts = (found.theta.double(), found.x.double(), target, found.weight)
    prepared = mlp.prepare(found.net, *(part[None] for part in parts))
    return prepared.product(v[None], out=v.new_empty(1, len(v)), gauss=gauss)[0]


def mlp_products(request: Request) -> Made:
    """Products of one batch of a plain fully connected net; Unavailable with the reason elsewhere."""
    if request.bf16:
        raise Unavailable("the native kernel has no bfloat16 products")
    if not request.form.plain:
        raise Unavailable("the native kernel has products of the Hessian and the Gauss-Newton matrix alone")
    objective = request.objective
    found = recognised(objective, request.index, request.batch)
    prepared = mlp.prepare(found.net, found.theta[None], found.x[None], found.target[None], found.weight[None])
    own = float(prepared.primal.value[0])
    if not found.agrees(own):
        raise Unavailable(f"the recognised net has the loss {own:.6g}, the model {found.loss:.6g}")
    return Made(_MlpProducts(prepared, request.gauss, objective.selection.layout.offsets), found.scale, found.count)


def _net(trace: _Trace, params: tuple[Tensor, ...], offsets: tuple[int, ...]) -> mlp.Net:
    """The architecture behind a trace."""
    if trace.refusal or trace.loss is None or not trace.layers:
        raise Unavailable(trace.refusal or "no linear layer with cross-entropy or mean squared error was seen")
    where = {id(p): offset for p, offset in zip(params, offsets, strict=False)}
    used = [t for layer in trace.layers for t in (layer.weight, layer.bias) if t is not None]
    if len({id(t) for t in used}) != len(used) or {id(t) for t in used} != set(where):
        raise Unavailable("weights are shared, frozen, left out, or no parameters of the model")
    *hidden, last = trace.layers
    kinds = {layer.activation for layer in hidden}
    if len(kinds) > 1 or last.activation != "identity":
        raise Unavailable(f"the activations differ between layers: {', '.join(layer.activation for layer in trace.layers)}")
    if len(trace.layers) > mlp.MOST_LAYERS:
        raise Unavailable(f"{len(trace.layers)} layers are more than {mlp.MOST_LAYERS}")
    widths = (trace.layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in trace.layers))
    weights = tuple(where[id(layer.weight)] for layer in trace.layers)
    biases = tuple(None if layer.bias is None else where[id(layer.bias)] for layer in trace.layers)
    return mlp.Net(widths, weights, biases, kinds.pop() if kinds else "identity", trace.loss, offsets[-1])


def _data(trace: _Trace, dtype: torch.dtype, weights: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the weight of each sample in the loss."""
    x, given = trace.x, trace.options
    assert x is not None
    if x.dtype != dtype or x.requires_grad:
        raise Unavailable(f"the input is {x.dtype}, the loss {dtype}")
    target = given["target"]
    for name, t in (("input", x), ("target", target)):
        if type(t) is not Tensor or t.layout != torch.strided or t.is_neg():
            raise Unavailable(f"the {name} is a {type(t).__name__} whose memory the kernel cannot read")
    if trace.loss == "squared":
        target = target.to(dtype)
    elif target.dim() != 1:
        raise Unavailable(f"the target of cross-entropy has {target.dim()} dimensions")
    else:
        target = target.long()  # torch takes eight bits as well
    return x.contiguous(), target.contiguous(), sample_weights(trace.loss, given, target, weights)


def sample_weights(loss: str | None, options: dict[str, Any], target: Tensor, dtype: torch.dtype) -> Tensor:
    """w_i of L = sum_i w_i loss_i, (..., N), for targets (..., N) of cross-entropy or (..., N, d) of the squared error |z - target|^2 / 2."""
    mean = options.get("reduction", "mean") == "mean"
    if loss == "squared":
        samples, size = target.shape[-2:]
        return torch.full(target.shape[:-1], 2.0 / (samples * size) if mean else 2.0, dtype=dtype, device=target.device)
    valid = target != options.get("ignore_index", -100)
    weight: Tensor = valid.to(dtype)
    if options.get("weight") is not None:
        weight = weight * options["weight"].to(dtype)[target.where(valid, 0)]
    return weight / weight.sum(-1, keepdim=True) if mean else weight


@final
class _MlpProducts(BatchProducts):
    plain = True
    uncapturable = "the native kernel takes a batch in one launch or two"

    def __init__(self, prepared: mlp.Prepared, gauss: bool, offsets: tuple[int, ...]) -> None:
        self._prepared, self._gauss = prepared, gauss
        finite = torch.isfinite(prepared.primal.gradient()[0])
        self.not_finite = tuple(i for i, (a, b) in enumerate(pairwise(offsets)) if not bool(finite[a:b].all()))
        self._out: Tensor | None = None

    def add_products(self, V: Tensor, out: Tensor, scale: float) -> None:
        if self._out is None or self._out.shape != V.shape:
            self._out = V.new_empty(V.shape)
        self.products(V, self._out, scale, 1.0)
        out.add_(self._out)

    def products(self, V: Tensor, out: Tensor, scale: float, divisor: float) -> None:
        V = V if V.stride(0) >= V.shape[1] else V.contiguous()  # expanded rows overlap
        self._prepared.product(V, out=out, gauss=self._gauss, scale=scale, divisor=divisor)

    def nbytes(self, ignore: set[int]) -> int:
        primal = self._prepared.primal
        held = (*primal.a, *primal.slope, *primal.bend, *primal.y, primal.theta)
        return self._prepared.nbytes + sum(t.nbytes for t in held)
