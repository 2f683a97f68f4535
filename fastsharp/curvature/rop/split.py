"""A linearised batch cut in three for each group of parameters: parameters -> y -> network's output z -> loss.

y is the first value through which all influence of the group passes. With B = dz/dy and J = dy/dtheta the group's block of the
Gauss-Newton matrix is J' B' H_L B J, H_L the Hessian of the loss by z. Where no part between theta and z bends in what depends on
theta, z is linear in theta around the point (almost everywhere), and this block is that of the Hessian.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from fastsharp.curvature.rop.inputs import bends, by_sample, only, sample_gradients
from fastsharp.curvature.rop.linearise import Linearised, Step, Sums
from fastsharp.curvature.rop.rule import Part

Tensor = torch.Tensor


class Segment:
    """The parts from a group's parameters to y, differentiated by these parameters alone.

    params   numbers of the parameters, ascending
    y        slot of y
    linear   z is linear in the parameters: no part up to z bends in what depends on them
    alone    all parameters of the group are used, and others enter before y only together with them, as those of a folded norm do
    """

    def __init__(self, steps: Sequence[Step], params: Sequence[int], y: int, linear: bool, alone: bool) -> None:
        self.params, self.y, self.linear, self.alone = tuple(params), y, linear, alone
        self._steps = tuple(steps)

    def tangent(self, v: Sequence[Tensor]) -> Tensor | None:
        """y_t = J v for v (b, *shape) by parameter; None where it is zero."""
        values: dict[int, Tensor | None] = dict(zip(self.params, v, strict=True))
        for step in self._steps:
            x_t = [values.get(s) for s in step.inputs]
            if any(t is not None for t in x_t):
                values.update(zip(step.outputs, step.part.tangent(x_t)[0], strict=True))
        return values.get(self.y)

    def add_adjoint(self, y_gt: Tensor, into: Sequence[Tensor]) -> None:
        """into += J' y_gt, by parameter (b, *shape)."""
        places = dict(zip(self.params, into, strict=True))
        sums: dict[int, Tensor] = {self.y: y_gt}
        for step in reversed(self._steps):
            g = [sums.pop(s, None) for s in step.outputs]
            if all(t is None for t in g):
                continue
            x_gt = step.part.backward(g, None, [places.get(s) for s in step.inputs])
            for s, t in zip(step.inputs, x_gt, strict=True):
                if t is None or s < 0:
                    continue
                if s in places:
                    places[s].add_(t)
                else:
                    sums[s] = sums[s] + t if s in sums else t

    def by_sample(self, samples: int) -> bool:
        """Whether `sample_gradients` has a fast way."""
        return len(self._steps) == 1 and by_sample(self._steps[0].part, samples)

    def sample_gradients(self, y_gt: Tensor, samples: int) -> Tensor:
        """(b, samples, n): J_s' y_gt_s of each sample s by itself, parameters in order."""
        (step,) = self._steps
        found = sample_gradients(step.part, y_gt, samples)
        by_slot = {s: g.flatten(2) for s, g in zip(step.inputs, found, strict=True) if g is not None}
        return torch.cat([by_slot[p] for p in self.params], 2)

    def held(self) -> Iterator[Tensor]:
        """Every tensor kept."""
        for step in self._steps:
            yield from step.part.held()


