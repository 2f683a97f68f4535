"""Data as people have it: padding in random splits, iterable datasets, workers, streams, weights of samples, several inputs and outputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastsharp
from tests.oracles.dense import dense_hessian

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 5
X = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 3


def gap(operator: Any, H: torch.Tensor) -> float:
    return float((operator.apply(torch.eye(operator.n, dtype=torch.float64)) - H).norm() / H.norm())


class LM(nn.Module):
    """Causal by its one-step memory; logits (N, V, T), the order that CrossEntropyLoss takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(VOCAB, 2), nn.Linear(4, VOCAB)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        e = self.embed(ids)
        return self.head(torch.tanh(torch.cat([e, F.pad(e, (0, 0, 1, 0))[:, :-1]], 2))).transpose(1, 2)


def sequences(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def collate(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) - 1
    ids = torch.stack([F.pad(r[:-1], (0, width - len(r) + 1)) for r in rows])
    return ids, torch.stack([F.pad(r[1:], (0, width - len(r) + 1), value=-100) for r in rows])


def unpadded(rows: list[torch.Tensor]) -> torch.Tensor:
    def loss(call: Any, rows: list[torch.Tensor]) -> torch.Tensor:
        total = sum(F.cross_entropy(call(r[None, :-1]), r[None, 1:], reduction="sum") for r in rows)
        return total / sum(len(r) - 1 for r in rows)

    return dense_hessian(LM(), loss, rows)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=6), st.data())
def test_padded_batches_in_random_splits_are_the_unpadded_whole(lengths: list[int], data: st.DataObject) -> None:
    rows = sequences(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(rows) - 1)), max_size=len(rows))))
    edges = [0, *[c for c in cuts if c < len(rows)], len(rows)]
    batches = [collate(rows[a:b]) for a, b in pairwise(edges)]
    assert gap(fastsharp.Hessian(LM(), batches, nn.CrossEntropyLoss()), unpadded(rows)) <= 1e-10


def test_a_streamed_language_model_is_the_frozen_one() -> None:
    rows = sequences([3, 6, 2, 5, 4, 7])
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    operator = fastsharp.Hessian(LM(), loader, nn.CrossEntropyLoss(), memory=64)
    assert any("read anew in every product" in note for note in operator.notes), operator.notes
    assert gap(operator, unpadded(rows)) <= 1e-10


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return zip(X, Y, strict=True)


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


LOADERS = {
    "iterable": lambda: DataLoader(Stream(), batch_size=4),
    "two workers": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, num_workers=2),
}


@pytest.mark.parametrize("memory", ["auto", 64])
@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name: str, memory: Any) -> None:
    H = dense_hessian(mlp(), lambda call, b: F.cross_entropy(call(b[0]), b[1]), (X, Y))
    operator = fastsharp.Hessian(mlp(), LOADERS[name](), nn.CrossEntropyLoss(), memory=memory)
    V = torch.randn(2, operator.n, dtype=torch.float64)
    assert float((operator.apply(V) - V @ H).norm() / (V @ H).norm()) <= 1e-10


def test_weights_of_samples_through_the_sum_and_its_weight() -> None:
    w = torch.linspace(0.2, 3, 9, dtype=torch.float64)

    def weighted(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, w = batch
        return (w * F.cross_entropy(model(x), y, reduction="none")).sum(), w.sum()

    H = dense_hessian(mlp(), lambda call, b: (w * F.cross_entropy(call(b[0]), b[1], reduction="none")).sum() / w.sum(), (X, Y))
    batches = list(zip(X.split(4), Y.split(4), w.split(4), strict=True))
    assert gap(fastsharp.Hessian(mlp(), batches, fastsharp.batch_loss(weighted)), H) <= 1e-10


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(2, 3).double(), nn.Linear(2, 3).double()

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.a(left)) * self.b(right)
        return h, h.square().sum(1)


def test_several_inputs_and_outputs() -> None:
    def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output[0], target) + 0.1 * output[1].mean()

    H = dense_hessian(Two(), lambda call, b: loss(call(b[0], b[1]), b[2]), (X[:, :2], X[:, 2:], Y))
    batches = [((x[:, :2], x[:, 2:]), y) for x, y in zip(X.split(4), Y.split(4), strict=True)]
    assert gap(fastsharp.Hessian(Two(), batches, loss), H) <= 1e-10
