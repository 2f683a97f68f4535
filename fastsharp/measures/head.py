"""The linear layer that makes the logits, found by what it does in one evaluation, not by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastsharp.errors import InputError, listing
from fastsharp.measures.facts import BatchFacts, Call, Need


@dataclass(frozen=True)
class Head:
    """A linear layer W (C, m) whose output is the logits."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None

    def features(self, facts: BatchFacts) -> torch.Tensor:
        """(u, m) the layer's inputs, one row a unit."""
        call = single(facts.calls.get(self.name, ()), self.name, facts.what)
        return facts.units.take(call.input.flatten(0, -2))


class HeadFinder:
    """Looks at every linear layer during one batch: which of them made the logits."""

    needs = Need.NOTHING

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.layers = frozenset(self._linear)
        self.found: list[str] = []  # in the order of the calls
        self.classes: tuple[int, ...] = ()

    def update(self, facts: BatchFacts) -> None:
        logits = facts.output
        self.classes = tuple(logits.shape)
        for name, calls in facts.calls.items():
            if any(_is(call.output, logits) for call in calls):
                self.found.append(name)

    def head(self, what: str) -> Head:
        """The layer that made the logits; InputError where there is none, or several."""
        if not self.found:
            raise InputError(
                f"{what}: no classifier head found: none of the linear layers ({listing(sorted(self._linear)) or 'there is none'}) returns the logits\n"
                f"{self.classes} as they reach the loss. Return the last layer's output itself, or name a layer: layer='...' uses Hessian products."
            )
        if len(set(self.found)) > 1:
            raise InputError(f"{what}: several heads returned the logits: {listing(sorted(set(self.found)))}. Name one with layer=.")
        return self.named(self.found[0])

    def named(self, name: str) -> Head:
        """One of those found."""
        layer = self._linear[name]
        return Head(name, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def single(calls: Sequence[Call], name: str, what: str) -> Call:
    """The only call of a module; InputError where it was called several times in one evaluation, or never."""
    if len(calls) != 1:
        how = "was not called" if not calls else f"was called {len(calls)} times in one forward pass"
        raise InputError(f"{what}: the layer {name!r} {how}, so it has no one set of features. Choose another layer.")
    return calls[0]


def _is(output: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the logits are this output, or a view of all of it in another order of dimensions."""
    same = output.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    return same and output.numel() == logits.numel() and output.data_ptr() == logits.data_ptr()
