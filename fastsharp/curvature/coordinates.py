"""Which coordinates of an operator belong to which parameter: names, globs, and the live tensors behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from fastsharp.composite import leaves, name_of
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.errors import ArgumentTypeError, InputError, ParamError, listing
from fastsharp.operator import SymmetricOperator
from fastsharp.params import ParamLayout

Span = tuple[int, int]


def layout_of(A: Any, call: str) -> ParamLayout:
    """The layout of a model's operator; an error that begins with `call` for anything else."""
    if not isinstance(A, SymmetricOperator):
        raise ArgumentTypeError(f"{call}: got a {type(A).__name__}, expected an operator, as fastsharp.Hessian(model, loader, loss_fn).")
    if not isinstance(A.layout, ParamLayout):
        raise InputError(f"{call}: {name_of(A)} is a plain matrix without parameter names. Pass an operator of a model.")
    return A.layout


def matching(layout: ParamLayout, patterns: str | Iterable[str], call: str) -> tuple[str, ...]:
    """The layout's names that a glob, a name or a list of them means, in its order; ParamError where one matches nothing."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise ArgumentTypeError(f"{call}: {patterns!r} is not what parameters are chosen by: a name, a glob, or a list of them.")
    hits: set[str] = set()
    for pattern in patterns:
        found = [name for name in layout.names if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            raise ParamError(f"{call}: {pattern!r} matches none of the operator's parameters: {listing(list(layout.names))}.")
        hits.update(found)
    return tuple(name for name in layout.names if name in hits)


def sub_layout(layout: ParamLayout, names: Sequence[str]) -> ParamLayout:
    """The layout of these parameters alone."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    sizes = {name: b - a for name, (a, b) in spans_by_name(layout).items()}
    offsets = [0]
    for name in names:
        offsets.append(offsets[-1] + sizes[name])
    return ParamLayout(tuple(names), tuple(shapes[name] for name in names), tuple(offsets))


def spans_by_name(layout: ParamLayout) -> dict[str, Span]:
    """{name: (start, stop)} in the flat vector."""
    return dict(zip(layout.names, zip(layout.offsets, layout.offsets[1:], strict=False), strict=True))


def spans(layout: ParamLayout, names: Iterable[str]) -> list[Span]:
    """Where these parameters lie, in the layout's order, neighbours joined."""
    where, found = spans_by_name(layout), list[Span]()
    for a, b in sorted(where[name] for name in names):
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return found


def parameters_of(A: SymmetricOperator, call: str) -> list[tuple[str, torch.Tensor]]:
    """(name, the live parameter) behind each entry of A's layout; InputError where A is of several models."""
    layout = layout_of(A, call)
    live: dict[str, torch.Tensor] = {}
    for leaf in leaves(A):
        if isinstance(leaf, FiniteSum):
            selection = leaf.objective.selection
            for name, p in zip(selection.names, selection.params, strict=True):
                if live.setdefault(name, p) is not p:
                    raise InputError(f"{call}: the parts of {name_of(A)} are of different models, so that {name!r} is two parameters.")
    unknown = [name for name in layout.names if name not in live]
    if unknown:
        raise InputError(f"{call}: {name_of(A)} has no model behind {listing(unknown)}. Pass an operator of a model.")
    return [(name, live[name]) for name in layout.names]
