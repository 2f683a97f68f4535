"""Corners of reading data: the grouping of samples, odd dtypes in hashes, inference tensors, random states of every kind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fastsharp.batches import Batches, Budget
from fastsharp.errors import BatchFormatError, InputError, NondeterministicOperatorError
from tests.unchanged import unchanged

CPU = torch.device("cpu")
N = 10
X, Y = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), torch.arange(N)
DATA = TensorDataset(X, Y)
OWN = np.random.default_rng(0)


def samples(batches: Batches) -> list[tuple[float, ...]]:
    return sorted((*x, float(y)) for _, (xs, ys) in batches for x, y in zip(xs.tolist(), ys, strict=True))


@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["streamed", "frozen"])
def test_empty_batches_are_left_out_of_every_pass(budget):
    data = [(X[:0], Y[:0]), (X[:4], Y[:4]), (X[:0], Y[:0]), (X[4:], Y[4:])]
    batches = Batches(data, CPU, budget)
    assert [index for index, _ in batches] == [0, 1]
    assert samples(batches) == samples(Batches((X, Y), CPU, 1 << 20))


class Noisy(Dataset):
    def __init__(self, draw) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return X[i] + self.draw(), i


DRAWS = {
    "torch": lambda: float(torch.randn(())),
    "numpy": lambda: float(np.random.randn()),
    "python": random.random,
    "a numpy generator of its own": lambda: float(OWN.random()),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_augmentation_shows_in_a_second_draw_and_leaves_the_random_states(draw):
    with unchanged(None):
        batches = Batches(DataLoader(Noisy(DRAWS[draw]), batch_size=4), CPU, 1 << 20)
        assert batches.redraw() == "other samples" and batches.recheck() == "other samples"


@pytest.mark.parametrize("seeded", [False, True])
def test_a_dropped_rest_shows_and_a_loader_s_own_generator_is_put_back(seeded):
    g = torch.Generator().manual_seed(5) if seeded else None
    before = None if g is None else g.get_state().clone()
    batches = Batches(DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True, generator=g), CPU, 1 << 20)
    assert batches.count == 8 and batches.recheck() == "other samples"
    assert g is None or torch.equal(g.get_state(), before)


def test_where_the_grouping_matters_another_order_is_an_error():
    batches = Batches(DataLoader(DATA, batch_size=4, shuffle=True), CPU, 0)
    list(batches)
    torch.manual_seed(1)  # the caller's random state moves on between two products
    list(batches)
    batches.ordered = True
    with pytest.raises(NondeterministicOperatorError, match="batch 0 holds other samples"):
        list(batches)


def test_a_length_that_changes_between_passes_is_an_error_with_both_counts():
    class Shrinking(IterableDataset):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(DATA[i] for i in range(N - self.passes + 1))

    batches = Batches(DataLoader(Shrinking(), batch_size=4), CPU, 0)
    with pytest.raises(NondeterministicOperatorError, match=r"10 samples .* in the first, 9 "):
        list(batches)


def test_data_made_under_inference_mode_can_carry_gradients():
    with torch.inference_mode():
        for budget in (0, 1 << 20):
            batches = Batches([(X.clone(), Y), *DataLoader(DATA)], CPU, budget)
            assert not any(t.is_inference() for _, batch in batches for t in batch)


COLUMNS = {
    "bool": Y > 4,
    "bfloat16": X.bfloat16(),
    "float16": X.half(),
    "complex": X.to(torch.complex64),
    "images": torch.arange(N * 4, dtype=torch.uint8).reshape(N, 2, 2),
    "a scalar for all": torch.tensor(3.0),
    "a table for all": torch.ones(4, 5),
    "no columns": torch.zeros(N, 0),
    "strided": X.T.contiguous().T,
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS.keys())
def test_hashes_do_not_depend_on_order_and_do_on_every_value(column):
    def digest(x: torch.Tensor, c: torch.Tensor) -> str:
        return Batches({"x": x, "c": c, "name": "text"}, CPU, 1 << 20).digest()

    assert digest(X, column) == digest(X.clone(), column.clone())
    assert digest(X + 1, column) != digest(X, column)
    if column.ndim and column.shape[0] == N:
        order = torch.randperm(N)
        assert digest(X[order], column[order]) == digest(X, column)
        if not torch.equal(column, column.roll(1, 0)):  # rows that are all alike may be paired anew with X
            assert digest(X, column.roll(1, 0)) != digest(X, column)
    elif column.numel():
        assert digest(X, column + 1) != digest(X, column)


def test_a_sample_twice_is_not_a_sample_once():
    assert Batches((torch.cat([X, X]), torch.cat([Y, Y])), CPU, 1 << 20).digest() != Batches((X, Y), CPU, 1 << 20).digest()


@pytest.mark.parametrize("data", ["text", [1.0, 2.0], [("a", "b")], [(torch.tensor(1.0), torch.tensor(2))], np.ones((3, 2))])
def test_batches_without_a_batch_dimension_are_refused(data):
    with pytest.raises(BatchFormatError, match="no tensor with a batch dimension"):
        Batches(data, CPU, 1 << 20)


def test_a_size_beyond_every_number_is_refused():
    with pytest.raises(InputError, match="is not a size"):
        Budget.of("9" * 400, CPU)
