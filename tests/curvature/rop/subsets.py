"""One call under every set of active inputs and for b = 1 and 3."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten

from tests.curvature.rop.check import check_rule


class Case(NamedTuple):
    func: Any
    args: Callable[[Callable[..., torch.Tensor]], tuple[Any, ...]]  # of a maker of random tensors
    kwargs: dict[str, Any] = {}  # noqa: RUF012

    def __str__(self) -> str:
        return str(self.func).replace("aten.", "")


def check_case(case: Case) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    args = case.args(random)
    leaves = [t for t in tree_flatten((args, case.kwargs))[0] if isinstance(t, torch.Tensor)]
    able = [i for i, t in enumerate(leaves) if t.is_floating_point()]
    for active in chain.from_iterable(combinations(able, k) for k in range(1, len(able) + 1)):
        for b in (1, 3):
            check_rule(case.func, *args, active=active, b=b, **case.kwargs)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)
