"""Every form of data gives the same matrix; what is read more than once must be the same each time."""

from __future__ import annotations

import random
import warnings
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastsharp
from fastsharp.batches import Batches, Budget, _sample_hashes, count_of, tensors_of, tree_map
from fastsharp.errors import (
    ArgumentTypeError,
    BatchFormatError,
    InputError,
    LoaderError,
    LoaderExhaustedError,
    NondeterministicOperatorError,
    UnstableDataWarning,
)
from tests.cases import net
from tests.curvature.checks import exact
from tests.unchanged import check_message, generators, refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LARGE, SMALL = 10**9, 64


def assembled(data: Any, **options: Any) -> torch.Tensor:
    n = net("mlp_tanh")
    with unchanged(n.model):
        H = fastsharp.Hessian(n.model, data, n.loss_fn, **options)
        return H.apply(torch.eye(H.n, dtype=H.dtype))


def close(A: torch.Tensor) -> bool:
    H = exact("mlp_tanh")
    return float((A - H).norm()) <= 1e-12 * float(H.norm())


class Rows(Dataset):
    """The samples of one batch as a map-style dataset of Python pairs."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i], int(self.y[i])


class Augmented(Rows):
    """The same samples with noise from one of the global generators."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, draw: Any) -> None:
        super().__init__(x, y)
        self.draw = draw

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x, y = super().__getitem__(i)
        return x + 0.01 * float(self.draw()), y


Pair = namedtuple("Pair", "inputs target")

