"""Operators of E models of one dimension, each at its own weights and on data of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fastsharp.batches import Batches
from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.mlp import agree
from fastsharp.curvature.said import preflight_notes
from fastsharp.curvature.stack import evaluated, flat, share, stacked
from fastsharp.errors import InputError, of_member
from fastsharp.guard import version_of
from fastsharp.objective import stale, weights_hash
from fastsharp.operator import EnsembleOperator, SymmetricOperator
from fastsharp.ops import mlp
from fastsharp.params import ParamLayout


@final
class GenericEnsemble(EnsembleOperator):
    """Any operators of one dimension, dtype and device, member by member: E products where a native ensemble needs one call."""

    def __init__(self, operators: Sequence[FiniteSum]) -> None:
        _check_alike(operators)
        super().__init__(len(operators), operators[0].n, operators[0].dtype, operators[0].device)
        self._operators = tuple(operators)

    def member(self, e: int) -> FiniteSum:
        return self._operators[e]

    def check_unchanged(self) -> None:
        for e, operator in enumerate(self._operators):
            with of_member(e):
                operator.check_unchanged()

    def _apply(self, V: Tensor, member: Tensor, out: Tensor) -> None:
        for e in sorted(set(member.tolist())):
            rows = (member == e).nonzero()[:, 0].to(V.device)
            out[rows] = self._operators[e].apply(V[rows])


@final
class MlpEnsemble(EnsembleOperator):
    """E plain fully connected nets of one architecture, one batch of equally many samples each: all products in one native call.

    first    the operator of models[0]: what it says of itself holds for all, but for weights, data and preflight
    batches  the data of each, those of `first` first

    A product reads the weights of construction. `check_unchanged` raises StaleOperatorError once a model or its data have changed.
    Raises Unavailable, with the number of the member and the reason, where the kernel does not apply.
    """

    def __init__(self, first: FiniteSum, models: Sequence[nn.Module], batches: Sequence[Batches]) -> None:
        super().__init__(len(models), first.n, first.dtype, first.device)
        if not first.form.plain:
            raise Unavailable("the native kernel has products of the Hessian and the Gauss-Newton matrix alone")
        self.first, self.models, self.batches = first, tuple(models), tuple(batches)
        self.stack = stacked(first.objective, models, batches)
        self.gauss = first.form.gauss
        self.prepared = mlp.prepare(self.stack.net, self.stack.theta, self.stack.x, self.stack.target, self.stack.weight)
        self.values: list[float] = self.prepared.primal.value.tolist()  # the losses
        for e, loss in enumerate(self.stack.losses):
            if not agree(self.values[e], loss):
                raise Unavailable(f"member {e}: the recognised net has the loss {self.values[e]:.6g}, the model {loss:.6g}")
        if not bool(torch.isfinite(self.prepared.primal.value).all()):
            raise Unavailable("the loss of a member is not finite")
        self.preflight: list[dict[str, Any]] = [{"level": "off"} for _ in models]
        self._marks = [[(p.data_ptr(), version_of(p)) for _, _, p in member] for member in self.stack.held]
        self._notes = tuple(first.objective.notes())
        self._provenance = first.provenance

    def member(self, e: int) -> SymmetricOperator:
        return _MlpMember(self, e)

    def check_unchanged(self) -> None:
        names = self.first.objective.selection.names
        for e, (held, marks) in enumerate(zip(self.stack.held, self._marks, strict=True)):
            found = [
                name
                for name, (holder, key, p), mark in zip(names, held, marks, strict=True)
                if holder.get(key) is not p or (p.data_ptr(), version_of(p)) != mark
            ]
            with of_member(e):
                if found:
                    raise stale(found)
                self.batches[e].check_unchanged()
        same = (flat(self.stack.held) == self.stack.theta).all(1)  # edits through .data leave no mark
        if not bool(same.all()):
            with of_member(int(same.logical_not().nonzero()[0])):
                raise stale(["the parameters"])

    def loss(self, e: int) -> float:
        """The loss of member e by its own forward pass; inside `first.objective.quiet()`."""
        with of_member(e), torch.no_grad():
            value = evaluated(self.first.objective, self.models[e], self.batches[e].first())
            return float(value.loss) * share(value, self.first.objective)

    def notes(self, e: int) -> tuple[str, ...]:
        """What a result of member e must say."""
        return (*self._notes, *preflight_notes(self.preflight[e]))

    def provenance(self, e: int) -> dict[str, Any]:
        """That of the first, with the hashes of member e."""
        data = self.batches[e]
        own = {"samples": data.count, "data_hash": data.digest(), "weights_hash": weights_hash(self.stack.theta[e : e + 1])}
        return {**self._provenance, **own}

    def _apply(self, V: Tensor, member: Tensor, out: Tensor) -> None:
        self.prepared.product(V, member=member, out=out, gauss=self.gauss)


@final
class _MlpMember(SymmetricOperator):
    """One matrix of an MlpEnsemble."""

    def __init__(self, ensemble: MlpEnsemble, e: int) -> None:
        super().__init__(ensemble.n, ensemble.dtype, ensemble.device)
        self._ensemble, self._e = ensemble, e

    @property
    def notes(self) -> tuple[str, ...]:
        return self._ensemble.notes(self._e)

    @property
    def settings(self) -> dict[str, Any]:
        return {**self._ensemble.first.settings, "preflight": self._ensemble.preflight[self._e]}

    @property
    def provenance(self) -> dict[str, Any]:
        return self._ensemble.provenance(self._e)

    @property
    def layout(self) -> ParamLayout:
        return self._ensemble.first.layout

    def check_unchanged(self) -> None:
        self._ensemble.check_unchanged()

    def _apply(self, V: Tensor, out: Tensor) -> None:
        self._ensemble.apply(V, torch.full((len(V),), self._e), out=out)


def _check_alike(operators: Sequence[FiniteSum]) -> None:
    if not operators:
        raise InputError("an ensemble has no members. Pass at least one operator.")
    first = operators[0]
    for e, other in enumerate(operators):
        mine, theirs = (first.n, first.dtype, first.device, first.kind), (other.n, other.dtype, other.device, other.kind)
        if mine != theirs:
            raise InputError(f"member {e} of the ensemble is {theirs}, member 0 is {mine}: (n, dtype, device, operator) must be the same.")
