"""The Hessian of a network as a full float64 matrix, by a route that shares no code with fastsharp.

Why it is independent: forward-mode derivatives of reverse-mode gradients (fastsharp takes two reverse passes), one big batch and
torch's own mean (fastsharp adds weighted batches), weights swapped in by `functional_call` on a float64 copy (fastsharp uses the
module as it is), the flat order taken from `named_parameters` (fastsharp has a layout of its own).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[..., Any]
Objective = Callable[[Call, Any], torch.Tensor]  # (model called with some weights, the one big batch) -> scalar


def doubled(tree: Any) -> Any:
    """The same nest with its floating-point tensors in float64."""
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {k: doubled(v) for k, v in tree.items()}
    return type(tree)(doubled(v) for v in tree) if isinstance(tree, (tuple, list)) else tree


def dense_hessian(model: nn.Module, objective: Objective, batch: Any) -> torch.Tensor:
    """d^2 objective / d theta^2 (n, n) in float64; theta: the trainable parameters in the order of `named_parameters`."""
    model = copy.deepcopy(model).double()
    batch = doubled(batch)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trained.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view(p.shape) for part, p in zip(flat.split(sizes), trained.values(), strict=True)]
        weights = dict(zip(trained, parts, strict=True))
        return objective(lambda *args, **kwargs: functional_call(model, weights, args, kwargs), batch)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), mock.patch.object(F, "layer_norm", _layer_norm), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch.jit, on the first forward derivative
            H = hessian(loss)(torch.cat([p.reshape(-1) for p in trained.values()]))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return H.detach()


def _layer_norm(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer normalisation in elementary operations: torch's own op has a wrong forward derivative of its backward (2.10 to 2.14)."""
    dims = tuple(range(-len(shape), 0))
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + eps).sqrt() * weight + bias


def eigenvalues(H: torch.Tensor) -> torch.Tensor:
    """All eigenvalues, descending, of a matrix that is symmetric up to rounding."""
    assert float((H - H.T).norm()) <= 1e-12 * max(float(H.norm()), 1e-300), "the oracle's own Hessian is not symmetric"
    return torch.linalg.eigvalsh((H + H.T) / 2).flip(0)
