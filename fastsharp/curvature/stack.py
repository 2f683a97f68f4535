"""Many plain nets of one architecture as stacked weights, data and losses.

The first is recognised from the calls of one evaluation (`fastsharp.curvature.mlp`). Where class and attributes say that the others
compute as it does (`fastsharp.curvature.alike`), their weights and batches take the places of the first one's. Models with a forward
of their own, and losses that are not torch's, may compute anything: each is recorded like the first, and has to be the same net.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsharp.batches import Batches
from fastsharp.curvature.alike import Held, alike
from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.mlp import Recognised, followed, recognised, sample_weights
from fastsharp.curvature.plain import own_ways_of_loss
from fastsharp.errors import of_member
from fastsharp.guard import Modes
from fastsharp.losses import Value
from fastsharp.objective import Objective
from fastsharp.ops import mlp

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Stack:
    """E nets, ready for `ops.mlp.prepare`; `weight` includes what a batch weighs in L = sum scale loss / sum count."""

    net: mlp.Net
    theta: Tensor  # (E, n)
    x: Tensor  # (E, N, d_0)
    target: Tensor  # (E, N) or (E, N, d_L)
    weight: Tensor  # (E, N)
    held: tuple[tuple[Held, ...], ...]  # by member: its parameters
    losses: tuple[float, ...]  # of the members that were recorded: the first, or all


def flat(held: Sequence[Sequence[Held]]) -> Tensor:
    """The present parameters of all members, (E, n)."""
    return torch.cat([p.detach().reshape(-1) for member in held for _, _, p in member]).view(len(held), -1)


def stacked(first: Objective, models: Sequence[nn.Module], batches: Sequence[Batches]) -> Stack:
    """The models as one stack, `first` being the objective of models[0] on batches[0]; Unavailable where they are none."""
    data = [b.single() for b in batches]
    if any(batch is None for batch in data):
        raise Unavailable("the data of a member are several batches, or exceed the memory budget")
    held, known = [], own_ways_of_loss(first.loss.loss_fn) is None
    for e, model in enumerate(models):
        try:
            found, same = alike(models[0], model)
        except Unavailable as reason:
            raise Unavailable(f"member {e}: {reason}") from reason
        held.append(tuple(found))
        known = known and same
    if [id(p) for _, _, p in held[0]] != [id(p) for p in first.selection.params]:
        raise Unavailable("the chosen parameters are not all of the model")
    theta = flat(held)
    with first.quiet():
        one = recognised(first, 0, data[0])
        parts = _by_place(one, data) if known and share(one, first) == 1.0 else None
        recorded = [one]
        if parts is None:
            recorded += [_recorded(first, one, e, models[e], held[e], data[e]) for e in range(1, len(models))]
            x, target = torch.stack([r.x for r in recorded]), torch.stack([r.target for r in recorded])
            parts = x, target, torch.stack([r.weight * share(r, first) for r in recorded])
    stack = Stack(one.net, theta, *parts, tuple(held), tuple(r.loss * share(r, first) for r in recorded))
    _check(stack)
    return stack


def evaluated(first: Objective, model: nn.Module, batch: Any) -> Value:
    """The loss of a model as `first` takes that of its own; inside `first.quiet()`."""
    loss, modes = copy.copy(first.loss), Modes(model, first.modes.bn, first.modes.dropout)
    loss.model = model
    with modes.applied(0, first.mask_seed(0)):
        return loss(batch)


def _by_place(one: Recognised, data: Sequence[Any]) -> Parts | None:
    """Inputs, targets and weights where the first net takes the two tensors of its batch as they are, None where it does not."""
    pairs = [tuple(batch) for batch in data if isinstance(batch, (tuple, list)) and len(batch) == 2]
    if len(pairs) != len(data) or not all(type(t) is Tensor and not t.requires_grad for pair in pairs for t in pair):
        return None
    x, target = pairs[0]
    if any(a.shape != x.shape or a.dtype != x.dtype or b.shape != target.shape or b.dtype != target.dtype for a, b in pairs):
        return None
    taken = one.x.data_ptr() == x.data_ptr() and one.target.data_ptr() == target.data_ptr()
    if not taken or one.x.numel() != x.numel() or len(one.x) != len(x) or one.target.shape != target.shape:
        return None
    stacked_x, targets = torch.stack([a for a, _ in pairs]).view(len(pairs), *one.x.shape), torch.stack([b for _, b in pairs])
    if one.net.loss == "cross_entropy":
        ignored = targets == one.options.get("ignore_index", -100)
        _refuse(((targets < 0) | (targets >= one.net.widths[-1])) & ~ignored, "labels")
    return stacked_x, targets, sample_weights(one.net.loss, one.options, targets, one.x.dtype)


def _recorded(first: Objective, one: Recognised, e: int, model: nn.Module, held: Sequence[Held], batch: Any) -> Recognised:
    """Member e recorded as the first one was."""
    params = tuple(p for _, _, p in held)
    try:
        with of_member(e):
            found = followed(model, params, first.selection.layout, lambda: evaluated(first, model, batch))
    except Unavailable as reason:
        raise Unavailable(f"member {e}: {reason}") from reason
    if found.net != one.net or found.x.shape != one.x.shape:
        raise Unavailable(f"member {e}: {found.net.widths} with {len(found.x)} samples, member 0 is {one.net.widths} with {len(one.x)}")
    return found


def share(found: Recognised | Value, first: Objective) -> float:
    """The factor of a member's one batch in L = sum scale loss / sum count."""
    count = 1.0 if first.reduction == "sum" else found.count
    if not count or not 0.0 < found.scale / count < float("inf"):
        raise Unavailable(f"a batch has scale {found.scale:g} and count {count}")
    return found.scale / count


def _check(stack: Stack) -> None:
    """Where a member's numbers are not finite, its own operator says which and why."""
    for name in ("theta", "x", "target", "weight"):
        t: Tensor = getattr(stack, name)
        if t.is_floating_point():
            _refuse(~torch.isfinite(t), name)


def _refuse(bad: Tensor, what: str) -> None:
    wrong = bad.flatten(1).any(1)
    if bool(wrong.any()):
        raise Unavailable(f"member {int(wrong.nonzero()[0])}: {what} out of range")
