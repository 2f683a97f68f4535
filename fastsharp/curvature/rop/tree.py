"""Nests of tuples, lists and dicts, as calls take them. torch.utils._pytree leaves reference cycles behind at every use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def leaves(tree: Any) -> list[Any]:
    """What is no tuple, list or dict, in order."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return [tree]
    return [leaf for branch in tree for leaf in leaves(branch)]


def tensors(tree: Any) -> list[torch.Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]


def mapped(f: Callable[[Any], Any], tree: Any) -> Any:
    """The same nest with f(leaf) for each leaf."""
    if isinstance(tree, dict):
        return {key: mapped(f, branch) for key, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([mapped(f, branch) for branch in tree])
    return f(tree)