FORMS = {
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "DataLoader, shuffled": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
    "DataLoader, own generator": lambda x, y: DataLoader(
        Rows(x, y), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "DataLoader, lists": lambda x, y: DataLoader(Rows(x, y), batch_size=4),  # torch's default collate makes lists
    "Dataset": lambda x, y: TensorDataset(x, y),
    "list of tuples": lambda x, y: [(x[:5], y[:5]), (x[5:], y[5:])],
    "list of lists": lambda x, y: [[x[:5], y[:5]], [x[5:], y[5:]]],
    "tuple of tuples": lambda x, y: ((x[:5], y[:5]), (x[5:], y[5:])),
    "list of dicts": lambda x, y: [{"input": x[:5], "labels": y[:5]}, {"input": x[5:], "labels": y[5:]}],
    "named tuples": lambda x, y: [Pair(x[:5], y[:5]), Pair(x[5:], y[5:])],
    "one tuple": lambda x, y: (x, y),
    "one list": lambda x, y: [x, y],
    "one dict": lambda x, y: {"input": x, "y": y},
    "an empty batch among them": lambda x, y: [(x[:0], y[:0]), (x[:5], y[:5]), (x[5:], y[5:])],
}


@pytest.mark.parametrize("memory", [LARGE, SMALL], ids=["frozen", "streamed"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_data_is_the_same_matrix(form, memory):
    assert close(assembled(form(*net("mlp_tanh").whole), memory=memory))


def test_a_generator_within_the_budget_is_read_once():
    n = net("mlp_tanh")
    assert close(assembled(batch for batch in n.batches))


def test_a_generator_beyond_the_budget_is_refused():
    n = net("mlp_tanh")
    with refuses(LoaderExhaustedError, "generator", "memory=", model=n.model):
        fastsharp.Hessian(n.model, (batch for batch in n.batches), n.loss_fn, memory=SMALL)


def test_streaming_begins_where_the_budget_ends_and_equals_frozen_bitwise():
    n = net("mlp_tanh")
    sizes = [sum(t.numel() * t.element_size() for t in batch) for batch in n.batches]
    frozen = assembled(n.batches, memory=LARGE)
    for budget in (0, sizes[0], sum(sizes) - 1, sum(sizes)):
        assert torch.equal(assembled(n.batches, memory=2 * budget), frozen)
        assert Batches(n.batches, CPU, budget).streamed == (budget < sum(sizes))


def test_kept_and_recomputed_graphs_give_the_same_bits():
    n = net("lstm")
    v = torch.randn(exact("lstm").shape[0], dtype=torch.float64)
    kept = fastsharp.Hessian(n.model, n.batches, n.loss_fn, memory=LARGE)
    first = kept @ v
    assert len(kept._kept) == 3 and torch.equal(kept @ v, first)
    size = max(graph.nbytes(set()) for graph, _ in kept._kept.values())
    some = fastsharp.Hessian(n.model, n.batches, n.loss_fn, memory=some_budget(n) + 3 * size // 2)
    none = fastsharp.Hessian(n.model, n.batches, n.loss_fn, memory=some_budget(n))
    for operator, count in ((some, 1), (none, 0)):
        assert torch.equal(operator @ v, first) and torch.equal(operator @ v, first)
        assert len(operator._kept) == count
        assert any(f"{count} batches kept their graph" in note for note in operator.notes)
    assert not any("kept their graph" in note for note in kept.notes)


def some_budget(n: Any) -> int:
    """Enough to freeze the data, nothing left for graphs but as much again as the data."""
    return 2 * sum(t.numel() * t.element_size() for batch in n.batches for t in batch)


DRAWS = {"torch": lambda: torch.randn(()), "numpy": lambda: np.random.standard_normal(), "python": lambda: random.gauss(0, 1)}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_augmentation_is_seen_whatever_generator_it_draws_from(draw):
    n = net("mlp_tanh", torch.float32)
    data = Augmented(*n.whole, draw)
    with unchanged(n.model), pytest.warns(UnstableDataWarning):
        result = fastsharp.lanczos(n.model, data, n.loss_fn, k=1, tol=1e-2)
    assert result.settings["preflight"]["data"] == "other samples"
    with refuses(NondeterministicOperatorError, "augmentation", model=n.model):
        fastsharp.lanczos(n.model, data, n.loss_fn, k=1, strict_data=True)


def test_the_same_samples_in_another_order_are_no_alarm():
    n = net("mlp_tanh", torch.float32)
    loader = DataLoader(TensorDataset(*n.whole), batch_size=4, shuffle=True)
    for level in ("fast", "full"):
        with unchanged(n.model), warnings.catch_warnings():
            warnings.simplefilter("error")
            result = fastsharp.lanczos(n.model, loader, n.loss_fn, k=1, tol=1e-2, strict_data=True, preflight=level)
        assert result.settings["preflight"]["data"] == "same"


def test_a_loader_s_own_generator_is_put_back():
    n = net("mlp_tanh", torch.float32)
    g = torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(*n.whole), batch_size=4, shuffle=True, generator=g)
    for memory in (LARGE, SMALL):
        before = g.get_state().clone()
        fastsharp.lanczos(n.model, loader, n.loss_fn, k=1, tol=1e-2, memory=memory)
        assert torch.equal(g.get_state(), before)


def test_reading_in_workers_gives_the_same_matrix():
    n = net("mlp_tanh")
    loader = DataLoader(Rows(*n.whole), batch_size=4, num_workers=1)
    with unchanged(n.model):
        H = fastsharp.Hessian(n.model, loader, n.loss_fn)
        A = H.apply(torch.eye(H.n, dtype=H.dtype))
    assert close(A)


def test_an_exception_in_the_loader_is_the_cause_of_one_that_says_where():
    class Breaking(Rows):
        def __getitem__(self, i: int) -> Any:
            if i == 7:
                random.random()
                raise OSError("sample 7 is unreadable")
            return super().__getitem__(i)

    n = net("mlp_tanh")
    with unchanged(n.model), pytest.raises(LoaderError, match=r"batch 1 of pass 1 .* OSError: sample 7 is unreadable") as caught:
        fastsharp.lanczos(n.model, DataLoader(Breaking(*n.whole), batch_size=4), n.loss_fn)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_pass_that_is_broken_off_restores_the_random_states():
    n = net("mlp_tanh")
    batches = Batches(DataLoader(TensorDataset(*n.whole), batch_size=4, shuffle=True), CPU, SMALL)
    before = generators()
    for index, _ in batches:
        if index == 1:
            break
    batches.first()
    assert generators() == before


def test_the_hash_is_of_the_samples_not_of_their_order_or_grouping():
    x, y = net("mlp_tanh").whole
    p = torch.randperm(11)
    base = Batches([(x, y)], CPU, LARGE).digest()
    for budget in (LARGE, SMALL):
        assert Batches([(x[p], y[p])], CPU, budget).digest() == base
        assert Batches([(x[:2], y[:2]), (x[2:], y[2:])], CPU, budget).digest() == base
        assert Batches([(x[1:], y[1:])], CPU, budget).digest() != base
        assert Batches([(x, y.flip(0))], CPU, budget).digest() != base


def test_one_hash_a_sample_over_all_tensors():
    x, y = torch.randn(5, 2, 3), torch.arange(5)
    base = _sample_hashes((x, y))
    assert len(set(base)) == 5
    changed = x.clone()
    changed[3, 1, 2] += 1
    assert [a == b for a, b in zip(_sample_hashes((changed, y)), base, strict=True)] == [True, True, True, False, True]
    assert _sample_hashes((x[2:], y[2:])) == base[2:]


def test_trees_keep_their_shape():
    tree = {"a": torch.ones(2), "b": [torch.zeros(2), ("text", 3)], "c": Pair(torch.ones(1), None)}
    doubled = tree_map(lambda t: 2 * t, tree)
    assert isinstance(doubled["c"], Pair) and doubled["b"][1] == ("text", 3) and float(doubled["a"].sum()) == 4
    assert len(tensors_of(tree)) == 3 and count_of(tree) == 2
    with pytest.raises(BatchFormatError) as caught:
        count_of(("text", torch.tensor(3.0)))
    check_message(caught.value, "tuple", "(sum, count)")


@pytest.mark.parametrize(
    ("text", "amount"), [("2GiB", 2**31), ("500MB", 500_000_000), ("1.5 kib", 1536), ("64", 64), (10, 10), (" 3 tb ", 3 * 10**12)]
)
def test_sizes_in_words(text, amount):
    assert Budget.of(text, CPU).total == amount


@pytest.mark.parametrize(
    ("text", "error"),
    [("much", InputError), ("2 XB", InputError), ("", InputError), (-5, InputError), (2.5, ArgumentTypeError), (True, ArgumentTypeError)],
)
def test_sizes_that_are_none(text, error):
    with pytest.raises(error) as caught:
        Budget.of(text, CPU)
    check_message(caught.value, "memory", "2GiB")


def test_auto_is_a_part_of_what_is_free():
    total = Budget.of("auto", CPU).total
    assert 0 < total < 2**50


def test_a_model_on_its_own_dtype_of_data_is_untouched_by_freezing():
    n = net("mlp_tanh", torch.float32)
    batches = Batches(n.batches, CPU, LARGE)
    assert batches.count == 11 and batches.nbytes == some_budget(n) // 2
    assert all(frozen[0] is given[0] or torch.equal(frozen[0], given[0]) for (_, frozen), given in zip(batches, n.batches, strict=True))
    assert isinstance(n.model, nn.Module)
