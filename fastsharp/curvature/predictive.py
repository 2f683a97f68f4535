"""The distribution of labels that a loss is the negative log-likelihood of, and labels drawn from it.

    cross-entropy, rows of logits       y ~ softmax(z)             E r r' = diag(p) - p p'
    mean squared error                  y ~ N(z, 1/h)              E r r' = h I, h the loss's curvature: h = 2 / D for the mean over D numbers
    binary cross-entropy with logits    y_k ~ Bernoulli(s(z_k))    E r r' = diag(s (1 - s))
E r r' is the loss's Hessian by the output, so that the Fisher matrix is the Gauss-Newton matrix. Weights (of classes, of examples, zeros
where labels are ignored, the 1 / count of a mean) multiply the outer products: they say how often a row counts.

Which one it is, is read off torch's own losses, and tried for others; either way it is believed only where its curvature is the loss's,
by a product with the loss's Hessian at the first batch.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsharp.curvature.network_output import network_output
from fastsharp.curvature.scores import Classes, Scores, Vectors
from fastsharp.errors import InputError
from fastsharp.losses import Loss, Value, split
from fastsharp.objective import Objective

GATE = 1e-3  # of the curvature: another loss misses by a share of it
_AT_ONCE = 1 << 24  # float64 probabilities that are summed up at once


class Predictive(ABC):
    """A distribution of labels, given the output for one batch."""

    @abstractmethod
    def curvature(self, u: Tensor) -> Tensor:
        """E[r r'] u for u of the output's shape."""

    @abstractmethod
    def rounding(self, u: Tensor) -> Tensor:
        """What rounding errors of H_L u are measured against."""

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> Scores:
        """The scores of `samples` independent draws; the generator is the CPU's."""


@final
@dataclass(frozen=True)
class Categorical(Predictive):
    z: Tensor
    weight: Tensor  # (*rows, 1)
    dim: int

    @functools.cached_property
    def p(self) -> Tensor:
        return self.z.movedim(self.dim, -1).softmax(-1)

    def curvature(self, u: Tensor) -> Tensor:
        u = u.movedim(self.dim, -1)
        u = u - u.gather(-1, self.p.argmax(-1, keepdim=True).expand(*u.shape[:-1], 1))  # H_L 1 = 0; now nothing cancels where p is near 1
        return (self.weight * self.p * (u - (self.p * u).sum(-1, keepdim=True))).movedim(-1, self.dim)

    def rounding(self, u: Tensor) -> Tensor:
        return (self.weight * self.p).movedim(-1, self.dim) * u

    def draw(self, samples: int, generator: torch.Generator) -> Classes:
        z = self.z.movedim(self.dim, -1)
        uniform = torch.rand(*z.shape[:-1], samples, generator=generator, dtype=torch.float64).to(z.device)
        rows, C = uniform.reshape(-1, samples), z.shape[-1]
        labels = []
        at_once = max(1, _AT_ONCE // C)
        for start in range(0, len(rows), at_once):
            part, u = z.reshape(-1, C)[start : start + at_once], rows[start : start + at_once]
            sums = part.double().softmax(-1).cumsum(-1)  # in float64 whatever the model's dtype is: the same labels
            labels.append(torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp_(max=C - 1))
        return Classes(self.p, torch.cat(labels).reshape(uniform.shape), self.weight, self.dim)


@final
@dataclass(frozen=True)
class Bernoulli(Predictive):
    z: Tensor
    weight: Tensor  # of z's shape

    def curvature(self, u: Tensor) -> Tensor:
        return self.weight * torch.sigmoid(self.z) * torch.sigmoid(-self.z) * u

    def rounding(self, u: Tensor) -> Tensor:
        return self.weight * torch.sigmoid(self.z) * u

    def draw(self, samples: int, generator: torch.Generator) -> Vectors:
        uniform = torch.rand(*self.z.shape, samples, generator=generator, dtype=torch.float64).to(self.z.device)
        ones = (uniform < torch.sigmoid(self.z.double()).unsqueeze(-1)).to(self.z.dtype)
        return _vectors((torch.sigmoid(self.z).unsqueeze(-1) - ones) * self.weight.sqrt().unsqueeze(-1))


@final
@dataclass(frozen=True)
class Gaussian(Predictive):
    z: Tensor
    h: float  # 1 / variance

    def curvature(self, u: Tensor) -> Tensor:
        return self.h * u

    def rounding(self, u: Tensor) -> Tensor:
        return self.h * u

    def draw(self, samples: int, generator: torch.Generator) -> Vectors:
        noise = torch.randn(*self.z.shape, samples, generator=generator, dtype=torch.float64)
        return _vectors(noise.to(self.z.device, self.z.dtype) * self.h**0.5)


def _vectors(r: Tensor) -> Vectors:
    return Vectors(r.reshape(len(r), -1, r.shape[-1]))


Reading = Callable[
    [Loss, Value, Tensor, Any], Predictive | None
]  # (loss, value, output, batch) -> the distribution, None: it is not this one


def cross_entropy(dim: int, mean: bool, shifted: bool = False) -> Reading:
    """Of logits with the classes in dimension `dim`; `shifted`: the labels are those of the next position."""

    def read(loss: Loss, value: Value, output: Tensor, batch: Any) -> Predictive | None:
        target = _target(loss, batch)
        if target is None or output.ndim < 2 or not -output.ndim <= dim < output.ndim:
            return None
        weight, smoothing = _option(loss, "weight", None), float(_option(loss, "label_smoothing", 0.0))
        rows, C = output.movedim(dim, -1).shape[:-1], output.shape[dim]
        w = torch.ones(C, dtype=output.dtype, device=output.device) if weight is None else weight.to(output)
        if target.is_floating_point():
            if target.shape != output.shape:
                return None
            spread = target.to(output).movedim(dim, -1) * (1 - smoothing) + smoothing / C
            c = (spread * w).sum(-1)
            total = torch.as_tensor(float(c.numel()))
        else:
            if target.dtype == torch.bool or target.shape != rows:
                return None
            target, ignored = target.long(), _option(loss, "ignore_index", -100)
            if shifted:
                target = F.pad(target[..., 1:], (0, 1), value=ignored)
            valid = target != ignored
            picked = w[target.masked_fill(~valid, 0)].masked_fill(~valid, 0.0)
            c = (picked * (1 - smoothing) + w.sum() * smoothing / C).masked_fill(~valid, 0.0)
            total = picked.sum()
        if mean:
            c = c / total.to(c).clamp_min(torch.finfo(c.dtype).tiny)
        return Categorical(output, c.unsqueeze(-1), dim) if bool((c >= 0).all()) else None

    return read


def squared_error(mean: bool) -> Reading:
    """Of all numbers of the output."""

    def read(loss: Loss, value: Value, output: Tensor, batch: Any) -> Predictive | None:
        return Gaussian(output, 2.0 / output.numel() if mean else 2.0) if output.numel() else None

    return read


def binary_cross_entropy(mean: bool) -> Reading:
    """Of every number of the output by itself, a logit."""

    def read(loss: Loss, value: Value, output: Tensor, batch: Any) -> Predictive | None:
        target, weight, positive = _target(loss, batch), _option(loss, "weight", None), _option(loss, "pos_weight", None)
        if target is None or target.shape != output.shape:
            return None
        c = torch.ones_like(output) if weight is None else weight.to(output).expand_as(output)
        if positive is not None:
            c = c * (1 + (positive.to(output) - 1) * target)
        c = c / output.numel() if mean else c
        return Bernoulli(output, c) if bool((c >= 0).all()) else None

    return read


def recognised(objective: Objective, kind: str) -> Reading:
    """How to read the distribution off this loss; InputError where none is known. Cost: one evaluation and the loss's second derivative."""
    loss = objective.loss
    with objective.quiet():
        for index, batch in objective.batches:
            value = objective.evaluate(index, batch)
            if value.scale == 0.0:  # all its labels are ignored
                continue
            output = network_output(value, kind)
            own = _own(loss)
            for read in _tried() if own is None else own:
                found = read(loss, value, output.detach(), batch)
                if found is not None and _fits(found, value, output, objective.draw_seed(kind), zero=own is not None):
                    return read
            break
    raise InputError(
        f"operator={kind!r} draws labels from the model's predictive distribution, and none is known for this loss:\n"
        "its curvature at the output is not that of cross-entropy, mean squared error or binary cross-entropy with logits.\n"
        "Use operator='empirical-fisher' (the labels as they are) or operator='ggn' (no labels are drawn)."
    )


def drawn_scores(read: Reading, samples: int) -> Callable[[Value, Tensor, Any, Loss, int], Scores]:
    """A maker of scores from `samples` draws of the labels."""

    def scores(value: Value, output: Tensor, batch: Any, loss: Loss, seed: int) -> Scores:
        found = read(loss, value, output.detach(), batch)
        if found is None:
            raise InputError(
                "a batch's labels have another form than the first batch's, so that none can be drawn. Give all batches one form."
            )
        with torch.no_grad():
            return found.draw(samples, torch.Generator().manual_seed(seed))

    return scores


def _own(loss: Loss) -> list[Reading] | None:
    """How to read a loss of torch's, nothing where it has no distribution; None for other losses."""
    fn = loss.loss_fn.func if isinstance(loss.loss_fn, functools.partial) else loss.loss_fn
    mean = _option(loss, "reduction", "mean") != "sum"
    if isinstance(fn, nn.CrossEntropyLoss) or fn is F.cross_entropy:
        return [cross_entropy(1, mean)]
    if isinstance(fn, nn.MSELoss) or fn is F.mse_loss:
        return [squared_error(mean)]
    if isinstance(fn, nn.BCEWithLogitsLoss) or fn is F.binary_cross_entropy_with_logits:
        return [binary_cross_entropy(mean)]
    return [] if isinstance(fn, nn.NLLLoss) or fn is F.nll_loss else None  # log-probabilities: no curvature to know it by


def _tried() -> Iterator[Reading]:
    """Readings of a loss that is known by its values alone: with torch's defaults, a mean or a sum; labels perhaps of the next token."""
    for mean in (True, False):
        yield from (cross_entropy(-1, mean), cross_entropy(1, mean), cross_entropy(-1, mean, shifted=True))
        yield from (binary_cross_entropy(mean), squared_error(mean))


def _fits(found: Predictive, value: Value, output: Tensor, seed: int, *, zero: bool) -> bool:
    """Whether E[r r'] u is H_L u for a random u, up to rounding; `zero`: also where both vanish, which tells nothing."""
    u = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(output.device, output.dtype)
    try:
        (slope,) = torch.autograd.grad(value.loss, output, create_graph=True)
        (curved,) = torch.autograd.grad(slope, output, u, retain_graph=True) if slope.requires_grad else (torch.zeros_like(u),)
    except RuntimeError:  # no second derivative
        return False
    want, room = found.curvature(u).double(), found.rounding(u).double().norm() * 64 * torch.finfo(output.dtype).eps
    return (zero or bool(want.norm() > 0.0)) and bool((curved.double() - want).norm() <= GATE * want.norm() + room)


def _target(loss: Loss, batch: Any) -> Tensor | None:
    target = split(batch, keep_target=loss.loss_fn is None)[2]
    return target if isinstance(target, Tensor) else None


def _option(loss: Loss, name: str, default: Any) -> Any:
    """An argument that a loss of torch's was given."""
    fn = loss.loss_fn
    while isinstance(fn, functools.partial):
        if name in fn.keywords:
            return fn.keywords[name]
        fn = fn.func
    return getattr(fn, name, default)
