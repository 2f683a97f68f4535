"""Before a Hessian is used: is it one fixed, symmetric matrix, and is it the derivative of the gradient?

Note on numerical properties. The gates were set between healthy networks and planted faults:
  repeat     two products from graphs built anew: bitwise on the CPU, 64 eps elsewhere; healthy 0, weakest fault 1.6e-4
  symmetry   |u'Hv - v'Hu| <= 16 eps ||u|| ||Hv||: healthy <= 0.5 eps; |u'Hv| below the line would raise false alarms,
             since it is small by chance
  finite     ||(g(t + hv) - g(t - hv)) / 2h - Hv|| <= 1e-5 ||Hv|| in float64 with unit v: healthy <= 4.4e-10, weakest
  difference fault 1.4e-2. It alone sees a detached term or a backward taken as constant, which leave H symmetric.
             A ReLU network with many units has kinks inside any fixed step, so a failure is tried again with smaller
             steps on fewer samples, as long as rounding, eps ||g|| / h, stays below the gate; a fault fails at every step.
All checks run on the first batch (the finite difference on at most 32 samples of it): H is a weighted sum over batches.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastsharp.batches import count_of, head, tensors_of, tree_map
from fastsharp.curvature.hessian import Hessian
from fastsharp.errors import (
    DoubleBackwardError,
    InputError,
    NondeterministicOperatorError,
    NonFiniteError,
    NotSymmetricError,
    OperatorError,
    UnstableDataWarning,
)
from fastsharp.losses import Loss

LEVELS = ("full", "fast", "off")
REPEAT_GATE = 64.0  # eps, where the device is not bitwise repeatable
SYMMETRY_GATE = 16.0  # eps
DIFFERENCE_GATE = 1e-5
DIFFERENCE_SAMPLES = 32


def preflight(hessian: Hessian, level: str = "fast", *, strict_data: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run the checks of `level`, raise on the first that fails, and return what was measured.

    level   "fast": graph walk, repeat, three symmetry pairs, one finite-difference probe, the first two batches drawn again;
            "full": the same on one batch of each shape, four finite-difference probes, and a whole second data pass;
            "off": nothing, and the result says so
    Cost of "fast": 4 products and 2 gradients on one batch, 1 product and 2 gradients on <= 32 samples in float64.
    Raises DoubleBackwardError, NotSymmetricError, NondeterministicOperatorError, NonFiniteError.
    """
    if level not in LEVELS:
        raise InputError(f"preflight={level!r} is none of {', '.join(map(repr, LEVELS))}.")
    outcome: dict[str, Any] = {"level": level}
    if level != "off":
        objective = hessian.objective
        outcome["data"] = _check_data(hessian, level, strict_data)
        with objective.quiet():
            for index, batch in _chosen_batches(hessian, level):
                generator = torch.Generator().manual_seed(seed + 7919 * index)
                measured = _check_products(hessian, index, batch, generator)
                measured |= _check_difference(hessian, index, batch, generator, probes=4 if level == "full" else 1)
                for name, value in measured.items():
                    outcome[name] = max(outcome[name], value) if isinstance(value, float) and name in outcome else value
    hessian.preflight = outcome
    return outcome


def _check_data(hessian: Hessian, level: str, strict: bool) -> str:
    batches = hessian.objective.batches
    found = batches.recheck() if level == "full" else batches.redraw()
    if found == "other samples":
        message = (
            "the loader returns other samples when it is read again (augmentation, or shuffle with drop_last).\n"
            f"The curvature is that of the first draw, hash {batches.digest()}. For figures that can be repeated, fix the data."
        )
        if strict:
            raise NondeterministicOperatorError(message)
        warnings.warn(message, UnstableDataWarning, stacklevel=4)
    return found


def _chosen_batches(hessian: Hessian, level: str) -> list[tuple[int, Any]]:
    """The first batch, or for "full" the first of each combination of shapes."""
    if level == "fast":
        return [(0, hessian.objective.batches.first())]
    chosen: dict[tuple[Any, ...], tuple[int, Any]] = {}
    for index, batch in hessian.objective.batches:
        chosen.setdefault(tuple(tuple(t.shape) for t in tensors_of(batch)), (index, batch))
    return list(chosen.values())


