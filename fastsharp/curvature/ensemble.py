"""Operators of E nets of one architecture, each at its own weights and on data of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.mlp import Recognised, recognised
from fastsharp.errors import InputError
from fastsharp.operator import EnsembleOperator
from fastsharp.ops import mlp

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": lambda z: z,
}


@final
class GenericEnsemble(EnsembleOperator):
    """Any operators of one dimension, dtype and device, member by member: E products where a native ensemble needs one call."""

    def __init__(self, operators: Sequence[FiniteSum]) -> None:
        _check_alike(operators)
        super().__init__(len(operators), operators[0].n, operators[0].dtype, operators[0].device)
        self._operators = tuple(operators)

    def check_unchanged(self) -> None:
        for operator in self._operators:
            operator.check_unchanged()

    def _apply(self, V: Tensor, member: Tensor, out: Tensor) -> None:
        for e in sorted(set(member.tolist())):
            rows = (member == e).nonzero()[:, 0].to(V.device)
            out[rows] = self._operators[e].apply(V[rows])


@final
class MlpEnsemble(EnsembleOperator):
    """E plain fully connected nets of one architecture, one batch of equally many samples each: all products in one native call.

    A product reads the weights of construction. `check_unchanged` raises StaleOperatorError once a model or its data have changed.
    Raises Unavailable, with the number of the member and the reason, where the kernel does not apply.
    """

    def __init__(self, operators: Sequence[FiniteSum]) -> None:
        _check_alike(operators)
        super().__init__(len(operators), operators[0].n, operators[0].dtype, operators[0].device)
        self._operators = tuple(operators)
        self._gauss = operators[0].kind == "ggn"
        found = [self._one(e) for e in range(self.E)]
        net, samples = found[0].net, len(found[0].x)
        for e, f in enumerate(found):
            if f.net != net or len(f.x) != samples:
                raise Unavailable(f"member {e}: {f.net.widths} with {len(f.x)} samples, member 0 is {net.widths} with {samples}")
        shares = [self._share(e, f) for e, f in enumerate(found)]
        weights = [f.weight if share == 1.0 else f.weight * share for f, share in zip(found, shares, strict=True)]
        parts = ([f.theta for f in found], [f.x for f in found], [f.target for f in found], weights)
        self._prepared = mlp.prepare(net, *(torch.stack(part) for part in parts))
        self._target = torch.stack(parts[2])
        for e, (f, value, share) in enumerate(zip(found, self._prepared.primal.value.tolist(), shares, strict=True)):
            if not f.agrees(value / share):
                raise Unavailable(f"member {e}: the recognised net has the loss {value / share:.6g}, the model {f.loss:.6g}")

    def check_unchanged(self) -> None:
        for operator in self._operators:
            operator.check_unchanged()

    def by_autograd(self, v: Tensor) -> Tensor:
        """Every member's matrix times v (n,) by torch's own derivatives of the recognised nets, (E, n): what the kernel is compared with."""
        primal = self._prepared.primal
        net, x = primal.net, primal.a[0]

        def outputs(theta: Tensor) -> Tensor:
            a = x
            for l in range(1, net.layers + 1):  # noqa: E741
                W, bias = net.weight(theta, l).mT, net.bias(theta, l)
                z = a @ W if bias is None else torch.baddbmm(bias[:, None], a, W)
                a = _ACTIVATIONS[net.activation](z)
            return z

        def loss(z: Tensor) -> Tensor:  # of all members together: none depends on the weights of another
            if net.loss == "squared":
                return (primal.w * (z - self._target).square().sum(-1) / 2).sum()
            each = F.cross_entropy(z.flatten(0, 1), self._target.flatten(), reduction="none")
            return (primal.w.flatten() * each).sum()

        V = v.expand(self.E, self.n)
        with torch.enable_grad():
            theta = primal.theta.detach().requires_grad_()
            z = outputs(theta)
            if not self._gauss:
                (g,) = grad(loss(z), theta, create_graph=True)
                return grad(g, theta, V)[0]
            u = torch.zeros_like(z, requires_grad=True)
            (back,) = grad(z, theta, u, create_graph=True)
            (tangent,) = grad(back, u, V, retain_graph=True)
            leaf = z.detach().requires_grad_()
            (g,) = grad(loss(leaf), leaf, create_graph=True)
            return grad(z, theta, grad(g, leaf, tangent)[0])[0]

    def _one(self, e: int) -> Recognised:
        objective = self._operators[e].objective
        batches = list(objective.batches)
        if len(batches) != 1:
            raise Unavailable(f"member {e}: the data are {len(batches)} batches, expected one")
        with objective.quiet():
            try:
                found = recognised(objective, *batches[0])
            except Unavailable as reason:
                raise Unavailable(f"member {e}: {reason}") from reason
        return found

    def _share(self, e: int, found: Recognised) -> float:
        """The factor of a member's one batch in L = sum scale loss / sum count."""
        count = 1.0 if self._operators[e].objective.reduction == "sum" else found.count
        if not count or not 0.0 < found.scale / count < float("inf"):
            raise Unavailable(f"member {e}: a batch of scale {found.scale:g} and count {count}")
        return found.scale / count

    def _apply(self, V: Tensor, member: Tensor, out: Tensor) -> None:
        self._prepared.product(V, member=member, out=out, gauss=self._gauss)


def _check_alike(operators: Sequence[FiniteSum]) -> None:
    if not operators:
        raise InputError("an ensemble has no members. Pass at least one operator.")
    first = operators[0]
    for e, other in enumerate(operators):
        mine, theirs = (first.n, first.dtype, first.device, first.kind), (other.n, other.dtype, other.device, other.kind)
        if mine != theirs:
            raise InputError(f"member {e} of the ensemble is {theirs}, member 0 is {mine}: (n, dtype, device, operator) must be the same.")
