"""Rows A1-A18 of the catalogue of bad input: what is wrong with the data or how they are read, and what must come of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastsharp
from fastsharp.errors import (
    BatchFormatError,
    DtypeError,
    EmptyLoaderError,
    LabelError,
    LabelShapeError,
    LoaderExhaustedError,
    ModelModeError,
    NondeterministicOperatorError,
    NonFiniteError,
    ReductionUnknownError,
    UnstableDataWarning,
)
from tests.cases import net
from tests.curvature.checks import spectrum
from tests.oracles.dense import dense_hessian, eigenvalues
from tests.unchanged import refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread", "row")
LOSS = nn.CrossEntropyLoss()


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return net("mlp_tanh", dtype).model


def whole(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return net("mlp_tanh", dtype).whole


class Noisy(Dataset):
    """Inputs with fresh noise on every access, from torch's global generator."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x, y = whole()
        return x[i] + 0.01 * torch.randn(6), int(y[i])


class Growing(IterableDataset):
    """One sample more in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.passes += 1
        x, y = whole()
        yield from zip(x[: 6 + self.passes], y[: 6 + self.passes], strict=True)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).train()


def test_A1_batchnorm_in_train_mode():
    model = normed()
    with refuses(ModelModeError, "BatchNorm", "'1'", "model.eval()", "bn='eval'", model=model):
        fastsharp.lanczos(model, [whole()], LOSS, k=2)


def test_A2_dropout_in_train_mode():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 3)).train()
    with refuses(ModelModeError, "Dropout", "'1'", "model.eval()", "fixed-masks", model=model):
        fastsharp.lanczos(model, [whole()], LOSS, k=2)


def test_A2_dropout_inside_attention_and_recurrent_layers():
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    batch = (torch.randn(3, 2, 4), torch.randn(3, 2, 4))
    with refuses(ModelModeError, "self_attn", "dropout1", model=model):
        fastsharp.lanczos(model, [batch], nn.MSELoss(), k=2)
    stack = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
    with refuses(ModelModeError, "the model itself", model=stack):
        fastsharp.lanczos(stack, [batch], lambda o, t: F.mse_loss(o[0], t), reduction="mean", k=2)


def test_A3_augmentation_in_the_loader_warns_and_strict_data_raises():
    model, loader = mlp(), DataLoader(Noisy(), batch_size=4)
    with unchanged(model), pytest.warns(UnstableDataWarning, match="other samples when it is read again"):
        result = fastsharp.lanczos(model, loader, LOSS, k=2)
    assert result.settings["preflight"]["data"] == "other samples"
    assert len(result.provenance["data_hash"]) == 32
    with refuses(NondeterministicOperatorError, "augmentation", "hash", model=model):
        fastsharp.lanczos(model, loader, LOSS, k=2, strict_data=True)


def test_A3_streamed_with_other_samples_each_pass():
    model, loader = mlp(), DataLoader(Noisy(), batch_size=4)
    torch.manual_seed(5)
    with unchanged(model):  # the state of the generators is put back after each pass, so that each pass draws the same noise
        fastsharp.lanczos(model, loader, LOSS, k=2, memory=64)
    own = iter(range(10**6))

    class Counting(Noisy):
        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            x, y = super().__getitem__(i)
            return x + 1e-3 * next(own), y

    with refuses(NondeterministicOperatorError, "11 samples", "augmentation", "memory=", model=model):
        fastsharp.lanczos(model, DataLoader(Counting(), batch_size=4), LOSS, k=2, memory=64)


@pytest.mark.parametrize("memory", ["auto", 64], ids=["frozen", "streamed"])
def test_A4_shuffled_loader_over_the_same_samples(memory):
    n = net("mlp_tanh")
    loader = DataLoader(TensorDataset(*n.whole), batch_size=4, shuffle=True)
    with unchanged(n.model), warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fastsharp.lanczos(n.model, loader, LOSS, method="lanczos", tol=1e-9, memory=memory, strict_data=True, preflight="full")
    error = (result.eigenvalues - spectrum("mlp_tanh")[:5]).abs().max() / spectrum("mlp_tanh")[0]
    assert float(error) <= 1e-10


def test_A5_shuffle_with_drop_last():
    model = mlp()
    data = TensorDataset(torch.randn(40, 6), torch.arange(40) % 3)
    loader = DataLoader(data, batch_size=16, shuffle=True, drop_last=True)
    with unchanged(model), pytest.warns(UnstableDataWarning, match="drop_last"):
        fastsharp.lanczos(model, loader, LOSS, k=2, preflight="full")
    with refuses(NondeterministicOperatorError, "drop_last", "hash", model=model):
        fastsharp.lanczos(model, loader, LOSS, k=2, preflight="full", strict_data=True)


def test_A6_one_shot_generator():
    n = net("mlp_tanh")
    with unchanged(n.model):
        result = fastsharp.lanczos(n.model, (b for b in n.batches), LOSS, method="lanczos", tol=1e-9)
    assert float((result.eigenvalues - spectrum("mlp_tanh")[:5]).abs().max()) <= 1e-10
    with refuses(LoaderExhaustedError, "generator", "64 bytes", "DataLoader", model=n.model):
        fastsharp.lanczos(n.model, (b for b in n.batches), LOSS, memory=128)


@pytest.mark.parametrize(
    "loader",
    [
        [],
        DataLoader(TensorDataset(torch.empty(0, 6), torch.empty(0, dtype=torch.long))),
        iter(()),
        [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))],
    ],
    ids=["list", "DataLoader", "generator", "batch of none"],
)
def test_A7_empty_loader(loader):
    model = mlp()
    with refuses(EmptyLoaderError, "no samples", model=model):
        fastsharp.lanczos(model, loader, LOSS, k=2)


def test_A8_length_differs_between_passes():
    model = mlp()
    with refuses(NondeterministicOperatorError, "7 samples", "in this one", model=model):
        fastsharp.lanczos(model, DataLoader(Growing(), batch_size=4), LOSS, k=2, memory=64)
    with refuses(NondeterministicOperatorError, "other samples", model=model):
        fastsharp.lanczos(model, DataLoader(Growing(), batch_size=4), LOSS, k=2, strict_data=True, preflight="full")


def test_A9_uneven_last_batch():
    n = net("mlp_tanh", torch.float32)
    with unchanged(n.model):
        uneven = fastsharp.lanczos(n.model, DataLoader(TensorDataset(*n.whole), batch_size=4), LOSS, method="lanczos", tol=1e-5)
    assert float((uneven.eigenvalues - spectrum("mlp_tanh")[:5]).abs().max() / spectrum("mlp_tanh")[0]) <= 1e-6


def test_A10_sum_reduction():
    n = net("mlp_tanh")
    with unchanged(n.model):
        total = fastsharp.lanczos(n.model, n.batches, nn.CrossEntropyLoss(reduction="sum"), method="lanczos", tol=1e-9)
    assert float((total.eigenvalues / 11 - spectrum("mlp_tanh")[:5]).abs().max() / spectrum("mlp_tanh")[0]) <= 1e-10
    assert total.settings["reduction"] == "sum" and any("plain sum" in note for note in total.notes)


def test_A11_loss_without_a_stated_reduction():
    n = net("mlp_tanh")
    with unchanged(n.model):
        result = fastsharp.lanczos(n.model, n.batches, lambda o, t: F.cross_entropy(o, t), method="lanczos", tol=1e-9)
    assert float((result.eigenvalues - spectrum("mlp_tanh")[:5]).abs().max()) <= 1e-10
    assert any("found by halving" in note for note in result.notes)

    def undecided(o: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(o, t, reduction="sum") ** 0.5

    with refuses(ReductionUnknownError, "undecided", "reduction='mean'", "halves", model=n.model):
        fastsharp.lanczos(n.model, n.batches, undecided)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_A12_A13_nan_or_inf_in_one_input(value, shown):
    n = net("mlp_tanh", torch.float32)
    n.batches[1][0][2, 3] = value
    with refuses(NonFiniteError, "batch 1", f"holds {shown} at (2, 3)", "sample 2", model=n.model):
        fastsharp.lanczos(n.model, n.batches, LOSS, k=2)


def test_A12_the_module_is_named_where_the_data_are_finite():
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Log(), nn.Linear(5, 3))
    with refuses(NonFiniteError, "batch 0", "module 2 (Log)", model=model):
        fastsharp.lanczos(model, [whole()], LOSS, k=2)


@pytest.mark.parametrize("bad", [3, -1, 10**6])
def test_A14_label_out_of_range(bad):
    n = net("mlp_tanh", torch.float32)
    n.batches[1][1][1] = bad
    with refuses(LabelError, f"label {bad}", "position (1,)", "3 classes (0 to 2)", model=n.model):
        fastsharp.lanczos(n.model, n.batches, LOSS, k=2)


def test_A15_target_that_would_be_broadcast():
    model, batch = nn.Linear(6, 1), (torch.randn(8, 6), torch.randn(8))
    with refuses(LabelShapeError, "(8, 1)", "(8,)", "unsqueeze", model=model):
        fastsharp.lanczos(model, [batch], nn.MSELoss(), k=2)


def test_A16_dict_batches():
    n = net("hf_style")
    result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=3, method="lanczos", tol=1e-9)
    assert float((result.eigenvalues - spectrum("hf_style")[:3]).abs().max()) <= 1e-10
    model = mlp()
    with refuses(BatchFormatError, "'x', 'extra'", "batch_loss", model=model):
        fastsharp.lanczos(model, [{"x": whole()[0], "extra": whole()[0]}], LOSS, k=2)


def test_A17_batches_of_three_tensors():
    model, (x, y) = mlp(), whole()
    with refuses(BatchFormatError, "tuple of 3", "batch_loss", model=model):
        fastsharp.lanczos(model, [(x, y, y)], LOSS, k=2)
    n = net("mlp_tanh")
    weighted = fastsharp.batch_loss(lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none") @ b[2], b[2].sum()))
    weights = torch.rand(11, dtype=torch.float64)
    result = fastsharp.lanczos(n.model, [(*n.whole, weights)], weighted, method="lanczos", tol=1e-9)
    H = dense_hessian(
        n.model, lambda call, b: (F.cross_entropy(call(b[0]), b[1], reduction="none") @ b[2]) / b[2].sum(), (*n.whole, weights)
    )
    assert float((result.eigenvalues - eigenvalues(H)[:5]).abs().max()) <= 1e-10


def test_A18_float32_data_for_a_float64_model():
    model = mlp(torch.float64)
    with refuses(DtypeError, "the data", "float32", "float64", "model.float()", model=model):
        fastsharp.lanczos(model, [whole()], LOSS, k=2)
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3).double().requires_grad_(False))
    with refuses(DtypeError, "'1.weight'", "float32", "float64", model=model):
        fastsharp.lanczos(model, [whole()], LOSS, k=2)


def test_A18_another_error_of_the_model_stays_what_it_is():
    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no picture today")

    with pytest.raises(RuntimeError, match=r"^no picture today$"):
        fastsharp.lanczos(Refusing(), [whole()], LOSS, k=1)