def _check_products(hessian: Hessian, index: int, batch: Any, generator: torch.Generator) -> dict[str, Any]:
    """Graph walk, repeatability and symmetry of the products of one batch."""
    eps = torch.finfo(hessian.dtype).eps
    V = torch.randn(3, hessian.n, generator=generator, dtype=torch.float64).to(hessian.dtype).to(hessian.device)
    graph, _ = hessian.minibatch_graph(batch, index)
    graph.check_twice_differentiable()
    HV = torch.stack([_flat_product(hessian, graph, v) for v in V])
    again = _flat_product(hessian, hessian.minibatch_graph(batch, index)[0], V[0])
    if not bool(torch.isfinite(HV).all()):
        raise NonFiniteError(_where_not_finite(hessian, HV))
    repeat = float((again - HV[0]).norm().double() / HV[0].norm().double().clamp_min(torch.finfo(torch.float64).tiny))
    if repeat > (0.0 if hessian.device.type == "cpu" else REPEAT_GATE * eps):
        raise NondeterministicOperatorError(
            f"two products with the same vector differ by {repeat:.2e} of their norm: the model or loss is random.\n"
            "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
        )
    U, W = V.double(), HV.double()
    cross, room = U @ W.T, torch.outer(U.norm(dim=1), W.norm(dim=1))
    defect = float(((cross - cross.T).abs() / torch.maximum(room, room.T).clamp_min(torch.finfo(torch.float64).tiny)).max())
    if defect > SYMMETRY_GATE * eps:
        raise NotSymmetricError(
            f"|u'Hv - v'Hu| is {defect:.2e} of ||u|| ||Hv||, above the gate of {SYMMETRY_GATE * eps:.1e}: the product is not symmetric.\n"
            "A custom autograd.Function with an inconsistent backward is the usual cause; check it with torch.autograd.gradgradcheck."
        )
    return {"repeat": repeat, "symmetry": defect}


