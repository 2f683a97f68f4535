"""Rescalings of weights that leave the decisions of a network as they are, found by trying them on data.

    layers        W_A -> t W_A,  b_A -> t b_A,  W_B -> W_B / t     the same outputs, where everything between A and B passes a factor t > 0 on
                                                                  and nothing else reads what A gives
    temperature   W -> W / T,  b -> b / T for the head             logits over T: the same largest class

A and B are modules with a `weight`, A with one of any kind (linear, convolution, affine normalisation, embedding), B with a matrix or filter;
A was called before B, with no other matrix between the two. Whether a candidate holds is decided by the outputs before and after, on all the
data, to what a rounding of every weight does to them. Types and names of modules only make the text of a refusal.

Source: Dinh, Pascanu, Bengio, Bengio, "Sharp minima can generalize for deep nets" (ICML 2017), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fastsharp.errors import InputError, NonFiniteError, listing
from fastsharp.measures.classes import needs_cross_entropy, output_tensor
from fastsharp.measures.facts import one_pass
from fastsharp.measures.head import HeadFinder
from fastsharp.objective import Objective

_ROUNDINGS = 8.0  # times what a rounding of every weight was seen to do: the outputs of two draws are a sample, not a bound
_DRAWS = 2


@dataclass(frozen=True)
class Scaling:
    """Parameters by name, and what each is multiplied by."""

    name: str
    factors: tuple[tuple[str, float], ...]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with these parameters multiplied in place; their bits are put back."""
        named = dict(model.named_parameters(remove_duplicate=False))
        before = [(named[name], named[name].detach().clone()) for name, _ in self.factors]
        with _edited(before), torch.no_grad():
            for name, factor in self.factors:
                named[name].mul_(factor)
            yield


