"""Hessian- and Gauss-Newton-vector products by double backward: the graph is built once and, where it fits, kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch.autograd.graph import get_gradient_edge

from fastsharp.curvature.batch_products import BatchProducts, Made, Request
from fastsharp.errors import DoubleBackwardError
from fastsharp.params import ParamLayout

_FIELDS: dict[type, tuple[str, ...]] = {}  # names of saved tensors, by node class


class GradientGraph:
    """g = d loss / d params as a differentiable function of the parameters; products are vector-Jacobian products of g.

    A product costs 6U where the graph is kept (U: the matrix products of one forward pass, a gradient is 3U), 9U else.
    """

    def __init__(self, loss: torch.Tensor, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        with _named(loss.grad_fn):
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
        with _named(self._loss_node):
            return torch.autograd.grad(
                self._outputs,
                self._params,
                grad_outputs=[tangent[i] for i in self._active],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    def nodes(self) -> Iterator[Any]:
        """Every autograd node from which the gradient was computed."""
        roots = [edge.node for edge in self._outputs]
        yield from _walk([*roots, self._loss_node])

    def nbytes(self, ignore: set[int]) -> int:
        """Bytes held by the graph: storages saved for backward, each once, those in `ignore` (weights, data) left out."""
        return saved_bytes(self.nodes(), ignore)

    def check_twice_differentiable(self) -> None:
        """DoubleBackwardError where autograd put an Error node: a Function marked @once_differentiable."""
        check_nodes(self.nodes(), self._loss_node)


class GaussNewtonGraph:
    """J' H_L J with z = f(theta), J = dz / d theta and H_L = d^2 loss / dz^2, by graphs that are built once.

    J'u is linear in u, so its derivative with respect to u is J: J v takes one backward pass through the graph of J'u.
    A product costs 4U and the loss: 2U for J v, 2U for J' w.
    """

    def __init__(self, loss: torch.Tensor, output: torch.Tensor, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        self._output = get_gradient_edge(output)
        self._loss_node = loss.grad_fn
        self._z = output
        (slope,) = torch.autograd.grad(loss, output, create_graph=True, allow_unused=True, materialize_grads=True)
        self._slope = get_gradient_edge(slope) if slope.requires_grad else None  # None: the loss is linear in z
        grads = torch.autograd.grad(output, params, slope.detach(), retain_graph=True, allow_unused=True)
        self.unused = tuple(i for i, g in enumerate(grads) if g is None)
        self.not_finite = tuple(i for i, g in enumerate(grads) if g is not None and not bool(torch.isfinite(g).all()))
        self._dual = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, params, self._dual, create_graph=True, allow_unused=True)
        self._active = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [get_gradient_edge(pulled[i]) for i in self._active]

    def product(self, tangent: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
        """J' H_L J v for v given per parameter; None where it is zero."""
        if self._slope is None or not self._pulled:
            return None
        with _named(self._loss_node):
            pushed = self.pushed(tangent)
            (curved,) = torch.autograd.grad(self._slope, self._z, pushed, retain_graph=True, materialize_grads=True)
            return torch.autograd.grad(self._output, self._params, curved, retain_graph=True, allow_unused=True, materialize_grads=True)

    def pushed(self, tangent: Sequence[torch.Tensor]) -> torch.Tensor:
        """J v."""
        if not self._pulled:
            return torch.zeros_like(self._z)
        tangents = [tangent[i] for i in self._active]
        (found,) = torch.autograd.grad(self._pulled, self._dual, tangents, retain_graph=True, materialize_grads=True)
        return found

    def nodes(self) -> Iterator[Any]:
        """Every autograd node that products pass through."""
        roots = [edge.node for edge in self._pulled] + ([] if self._slope is None else [self._slope.node])
        yield from _walk([*roots, self._loss_node])

    def nbytes(self, ignore: set[int]) -> int:
        """Bytes held by the graphs, and by the output and its dual."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (self._z, self._dual)}
        return saved_bytes(self.nodes(), ignore | set(own)) + sum(own.values())

    def check_twice_differentiable(self) -> None:
        """DoubleBackwardError where autograd put an Error node."""
        check_nodes(self.nodes(), self._loss_node)


@final
class GraphProducts(BatchProducts):
    """Products by vector-Jacobian products through a kept graph, one vector after the other."""

    uncapturable = "autograd walks its graph on the host"

    def __init__(self, graph: GradientGraph | GaussNewtonGraph, layout: ParamLayout) -> None:
        self._graph, self._layout = graph, layout
        self.unused, self.not_finite = graph.unused, graph.not_finite

    def add_products(self, V: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        for v, total in zip(V, out, strict=True):
            product = self._graph.product(self._layout.views(v))
            if product is not None:
                torch._foreach_add_(self._layout.views(total), list(product), alpha=scale)

    def nbytes(self, ignore: set[int]) -> int:
        return self._graph.nbytes(ignore)

    def check_twice_differentiable(self) -> None:
        self._graph.check_twice_differentiable()


def graph_products(request: Request) -> Made:
    """Products of any model that torch can differentiate twice."""
    output, value = request.evaluate()
    selection = request.objective.selection
    graph: GradientGraph | GaussNewtonGraph
    if output is None:
        graph = GradientGraph(value.loss, selection.params)
    else:
        graph = GaussNewtonGraph(value.loss, output, selection.params)
    return Made(GraphProducts(graph, selection.layout), value.scale, value.count)


def saved_bytes(nodes: Iterator[Any], ignore: set[int]) -> int:
    """Bytes of the storages that these nodes saved for backward, each once."""
    storages: dict[int, int] = {}
    for node in nodes:
        for t in _saved(node):
            storage = t.untyped_storage()
            if storage.data_ptr() not in ignore:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def check_nodes(nodes: Iterator[Any], loss_node: Any) -> None:
    """DoubleBackwardError where autograd put an Error node: a Function marked @once_differentiable."""
    if any("Error" in node.name() for node in nodes):
        raise _not_twice_differentiable(loss_node)


@contextmanager
def _named(loss_node: Any) -> Iterator[None]:
    """torch's errors about missing second derivatives as DoubleBackwardError."""
    try:
        yield
    except RuntimeError as e:
        if "marked with @once_differentiable" in str(e):
            raise _not_twice_differentiable(loss_node) from e
        if lacks_second_derivative(e):
            raise no_second_derivative(e) from e
        raise


def lacks_second_derivative(error: RuntimeError) -> bool:
    """Whether torch says that an operation has no derivative, or none of its backward."""
    text = str(error)
    return ("derivative for" in text and "is not implemented" in text) or "no autograd formula was registered" in text


def no_second_derivative(error: RuntimeError) -> DoubleBackwardError:
    return DoubleBackwardError(f"torch has no second derivative here: {error}\nUse another op or kernel in its place.")


def _not_twice_differentiable(loss_node: Any) -> DoubleBackwardError:
    """The error for such a graph, with the names of the Functions that can be meant."""
    custom = [node for node in _walk([loss_node]) if hasattr(node, "_forward_cls")]
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