def _flat_product(hessian: Hessian, graph: Any, v: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(v)
    product = graph.product(hessian.layout.views(v))
    if product is not None:
        torch._foreach_add_(hessian.layout.views(out), list(product))
    return out


def _where_not_finite(hessian: Hessian, HV: torch.Tensor) -> str:
    parts = zip(hessian.layout.names, hessian.layout.views(HV[0]), strict=True)
    bad = [name for name, part in parts if not bool(torch.isfinite(part).all())] or ["another probe"]
    return (
        f"a Hessian-vector product has NaN or Inf in the rows of {', '.join(bad[:4])}, though the loss is finite.\n"
        "A square root or norm at zero has no second derivative; add a small constant inside it, or leave the parameter out with params=."
    )


def _check_difference(hessian: Hessian, index: int, batch: Any, generator: torch.Generator, probes: int) -> dict[str, Any]:
    """Compare the product with differences of gradients, in float64, on a few samples."""
    double = _DoubleGradient(hessian, index, batch)
    try:
        double.settle()
    except (RuntimeError, TypeError) as e:
        if isinstance(e, OperatorError):
            raise
        return {"finite_difference": f"not run: the model does not evaluate in float64 ({_first_line(e)})"}
    worst = 0.0
    for _ in range(probes):
        v = torch.randn(hessian.n, generator=generator, dtype=torch.float64).to(hessian.device)
        worst = max(worst, _difference(double, v / v.norm()))
    if worst > DIFFERENCE_GATE:
        raise DoubleBackwardError(
            f"the product misses the finite difference of the gradient by {worst:.1%} of its norm (gate {DIFFERENCE_GATE:.0e}):\n"
            "a term of the loss is detached, or a custom backward is treated as constant, so autograd's second derivative is wrong.\n"
            "Look for .detach(), .data or torch.no_grad() in the model and loss, and check custom Functions with gradgradcheck."
        )
    return {"finite_difference": worst}


def _difference(double: _DoubleGradient, v: torch.Tensor) -> float:
    """The smallest mismatch over ever smaller steps and samples; a fault shows at all of them, a kink does not."""
    best = float("inf")
    step = 1e-6 * max(1.0, float(double.theta.norm()))
    for shrink, samples in ((1.0, DIFFERENCE_SAMPLES), (0.1, DIFFERENCE_SAMPLES), (0.1, 4), (1e-2, 2), (1e-3, 1)):
        h = step * shrink
        double.limit(samples)
        Hv, g = double.product(v)
        error = float(((double.gradient(double.theta + h * v) - double.gradient(double.theta - h * v)) / (2 * h) - Hv).norm())
        scale, rounding = float(Hv.norm()), 128 * torch.finfo(torch.float64).eps * float(g.norm()) / h
        if error <= DIFFERENCE_GATE * scale + min(rounding, 1e-3 * max(scale, float(g.norm()) * 1e-6)):
            return min(error / scale, DIFFERENCE_GATE) if scale else 0.0
        best = min(best, error / scale if scale else float("inf"))
    return best


class _DoubleGradient:
    """Gradient and product of a float64 copy of the objective on a few samples of one batch; the model is not touched."""

    def __init__(self, hessian: Hessian, index: int, batch: Any) -> None:
        self._objective = hessian.objective
        self._layout = hessian.layout
        self._key = ("float64", index)
        self._batch = tree_map(_to_double, batch)
        self._whole = self._batch
        self._default = torch.get_default_dtype()
        model = self._objective.model
        # a buffer may be stored in float32 whatever the parameters are, so everything floating goes along
        self._constants = {name: _to_double(t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._loss = _double_loss(self._objective.loss)
        self.theta = torch.cat([p.detach().double().reshape(-1) for p in self._objective.selection.params])
        self.limit(DIFFERENCE_SAMPLES)

    def settle(self) -> None:
        """Evaluate once; a model that creates tensors of the default dtype on its way gets that set to float64 as well."""
        try:
            self.gradient(self.theta)
        except RuntimeError:
            self._default = torch.float64
            self.gradient(self.theta)

    def limit(self, samples: int) -> None:
        """Use at most this many samples, where the batch can be cut."""
        if self._objective.modes.bn != "frozen-batch-stats" and self._objective.modes.dropout != "fixed-masks":
            cut = head(self._whole, 0, samples) if count_of(self._whole) > samples else None
            self._batch = self._whole if cut is None else cut

    def gradient(self, theta: torch.Tensor) -> torch.Tensor:
        """g(theta), (n,)."""
        leaves = [view.detach().requires_grad_() for view in self._layout.views(theta)]
        grads = torch.autograd.grad(self._value(leaves), leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    def product(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(H v, g) at theta."""
        leaves = [view.detach().requires_grad_() for view in self._layout.views(self.theta)]
        grads = torch.autograd.grad(self._value(leaves), leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        pairs = [(g, t) for g, t in zip(grads, self._layout.views(v), strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(v), torch.cat([g.detach().reshape(-1) for g in grads])
        product = torch.autograd.grad([g for g, _ in pairs], leaves, [t for _, t in pairs], allow_unused=True, materialize_grads=True)
        return torch.cat([p.reshape(-1) for p in product]), torch.cat([g.detach().reshape(-1) for g in grads])

    def _value(self, leaves: list[torch.Tensor]) -> torch.Tensor:
        objective = self._objective
        weights = self._constants | dict(zip(self._layout.names, leaves, strict=True))

        def call() -> torch.Tensor:
            with objective.modes.applied(self._key, objective.mask_seed(self._key)):
                return self._loss(self._batch).loss

        before = torch.get_default_dtype()
        torch.set_default_dtype(self._default)
        try:
            return _with_weights(objective.model, weights, call)
        finally:
            torch.set_default_dtype(before)


def _with_weights(model: nn.Module, weights: dict[str, torch.Tensor], call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """call() while the model's parameters and buffers are `weights`; the loss object calls the model itself."""

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> torch.Tensor:
            return call()

    result: torch.Tensor = functional_call(Swapped(), {f"inner.{name}": t for name, t in weights.items()}, ())
    return result


def _double_loss(loss: Loss) -> Loss:
    """The same loss with float64 weights of its own; the model it calls stays the same object."""
    double = copy.copy(loss)
    if isinstance(loss.loss_fn, nn.Module):
        double.loss_fn = copy.deepcopy(loss.loss_fn).double()
    return double


def _to_double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def _first_line(e: BaseException) -> str:
    return str(e).strip().split("\n")[0][:120]
