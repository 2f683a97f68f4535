"""Hessian-vector products by double backward: the graph of the gradient is built once and, where it fits, kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from fastsharp.errors import DoubleBackwardError

_FIELDS: dict[type, tuple[str, ...]] = {}  # names of saved tensors, by node class


class GradientGraph:
    """g = d loss / d params as a differentiable function of the parameters; products are vector-Jacobian products of g.

    A product costs 6U where the graph is kept (U: the matrix products of one forward pass, a gradient is 3U), 9U else.
    """

    def __init__(self, loss: torch.Tensor, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        self.unused = tuple(i for i, g in enumerate(grads) if g is None)
        finite = torch.stack(
            [torch.ones((), dtype=torch.bool, device=loss.device) if g is None else torch.isfinite(g).all() for g in grads]
        )
        self.not_finite = tuple(int(i) for i in (~finite).nonzero())
        self._loss_node = loss.grad_fn
        self._active = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        # edges, not tensors: the values of g are not needed for products, and n numbers a batch would outweigh a small graph
        self._outputs = [get_gradient_edge(g) for g in grads if g is not None and g.requires_grad]

    def product(self, tangent: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
        """H v for v given per parameter; None where the gradient does not depend on the parameters (H = 0)."""
        if not self._outputs:
            return None
        try:
            return torch.autograd.grad(
                self._outputs,
                self._params,
                grad_outputs=[tangent[i] for i in self._active],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as e:
            if "marked with @once_differentiable" in str(e):
                raise self.not_twice_differentiable() from e
            if "derivative for" in str(e) and "is not implemented" in str(e):
                raise DoubleBackwardError(f"torch has no second derivative here: {e}\nUse another op or kernel in its place.") from e
            raise

    def nbytes(self, ignore: set[int]) -> int:
        """Bytes held by the graph: storages saved for backward, each once, those in `ignore` (weights, data) left out."""
        storages: dict[int, int] = {}
        for node in self.nodes():
            for t in _saved(node):
                storage = t.untyped_storage()
                if storage.data_ptr() not in ignore:
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def nodes(self) -> Iterator[Any]:
        """Every autograd node from which the gradient was computed."""
        roots = [edge.node for edge in self._outputs]
        yield from _walk([*roots, self._loss_node])

    def check_twice_differentiable(self) -> None:
        """DoubleBackwardError where autograd put an Error node: a Function marked @once_differentiable."""
        if any("Error" in node.name() for node in self.nodes()):
            raise self.not_twice_differentiable()

    def not_twice_differentiable(self) -> DoubleBackwardError:
        """The error for such a graph, with the names of the Functions that can be meant."""
        custom = [node for node in _walk([self._loss_node]) if hasattr(node, "_forward_cls")]
        marked = [node for node in custom if _qualified_name(node._forward_cls.backward).startswith("once_differentiable")]
        names = ", ".join(dict.fromkeys(node._forward_cls.__name__ for node in (marked or custom))) or "a custom autograd.Function"
        return DoubleBackwardError(
            f"{names} has no second derivative: its backward is marked @once_differentiable.\n"
            "Write its backward with differentiable torch operations, or replace the function."
        )


def _walk(roots: Sequence[Any]) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [node for node in roots if node is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions if following is not None)


def _saved(node: Any) -> Iterator[torch.Tensor]:
    fields = _FIELDS.get(type(node))
    if fields is None:
        fields = tuple(f for f in dir(node) if (f.startswith("_saved_") or f == "saved_tensors") and not f.startswith("_raw"))
        _FIELDS[type(node)] = fields
    for field in fields:
        try:
            value = getattr(node, field)
        except RuntimeError:
            continue  # freed, or written in place: nothing is held through it
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (t for t in value if isinstance(t, torch.Tensor))


def _qualified_name(function: Any) -> str:
    """Where the code of a possibly wrapped function was written."""
    code = getattr(function, "__code__", None)
    return (
        "" if code is None else getattr(code, "co_qualname", None) or ("once_differentiable" if code.co_name == "wrapper" else code.co_name)
    )