@contextmanager
def _edited(before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    try:
        yield
    finally:
        with torch.no_grad():
            for p, held in before:
                p.copy_(held)


class Outputs:
    """What the network gives on the data at its own weights, and how far rounding moves it: what rescaled outputs are compared with."""

    def __init__(self, objective: Objective, seed: int) -> None:
        self.objective = objective
        objective.batches.ordered = True  # outputs are compared sample by sample, in every pass
        self.base: list[torch.Tensor] = []
        self._walk(self._keep)
        self.size = max(float(f.abs().max()) for f in self.base)
        if not self.size < float("inf"):
            raise NonFiniteError("invariance: the outputs of the network are not finite. Check the weights and the data for NaN.")
        self.room = self._rounding(seed)

    def distance(self, scale: float = 1.0) -> float:
        """max |f - scale f_0| over the data at the present weights; the first batch alone where that is too far already."""
        worst = 0.0

        def near(index: int, f: torch.Tensor) -> bool:
            nonlocal worst
            off = float((f - scale * self.base[index]).abs().max())
            worst = max(worst, off if off == off else float("inf"))
            return worst <= scale * self.room

        self._walk(near)
        return worst

    def _keep(self, _: int, f: torch.Tensor) -> bool:
        self.base.append(f)
        return True

    def _walk(self, see: Callable[[int, torch.Tensor], bool]) -> None:
        """see(index, outputs) batch by batch, until it returns False."""
        with self.objective.quiet():
            for index, batch in self.objective.batches:
                with torch.no_grad():  # inside: reading a stream switches gradients on
                    f = output_tensor(self.objective.evaluate_unchecked(index, batch), "invariance").double()
                if not see(index, f):
                    return

    def _rounding(self, seed: int) -> float:
        """How far the outputs may be off where nothing but rounding differs."""
        params = list(self.objective.model.parameters())
        eps = torch.finfo(self.objective.dtype).eps
        random = torch.Generator().manual_seed(seed)
        worst = 0.0

        def far(index: int, f: torch.Tensor) -> bool:
            nonlocal worst
            worst = max(worst, float((f - self.base[index]).abs().max()))
            return True

        for _ in range(_DRAWS):
            with _edited([(p, p.detach().clone()) for p in params]), torch.no_grad():
                for p in params:
                    if p.is_floating_point():
                        signs = torch.randint(0, 2, p.shape, generator=random, dtype=torch.int8).to(p)
                        p.mul_(1.0 + eps * (2.0 * signs - 1.0))
                self._walk(far)
        return _ROUNDINGS * worst + 4 * eps * self.size


def layer_scalings(outputs: Outputs, t: float) -> tuple[list[Scaling], dict[str, str]]:
    """(those that leave the outputs as they are, {"A -> B": why not}) for neighbouring layers in the order of their calls."""
    objective = outputs.objective
    order = _called(objective)
    weighted = [(name, m) for name, m in order if isinstance(m._parameters.get("weight"), nn.Parameter)]
    found: list[Scaling] = []
    refused: dict[str, str] = {}
    since: list[tuple[str, nn.Module]] = []  # candidates for A: the matrix before, and what carries a vector of weights after it
    for name, module in weighted:
        if _weight(module).ndim < 2:
            since.append((name, module))
            continue
        reason = ""
        for first, candidate in reversed(since):
            scaling, reason = _try(outputs, (first, candidate), (name, module), t, order)
            if scaling is not None:
                found.append(scaling)
                break
        else:
            if since:
                refused[f"{since[0][0]} -> {name}"] = reason
        since = [(name, module)]
    if not found and not refused:
        names = listing([name for name, _ in weighted]) or "none"
        refused["layers"] = (
            f"a rescaling takes two layers that are called one after the other; modules with a weight that were called: {names}"
        )
    return found, refused


def temperature_scaling(outputs: Outputs, temperature: float) -> Scaling:
    """The head's weight and bias over T; InputError with the reason where there is no head, or decisions would change."""
    objective = outputs.objective
    needs_cross_entropy(objective.loss, "a temperature", "Elsewhere the outputs themselves are the decision.")
    finder = HeadFinder(objective.model)
    one_pass(objective, [finder], what="invariance", first_only=True)
    head = finder.head("invariance")
    names = [f"{head.name}.weight"] + ([f"{head.name}.bias"] if head.bias is not None else [])
    scaling = Scaling(f"temperature {temperature:g}", tuple((name.lstrip("."), 1.0 / temperature) for name in names))
    with scaling.applied(objective.model):
        off = outputs.distance(1.0 / temperature)
    if off > outputs.room / temperature:
        raise InputError(f"the logits do not scale with the weights of the head {head.name!r}: its weights also enter elsewhere.")
    return scaling


def _try(
    outputs: Outputs, a: tuple[str, nn.Module], b: tuple[str, nn.Module], t: float, order: list[tuple[str, nn.Module]]
) -> tuple[Scaling | None, str]:
    (first, A), (second, B) = a, b
    if _weight(A) is _weight(B):
        return None, "the two share one weight"
    bias = A._parameters.get("bias")
    up = [(f"{first}.weight", t)] + ([(f"{first}.bias", t)] if bias is not None else [])
    scaling = Scaling(f"{first} x {t:g}, {second} / {t:g}", (*up, (f"{second}.weight", 1.0 / t)))
    with scaling.applied(outputs.objective.model):
        off = outputs.distance()
    if off <= outputs.room:
        return scaling, ""
    names = [name for name, _ in order]
    between = [type(m).__name__ for name, m in order[names.index(first) + 1 : names.index(second)]]
    what = f"between them: {listing(list(dict.fromkeys(between)))}" if between else "no module lies between them"
    return None, f"the outputs move by {off / outputs.size:.2g} of the largest, rounding by {outputs.room / outputs.size:.1g}; {what}"


def _called(objective: Objective) -> list[tuple[str, nn.Module]]:
    """Modules without children, in the order of their first call."""
    order: dict[str, nn.Module] = {}

    def hook(name: str) -> Callable[[nn.Module, object], None]:
        def record(module: nn.Module, _: object) -> None:
            order.setdefault(name, module)

        return record

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in objective.model.named_modules() if not list(m.children())]
    try:
        with objective.quiet(), torch.no_grad():
            objective.evaluate_unchecked(0, objective.batches.first())
    finally:
        for handle in handles:
            handle.remove()
    return list(order.items())


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module._parameters["weight"]
    assert isinstance(weight, nn.Parameter)
    return weight
