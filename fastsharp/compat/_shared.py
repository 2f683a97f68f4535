"""What the calls of other libraries have in common: samples of a trace, and arguments that mean nothing here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastsharp import ops
from fastsharp.api.subject import checked
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.errors import InputError, StaleOperatorError
from fastsharp.krylov.products import Products
from fastsharp.krylov.rows import dot
from fastsharp.krylov.symmetry import needs_probes, probe
from fastsharp.operator import SymmetricOperator

BLOCK = 8  # probes that share a pass over the data


def refuse(call: str, reasons: dict[str, str], **given: tuple[Any, Any]) -> None:
    """InputError for an argument that is not at its default: each is (value, default), and silence would hide that it does nothing."""
    for name, (value, default) in given.items():
        if value != default:
            raise InputError(f"{call}: {name}={value!r} has no meaning here: {reasons[name]}. Leave it out.")


def probe_forms(operator: SymmetricOperator, kind: str, count: int, seed: int, name: str) -> Iterator[float]:
    """z'Az for probes 0 to count - 1 of the stream of `seed`, BLOCK products at a time, made as they are asked for."""
    products = Products(verified(operator, seed, name), name)
    for first in range(0, count, BLOCK):
        z = torch.empty((min(BLOCK, count - first), operator.n), dtype=operator.dtype, device=operator.device)
        ops.probes(kind, out=z, seed=seed, first=first)
        u = products(z)
        yield from (math.ldexp(dot(a, b), products.unit) for a, b in zip(z, u, strict=True))


def verified(operator: SymmetricOperator, seed: int, name: str) -> SymmetricOperator:
    """The operator, its preflight or symmetry checked as before every solver."""
    if needs_probes(operator, checked(operator, seed=seed)):
        probe(operator, seed, name)
    return operator


def present(operator: SymmetricOperator) -> SymmetricOperator:
    """The operator at the model's present weights: other libraries evaluate the model anew in each call."""
    if isinstance(operator, FiniteSum):
        try:
            operator.check_unchanged()
        except StaleOperatorError:
            operator.refresh()
    return operator


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module gets its own mode back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel and DistributedDataParallel."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model
