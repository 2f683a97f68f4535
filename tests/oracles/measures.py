"""Sharpness measures by their definitions, sample by sample and entry by entry in float64, by routes that share no code with fastsharp.

Why they are independent: one sample at a time through torch's plain loss (fastsharp takes tangents of whole batches), double backward over
every entry of a weight (fastsharp has closed forms or products with block vectors), the network rescaled by its features as the published
code does (fastsharp rescales nothing), numpy for what follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from tests.oracles.dense import doubled

Forward = Callable[[nn.Module, Any], torch.Tensor]


def in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def singles(model: nn.Module, whole: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """(inputs, target) of one example after the other, in float64."""
    x, y = doubled(whole)
    for i in range(len(y)):
        yield (tuple(t[i : i + 1] for t in x) if isinstance(x, tuple) else (x[i : i + 1],)), y[i : i + 1]


def gradients(model: nn.Module, whole: Any, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(samples, n) gradient of every single sample."""
    model = in_double(model)
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in singles(model, whole):
        found = torch.autograd.grad(loss(model(*x), y), params, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(params, found, strict=True)]))
    return torch.stack(rows)


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters() if p.requires_grad])


def fisher_rao_norm(model: nn.Module, whole: Any, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """sqrt(mean_i <grad l_i, theta>^2)."""
    along = gradients(model, whole, loss) @ parameters(model)
    return float(along.square().mean().sqrt())


def fisher_rao_as_published(logits: NDArray[Any], labels: NDArray[Any], factor: int) -> float:
    """The published loop over samples, with its factor handed in."""
    total = 0.0
    for f, y in zip(logits, labels, strict=True):
        p = np.exp(f - f.max()) / np.exp(f - f.max()).sum()
        total += (np.inner(p, f) - f[y]) ** 2
    return float(np.sqrt(factor**2 * total / len(labels)))


def relative_flatness_as_published(model: nn.Module, whole: Any, layer: str, objective: Any, *, normalize: bool) -> tuple[float, float]:
    """(trace, max): the double-backward loop over every entry of the layer's weight, one full batch with its mean loss, features rescaled.

    The weight enters as W / sigma with W = sigma * weight, which is what dividing the features and multiplying the weight means.
    """
    model, batch = in_double(model), doubled(whole)
    module = model.get_submodule(layer)
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    objective(model, batch)
    handle.remove()
    weight = module.weight.detach()
    channels = seen[0].movedim(1, -1) if weight.ndim > 2 else seen[0]
    sigma = torch.from_numpy(np.std(channels.reshape(-1, channels.shape[-1]).numpy(), axis=0)) if normalize else torch.ones(weight.shape[1])
    sigma = torch.where(sigma == 0, torch.ones_like(sigma), sigma).double().view(1, -1, *[1] * (weight.ndim - 2))
    W = (weight * sigma).requires_grad_()
    loss = objective(lambda *args, **kw: functional_call(model, {f"{layer}.weight": W / sigma}, args, kw), batch)
    (g,) = torch.autograd.grad(loss, W, create_graph=True)
    d, m = W.shape[0], W[0].numel()
    H = torch.zeros(d, m, d, m, dtype=torch.float64)
    for s in range(d):
        for k in range(m):
            (row,) = torch.autograd.grad(g.reshape(d, m)[s, k], W, retain_graph=True, allow_unused=True)
            H[s, k] = 0.0 if row is None else row.detach().reshape(d, m)
    rows = W.detach().reshape(d, m)
    trace, largest = 0.0, 0.0
    for s in range(d):
        for t in range(d):
            trace += float(rows[s] @ rows[t]) * float(H[s, :, t, :].trace())
        largest += float(rows[s] @ rows[s]) * float(np.linalg.eigvalsh(H[s, :, s, :].numpy())[-1])
    return trace, largest


def margins(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    return np.array([f[y] - max(v for c, v in enumerate(f) if c != y) for f, y in zip(logits, labels, strict=True)])


def input_jacobian_norms(model: nn.Module, whole: Any, *, probabilities: bool = False) -> NDArray[Any]:
    """(samples,) Frobenius norms of one sample's Jacobian after the other."""
    model, norms = in_double(model), []
    for x, _ in singles(model, whole):
        parts = jacobian(lambda *z: model(*z).softmax(1) if probabilities else model(*z), x)
        norms.append(float(sum(p.square().sum() for p in parts)) ** 0.5)
    return np.array(norms)


def distances(model: nn.Module, whole: Any) -> NDArray[Any]:
    """(samples,) margin over the norm of its gradient in the input, one sample after the other."""
    model, found = in_double(model), []
    for x, y in singles(model, whole):
        x = tuple(t.clone().requires_grad_() for t in x)
        f = model(*x)[0]
        other = max(f[c] for c in range(len(f)) if c != int(y))
        margin = f[int(y)] - other
        norm = sum(g.square().sum() for g in torch.autograd.grad(margin, x)) ** 0.5
        found.append(float((margin / norm).detach()))
    return np.array(found)


def cross_entropy(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log p_y of single samples, summed."""
    return -(f - f.logsumexp(1, keepdim=True)).gather(1, y[:, None]).sum() if f.ndim == 2 else F.cross_entropy(f, y, reduction="sum")
