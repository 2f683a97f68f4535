"""One pass over the data feeds several measures: what a pass can know of a batch, and who asks for what.

A measure is an `Accumulator`: it states what it needs of each batch, is updated batch by batch, and gives its result at the end. `one_pass`
evaluates each batch once in the most demanding way that any accumulator needs, and hands the same `BatchFacts` to all of them:

    fisher_rao, margin = FisherRaoIdentity(objective, confidence), Margin(confidence)
    one_pass(objective, [fisher_rao, margin], what="measure")
    fisher_rao.result(), margin.result()

New measures of single samples are new accumulators; nothing here changes for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from fastsharp.batches import count_of, tree_map
from fastsharp.errors import InputError, ShapeError
from fastsharp.locate import non_finite_loss
from fastsharp.losses import CrossEntropy, Value, cross_entropy_of, split
from fastsharp.measures.classes import Units, output_tensor, units_of
from fastsharp.measures.statistic import SampleEstimate
from fastsharp.measures.tangents import Tangent, TangentPass, unpacked
from fastsharp.objective import Objective

OnBatch = Callable[[int, int], None]


class Need(Flag):
    """What an accumulator asks of the evaluation of a batch, beside its outputs and labels."""

    NOTHING = 0
    TANGENT = auto()  # the derivative of the outputs along the direction of the pass, the parameters themselves by default
    SLOPE = auto()  # the gradient of the batch's loss at the outputs
    GRAPH = auto()  # outputs with their graph to the parameters
    INPUTS = auto()  # outputs with their graph to the floating-point inputs


class Observer(Protocol):
    """What is fed batch by batch.

    needs    how a batch has to be evaluated
    layers   names of modules whose inputs and outputs are looked at
    """

    @property
    def needs(self) -> Need: ...

    @property
    def layers(self) -> frozenset[str]: ...

    def update(self, facts: BatchFacts) -> None:
        """Take in one batch; its graph does not outlive the call."""


class Accumulator(Observer, Protocol):
    """An observer whose end is a measure."""

    def result(self) -> SampleEstimate:
        """The measure over all batches so far."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its first input and its output, detached."""

    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class BatchFacts:
    """What is known of a batch after its evaluation.

    index, start   number of the batch and of its first example in the data
    count          examples
    calls          {name of a module asked for: its calls}
    inputs         floating-point inputs of the model, leaves of the graph under Need.INPUTS
    """

    objective: Objective
    what: str
    index: int
    start: int
    count: int
    batch: Any
    value: Value
    tangent: Tangent | None
    calls: Mapping[str, Sequence[Call]]
    inputs: tuple[torch.Tensor, ...]

    @cached_property
    def output(self) -> torch.Tensor:
        """The tensor that the loss was computed from."""
        return output_tensor(self.value, self.what)

    @property
    def cross_entropy(self) -> CrossEntropy | None:
        """The options of the loss where it is a cross-entropy."""
        return cross_entropy_of(self.objective.loss.loss_fn)

    @cached_property
    def units(self) -> Units:
        """Logits, labels and weights of the labels that count; the loss is a cross-entropy."""
        options = self.cross_entropy
        assert options is not None, "asked for by an accumulator that did not check the loss"
        return units_of(self.value, self.batch, options, self.what)

    @cached_property
    def owners(self) -> torch.Tensor:
        """(units,) number of each unit's example in the data."""
        return self.units.owners + self.start

    def unit_rows(self, t: torch.Tensor) -> torch.Tensor:
        """(u, C) the units' rows of a tensor that is shaped like the output."""
        last = t if not isinstance(self.value.output, torch.Tensor) else t.movedim(1, -1)
        return self.units.take(last.flatten(0, -2))

    def example_losses(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(losses, weights, owners) of single samples with L = sum w l / sum w: units of a cross-entropy, else examples."""
        options = self.cross_entropy
        if options is not None:
            return self.units.losses(options.label_smoothing), self.units.weights, self.owners
        losses = self._one_by_one()
        return losses, torch.ones_like(losses).detach(), self.example_owners()

    def example_owners(self) -> torch.Tensor:
        """(count,) numbers of the examples in the data."""
        return torch.arange(self.start, self.start + self.count)

    def _one_by_one(self) -> torch.Tensor:
        """The loss of each row of the output with its row of the target; their sum is compared with the batch's loss."""
        _, _, target = split(self.batch)
        output, loss_fn = self.output, self.objective.loss.loss_fn
        if output.shape[0] != self.count or not isinstance(target, torch.Tensor) or target.shape[:1] != output.shape[:1]:
            raise ShapeError(
                f"{self.what}: the output {tuple(output.shape)} and the target have no row for each of the {self.count} examples.\n"
                "Return one row an example."
            )
        parts = [loss_fn(output[i : i + 1], target[i : i + 1]) for i in range(self.count)]
        losses = torch.stack([p[0] if isinstance(p, tuple) else p.reshape(()) for p in parts])
        must_agree(self.what, losses.detach(), float(self.value.loss.detach()) * self.value.scale, losses.detach())
        return losses


def must_agree(what: str, values: torch.Tensor, whole: float, before: torch.Tensor) -> None:
    """InputError where single samples do not add up to their batch: a penalty on the weights, or a loss that mixes samples.

    before   what the values were before anything cancelled in them: the batch's own sum is accurate to eps of these
    """
    values, before = values.detach(), before.detach()
    parts = float(values.sum())
    room = 1e-2 * float(values.abs().sum()) + 64 * torch.finfo(values.dtype).eps * float(before.abs().sum())
    if not abs(parts - whole) <= room:
        raise InputError(
            f"{what}: the samples of a batch add up to {parts:.6g}, the batch itself gives {whole:.6g}. The loss depends on the weights\n"
            "not only through the outputs of single samples (a penalty, a loss across samples). Leave that term out."
        )


def one_pass(
    objective: Objective,
    observers: Sequence[Observer],
    *,
    what: str,
    direction: Sequence[torch.Tensor] | None = None,
    first_only: bool = False,
    on_batch: OnBatch | None = None,
) -> tuple[str, ...]:
    """Feed every batch to every observer; -> notes of the pass.

    what        names the caller in messages
    direction   of the tangents, one tensor a parameter; None: the parameters themselves
    first_only  stop after the first batch

    Raises NonFiniteError where a loss is not finite, and what the observers raise.
    """
    needs = Need.NOTHING
    layers: frozenset[str] = frozenset()
    for observer in observers:
        needs, layers = needs | observer.needs, layers | observer.layers
    along = objective.selection.params if direction is None else direction
    tangents = TangentPass(objective, along) if Need.TANGENT in needs else None
    objective.check_marks()
    start = 0
    with objective.quiet():
        for index, batch in [(0, objective.batches.first())] if first_only else objective.batches:
            facts = _evaluated(objective, what, index, start, batch, needs, layers, tangents)
            for observer in observers:
                observer.update(facts)
            start += facts.count
            if on_batch is not None:
                on_batch(start, objective.batches.count)
    objective.check_marks()
    if tangents is not None and tangents.reason is not None:
        return (f"tangents of the model by two reverse passes: {tangents.reason}",)
    return ()


def _evaluated(
    objective: Objective,
    what: str,
    index: int,
    start: int,
    batch: Any,
    needs: Need,
    layers: frozenset[str],
    tangents: TangentPass | None,
) -> BatchFacts:
    inputs: tuple[torch.Tensor, ...] = ()
    if Need.INPUTS in needs:
        batch, inputs = _differentiable(batch, what)
    tangent = None
    calls: dict[str, list[Call]] = {}

    def recording() -> AbstractContextManager[None]:
        return _recorded(objective.model, layers, calls)

    if tangents is not None:
        tangent = tangents(index, batch, slope=Need.SLOPE in needs, recording=recording, what=what)
        value = tangent.value
    if tangents is None or needs & (Need.GRAPH | Need.INPUTS):
        with recording(), torch.set_grad_enabled(bool(needs & (Need.GRAPH | Need.INPUTS))):
            value = objective.evaluate_unchecked(index, batch)
    if not bool(torch.isfinite(value.loss.detach())):
        loss = float(value.loss.detach())
        raise non_finite_loss(objective.model, index, batch, loss, lambda: objective.evaluate_unchecked(index, batch))
    return BatchFacts(objective, what, index, start, count_of(batch), batch, value, tangent, calls, inputs)


def _differentiable(batch: Any, what: str) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The batch with its floating-point inputs as new leaves, and these."""
    args, kwargs, target = split(batch, keep_target=False)
    leaves: list[torch.Tensor] = []

    def leaf(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1]

    if isinstance(batch, Mapping):
        key = next(k for k, v in batch.items() if v is target)
        fresh: Any = {k: v if k == key else tree_map(leaf, v) for k, v in batch.items()}
    else:
        x = tree_map(leaf, batch[0])
        fresh = (x, batch[1])
    if not leaves:
        found = ", ".join(str(t.dtype) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        raise InputError(
            f"{what} differentiates with respect to the inputs, and none is floating-point ({found}).\nPass embeddings in place of token indices."
        )
    return fresh, tuple(leaves)


@contextmanager
def _recorded(model: nn.Module, layers: frozenset[str], calls: dict[str, list[Call]]) -> Iterator[None]:
    """Calls of the named modules in one evaluation, through forward hooks that are gone afterwards; `calls` holds no others."""
    calls.clear()
    handles = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.setdefault(name, []).append(Call(_primal(args[0]), _primal(output)))

        return record

    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _primal(t: torch.Tensor) -> torch.Tensor:
    """t without its graph and without its tangent."""
    return unpacked(t).primal.detach()
