"""P20: the preflight of a healthy model raises no alarm: 30 pairs of model and loader, many seeds, float32 and float64.

Pairs 1-15: the nets of `tests.cases` at their initialisation over a list of uneven batches. Pairs 16-30: the same nets after some steps of
training, whose gradients are smaller than their curvature, over a shuffled DataLoader.
FASTSHARP_ALARM_SEEDS=20 runs what is promised, 600 preflights a dtype; the suite runs one seed of it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastsharp
from fastsharp.difference import DIFFERENCE_GATE
from fastsharp.errors import UnusedParamWarning
from fastsharp.objective import Objective
from fastsharp.preflight import preflight
from tests.cases import NAMES, SAMPLES, Net, net

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = range(int(os.environ.get("FASTSHARP_ALARM_SEEDS", "1")))
PAIRS = [(name, trained) for trained in (False, True) for name in NAMES]


class Items(Dataset):
    """The samples of one big batch, whatever its form."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Any:
        return _one(self.whole, i)


def _one(tree: Any, i: int) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree[i]
    if isinstance(tree, dict):
        return {k: _one(v, i) for k, v in tree.items()}
    return tuple(_one(v, i) for v in tree)


def train(n: Net) -> None:
    """A few steps of SGD on the objective that is measured."""
    objective = Objective(n.model, [n.whole], n.loss_fn)
    optimizer = torch.optim.SGD([p for p in n.model.parameters() if p.requires_grad], 0.2)
    for _ in range(15):
        optimizer.zero_grad()
        with torch.enable_grad():
            objective.loss(n.whole).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "trained"), PAIRS, ids=lambda v: v if isinstance(v, str) else ("trained" if v else "fresh"))
def test_P20_no_false_alarm(name: str, trained: bool, dtype: torch.dtype) -> None:
    assert len(PAIRS) == 30
    for seed in SEEDS:
        n = net(name, dtype, seed)
        data: Any = n.batches
        if trained:
            train(n)
            data = DataLoader(Items(n.whole), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UnusedParamWarning)
            outcome = preflight(fastsharp.Hessian(n.model, data, n.loss_fn), "fast", strict_data=True, seed=seed)
        assert outcome["repeat"] == 0.0
        assert outcome["finite_difference"] <= DIFFERENCE_GATE, (seed, outcome)
        assert outcome["data"] == ("same" if trained else "read once")
