"""Sharpness that an optimiser meets: along its update, along mini-batch gradients, and as the step at which the loss rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastsharp.errors import ArgumentTypeError, InputError, ShapeError
from fastsharp.measures.landscape import Landscape
from fastsharp.operator import SymmetricOperator
from fastsharp.params import ParamLayout
from fastsharp.quantiles import student
from fastsharp.results import Estimate

_DOUBLINGS = 60  # of the step until the loss is said never to rise
_ROUNDING = 16  # units of eps of the loss: a smaller change is none
_TOGETHER = 8  # rows of a block product

Products = Callable[[Any, Any, torch.Tensor], torch.Tensor]  # (index, batch, v) -> numerator of the batch's H_B v


def flat_direction(direction: Any, layout: ParamLayout, like: torch.Tensor) -> torch.Tensor:
    """A direction in the parameters as a flat (n,) vector: a flat tensor, {name: tensor}, or a sequence of tensors in the order of the layout."""
    if isinstance(direction, torch.Tensor) and direction.ndim == 1:
        parts = [direction]
    elif isinstance(direction, Mapping):
        missing = [name for name in layout.names if name not in direction]
        if missing:
            raise InputError(
                f"direction: no entry for {', '.join(missing[:4])}. Give each chosen parameter its part, or choose others with params=."
            )
        parts = [direction[name] for name in layout.names]
    elif isinstance(direction, (list, tuple)) and len(direction) == len(layout.names):
        parts = list(direction)
    else:
        raise ArgumentTypeError(
            f"direction is a {type(direction).__name__}, expected a flat tensor of {layout.n} numbers, a dict by parameter name, or a list of tensors."
        )
    if len(parts) > 1 or not isinstance(direction, torch.Tensor):
        for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True):
            if tuple(part.shape) != shape:
                raise ShapeError(f"direction: the part of {name} has shape {tuple(part.shape)}, expected {shape}.")
    flat = torch.cat([part.detach().reshape(-1) for part in parts]).to(like.device, like.dtype)
    if len(flat) != layout.n:
        raise ShapeError(f"direction has {len(flat)} numbers, expected {layout.n}, one for each chosen parameter.")
    if not bool(torch.isfinite(flat).all()):
        raise InputError("direction has NaN or Inf. Check the update it was made from.")
    if not bool(flat.any()):
        raise InputError("direction is zero: there is no curvature along it. Pass an update that moves the weights.")
    return flat


class Slope(NamedTuple):
    """The second-order model of the loss along a direction: L(theta - eta u) = L - eta slope + eta^2 curvature / 2."""

    slope: float  # g'u
    curvature: float  # u'Hu
    squared: float  # ||u||^2


def slope_along(operator: SymmetricOperator, gradient: torch.Tensor, u: torch.Tensor) -> Slope:
    """g'u, u'Hu and ||u||^2, with one product."""
    Hu = (operator @ u).double()
    v = u.double()
    return Slope(float(gradient.double() @ v), float(v @ Hu), float(v @ v))


def critical_step(landscape: Landscape, u: torch.Tensor, rtol: float, start: float) -> tuple[float, int]:
    """(eta_c, losses taken): the smallest step found at which L(theta - eta u) > L(theta), to a relative width of rtol.

    Doubling (or halving) from `start` brackets it, bisection in log eta narrows it down. A loss that rises, falls below its start
    and rises again has several such steps; doubling from below finds the first that it does not jump over.
    """

    rounding = _ROUNDING * torch.finfo(landscape.theta.dtype).eps * abs(landscape.loss())

    def change(eta: float) -> float:
        return float(landscape.changes(-eta * u[None])[0])

    low = high = start
    found, taken = change(start), 1
    if found > 0.0:
        while found > 0.0:
            high, low = low, low / 2
            found, taken = change(low), taken + 1
        if found >= -rounding:  # what a step that small changes is rounding
            raise InputError(
                "the loss rises along -direction down to steps too small to see: it is no descent direction, or its slope drowns in rounding.\n"
                "Pass the update that is subtracted from the weights; model.double() sees smaller slopes."
            )
    else:
        while found <= 0.0:
            low, high = high, 2 * high
            found, taken = change(high), taken + 1
            if taken > _DOUBLINGS:
                return math.inf, taken
    while high > low * (1 + rtol):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if change(middle) > 0.0 else (middle, high)
        taken += 1
    return math.sqrt(low * high), taken


def batch_sharpness(landscape: Landscape, operator: SymmetricOperator, products: Products, *, kind: str, confidence: float) -> Estimate:
    """Over the mini-batches B of the loader, g_B the gradient of B's mean loss:

    "batch"   mean g_B'H_B g_B / mean ||g_B||^2, H_B the Hessian of B's loss: rests at 2/lr for SGD
    "noise"   mean g_B'H g_B / ||mean g_B||^2, H the Hessian of the whole loss: above 2/lr the loss rises in expectation
    """
    top: list[float] = []
    size: list[float] = []
    gradients: list[torch.Tensor] = []
    total = torch.zeros_like(landscape.theta, dtype=torch.float64)
    objective = landscape.objective
    for index, batch in objective.batches:
        weight = landscape.weight((index, batch))
        if objective.reduction != "sum" and weight == 0.0:
            continue  # nothing but ignored labels
        _, g = landscape.ascent(torch.zeros_like(landscape.theta), [(index, batch)])
        total += g.double()
        size.append(float(g.double().square().sum()))
        if kind == "batch":
            divisor = 1.0 if objective.reduction == "sum" else weight
            top.append(float(g.double() @ products(index, batch, g).double()) / divisor)
            continue
        gradients.append(g)
        if len(gradients) == _TOGETHER:
            top += _quadratic(operator, gradients)
            gradients = []
    top += _quadratic(operator, gradients)
    count = len(size)
    if count < 2:
        raise InputError(
            f"batch sharpness: the loader has {count} mini-batch(es), at least 2 are needed. Pass the loader that training uses."
        )
    a = torch.tensor(top, dtype=torch.float64)
    b = torch.tensor(size, dtype=torch.float64) if kind == "batch" else (total / count).square().sum().expand(count)
    if not float(b.sum()) > 0.0:
        raise InputError(
            "batch sharpness: all gradients are zero, so there is no direction. The weights are at a stationary point of every batch."
        )
    value = float(a.sum() / b.sum())
    stderr = float((a - value * b).square().sum().sqrt() * math.sqrt(count / (count - 1)) / b.sum())
    half = student((1 + confidence) / 2, count - 1) * stderr
    notes = ["the interval is that of a ratio of means over the mini-batches, to first order"]
    if kind == "noise":
        notes = ["||mean g_B||^2 is taken at the frozen data: the interval leaves its error out"]
    if count < 6:
        notes.append(f"the interval rests on {count} mini-batches and is rough")
    return Estimate(
        value=value,
        stderr=stderr,
        interval=(value - half, value + half),
        confidence=confidence,
        samples=count,
        n_matvec=count if kind == "noise" else 0,
        converged=True,
        notes=(*notes, *operator.notes),
        settings={**operator.settings, "kind": kind},
        provenance=operator.provenance,
    )


def _quadratic(operator: SymmetricOperator, vectors: list[torch.Tensor]) -> list[float]:
    """v'Hv for each."""
    if not vectors:
        return []
    V = torch.stack(vectors)
    found: list[float] = (V.double() * operator.apply(V).double()).sum(1).tolist()
    return found


def overlap(vectors: torch.Tensor, gradient: torch.Tensor) -> float:
    """||P g||^2 / ||g||^2 in [0, 1]: the share of the squared gradient in the span of orthonormal rows (k, n)."""
    g = gradient.double()
    norm = float(g @ g)
    if norm == 0.0:
        raise InputError("gradient overlap: the gradient is zero, so it has no share in any space.")
    return float((vectors.double() @ g).square().sum()) / norm


def stability(eigenvalue: float, lr: float, momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """lambda / threshold: 1 at the edge of stability. The threshold is 2 / lr; 2 (1 + m) / lr with momentum m; with Nesterov's
    (2 / lr) (1 + m) / (1 + 2 m). Source: Cohen et al. 2021, appendix B."""
    if not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"lr={lr!r}, expected a positive number.")
    if not 0.0 <= momentum < 1.0:
        raise InputError(f"momentum={momentum!r}, expected a number in [0, 1).")
    threshold = 2.0 * (1.0 + momentum) / lr
    return eigenvalue / (threshold / (1.0 + 2.0 * momentum) if nesterov else threshold)