class Split:
    """One batch of `linearised`, with its single output z (samples, ...) of `width` numbers a sample; its largest value has `largest` bytes.

    Raises ValueError with the reason where the loss does not follow from one such output alone.
    """

    def __init__(self, linearised: Linearised, params: int) -> None:
        if linearised.bypassed or len(linearised.outputs) != 1:
            raise ValueError("the loss does not follow from one output of the network alone")
        ((self._z, self.shape),) = linearised.outputs
        if not self.shape or not self.shape[0]:
            raise ValueError("the network's output has no dimension of samples")
        self.samples = self.shape[0]
        self.width = max(1, torch.Size(self.shape).numel() // self.samples)
        self._params, self.largest = params, linearised.largest
        self._network = [step for step in linearised.steps if step.network]
        self._loss = [step for step in linearised.steps if not step.network]
        self._last: dict[int, int] = {self._z: len(self._network)}
        for i, step in enumerate(self._network):
            self._last.update((s, max(i, self._last.get(s, 0))) for s in step.inputs if s >= 0)
        self._sweep: list[Step] | None = None

    def segment(self, params: Collection[int]) -> Segment | None:
        """The segment of these parameters; None where z does not depend on them."""
        own = sorted(params)
        if not any(p in self._last for p in own):
            return None
        depends, opened = set(own), set(own)
        steps: list[Step] = []
        y, linear, alone = -1, True, all(p in self._last for p in own)
        for i, step in enumerate(self._network):
            on = [s in depends for s in step.inputs]
            if not any(on):
                continue
            linear = linear and not bends(step.part, on)
            depends.update(step.outputs)
            if y >= 0:
                continue
            entering = {s for s in step.inputs if 0 <= s < self._params}
            alone = alone and (entering <= set(own) or not entering.isdisjoint(own))
            steps.append(
                step._replace(part=only(step.part, on), inputs=tuple(s if o else -1 for s, o in zip(step.inputs, on, strict=True)))
            )
            opened = {s for s in opened.union(step.outputs) if self._last.get(s, -1) > i}
            if len(opened) == 1 and not opened & set(own):
                (y,) = opened
        return Segment(steps, own, y, linear, alone) if y >= 0 else None

    def bent(self, params: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
        """(H_ll - G_ll) v, by parameter (1, *shape): the second-order terms of the network by themselves, as the engine's parts have them."""
        values: dict[int, Tensor | None] = dict(zip(params, v, strict=True))
        passed: list[tuple[Step, Any]] = []
        for step in self._network:
            x_t = [values.get(s) for s in step.inputs]
            if any(t is not None for t in x_t):
                y_t, keep = step.part.tangent(x_t)
                values.update(zip(step.outputs, y_t, strict=True))
                passed.append((step._replace(part=only(step.part, [t is not None for t in x_t])), keep))
        out = {p: torch.zeros_like(t) for p, t in zip(params, v, strict=True)}
        sums: dict[int, Tensor] = {}
        for step, keep in reversed(passed):
            g = [sums.pop(s, None) for s in step.outputs]
            if keep is None and all(t is None for t in g):
                continue
            for s, t in zip(step.inputs, step.part.backward(g, keep, [None] * len(step.inputs)), strict=True):
                if t is not None and s in out:
                    out[s].add_(t)
                elif t is not None and s >= self._params:
                    sums[s] = sums[s] + t if s in sums else t
        return list(out.values())

    def curve(self, z_t: Tensor) -> Tensor:
        """H_L z_t for z_t (b, *shape), with the scale of the linearised loss."""
        values: dict[int, Tensor | None] = {self._z: z_t}
        kept: list[Any] = []
        for step in self._loss:
            x_t = [values.get(s) for s in step.inputs]
            y_t, keep = step.part.tangent(x_t) if any(t is not None for t in x_t) else ([None] * len(step.outputs), None)
            values.update(zip(step.outputs, y_t, strict=True))
            kept.append(keep)
        sums: dict[int, Tensor] = {}
        for step in reversed(self._loss):
            keep, y_gt = kept.pop(), [sums.pop(s, None) for s in step.outputs]
            if keep is None and all(g is None for g in y_gt):
                continue
            for s, g in zip(step.inputs, step.part.backward(y_gt, keep, [None] * len(step.inputs)), strict=True):
                if g is not None and s >= 0:
                    sums[s] = sums[s] + g if s in sums else g
        return sums.get(self._z, torch.zeros_like(z_t))

    def pull(self, z_gt: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, Tensor | None]]:
        """(slot, dz/dy' z_gt) for the values y at the slots `wanted`, from the output down; z_gt (b, *shape). It stops at the last of them."""
        left = set(wanted)
        sums: dict[int, Tensor] = {self._z: z_gt}
        if self._z in left:
            left.remove(self._z)
            yield self._z, z_gt
        for step in reversed(self._without_parameters()):
            if not left:
                return
            y_gt = [sums.pop(s, None) for s in step.outputs]
            for s, g in zip(step.outputs, y_gt, strict=True):
                if s in left:
                    left.remove(s)
                    yield s, g
            if not left or all(g is None for g in y_gt):
                continue
            for s, g in zip(step.inputs, step.part.backward(y_gt, None, ()), strict=True):
                if g is not None and s >= self._params:
                    sums[s] = sums[s] + g if s in sums else g
        yield from ((s, None) for s in left)

    def gradient(self, z_gt: Tensor, into: Sequence[Tensor]) -> None:
        """into += (dz/dtheta)' z_gt for z_gt (b, *shape) and all parameters, by the engine's own parts."""
        sums = Sums(max(self._z, *(s for step in self._network for s in (*step.inputs, *step.outputs))) + 1)
        sums.add(self._z, z_gt)
        for step in reversed(self._network):
            y_gt = [sums.take(s) for s in step.outputs]
            if all(g is None for g in y_gt):
                continue
            x_gt = step.part.backward(y_gt, None, [into[s] if 0 <= s < self._params else None for s in step.inputs])
            for s, g in zip(step.inputs, x_gt, strict=True):
                if g is None or s < 0:
                    continue
                if s < self._params:
                    into[s].add_(g)
                else:
                    sums.add(s, g)

    def _without_parameters(self) -> list[Step]:
        """The network's steps with parts that differentiate by values alone."""
        if self._sweep is None:
            self._sweep = [step._replace(part=_values_only(step.part, step.inputs, self._params)) for step in self._network]
        return self._sweep


def _values_only(part: Part, inputs: Sequence[int], params: int) -> Part:
    return only(part, [s >= params for s in inputs])
