"""Rows A19-A21 of the catalogue of bad input: a loader that raises, loses a worker or stands still."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fastsharp
from fastsharp import reading
from fastsharp.errors import EmptyLoaderError, LoaderError, LoaderTimeoutError
from fastsharp.reading import deaths_told, read, watched
from tests.cases import net
from tests.unchanged import refuses

pytestmark = pytest.mark.usefixtures("one_thread")
a_row = pytest.mark.usefixtures("row")
LOSS = nn.CrossEntropyLoss()
SLOW = 2.5  # seconds: the process that waits for a worker to end must wait no longer in a test


class Rows(Dataset):
    """The samples of a small net; `fault(i)` comes before each."""

    def __init__(self, fault: Any) -> None:
        self.data, self.fault = net("mlp_tanh", torch.float32).whole, fault

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.fault(i)
        return self.data[0][i], self.data[1][i]


def unreadable(i: int) -> None:
    if i == 7:
        raise OSError("the picture is cut off")


def killed(i: int) -> None:
    if i == 7 and get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


def leaves(i: int) -> None:
    if i == 7 and get_worker_info() is not None:
        os._exit(3)


def hangs(i: int) -> None:
    if i == 7:
        time.sleep(SLOW)


def nothing(i: int) -> None:
    pass


@a_row
@pytest.mark.parametrize("workers", [0, 2])
def test_A19_loader_raises(workers):
    model, loader = net("mlp_tanh", torch.float32).model, DataLoader(Rows(unreadable), batch_size=4, num_workers=workers)
    where = ("samples 4 to 7", "worker 1") if workers else ("sample 7", "loader.dataset[7]")
    with refuses(LoaderError, "batch 1 of pass 1", "OSError: the picture is cut off", *where, model=model):
        fastsharp.lanczos(model, loader, LOSS, k=1)
    try:
        fastsharp.lanczos(model, loader, LOSS, k=1)
    except LoaderError as e:
        assert isinstance(e.__cause__, OSError)


@a_row
def test_A19_where_samples_are_read_one_by_one():
    model = net("mlp_tanh", torch.float32).model
    with refuses(LoaderError, "sample 7 could not be read: OSError: the picture is cut off", "dataset[7]", model=model):
        fastsharp.bracket(model, Rows(unreadable), LOSS)


@a_row
def test_A19_in_a_later_pass_keeps_the_pairs_and_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Streamed data that fail in the middle of a run: `.partial` has the pairs so far, `resume=` the products."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # power stays on, and a disk may be slow
    model, log = net("mlp_tanh", torch.float32).model, tmp_path / "run.log"
    reads = [0]

    def fails_late(i: int) -> None:
        reads[0] += 1
        if reads[0] == 11 * 12:
            raise OSError("the disk went away")

    options = {"k": 1, "tol": 1e-2, "method": "lanczos", "memory": 64, "resume": log}
    loader = DataLoader(Rows(fails_late), batch_size=4)
    with pytest.raises(LoaderError, match=r"batch \d of pass \d\d could not be read: OSError: the disk went away") as caught:
        fastsharp.lanczos(model, loader, LOSS, **options)
    assert len(caught.value.partial) == 1
    continued = fastsharp.lanczos(model, DataLoader(Rows(nothing), batch_size=4), LOSS, **options)
    whole = fastsharp.lanczos(model, DataLoader(Rows(nothing), batch_size=4), LOSS, **(options | {"resume": None}))
    assert torch.equal(continued.eigenvalues, whole.eigenvalues) and torch.equal(continued.eigenvectors, whole.eigenvectors)


@a_row
@pytest.mark.parametrize(("fault", "word"), [(killed, "by a signal (Killed)"), (leaves, "num_workers=")], ids=["killed", "exits"])
def test_A20_loader_worker_is_killed(fault, word):
    """Which batch was waited for depends on how far ahead the worker had read."""
    model, loader = net("mlp_tanh", torch.float32).model, DataLoader(Rows(fault), batch_size=4, num_workers=1)
    with refuses(LoaderError, "of the loader (process ", word, " of pass 1 was read", model=model):
        fastsharp.lanczos(model, loader, LOSS, k=1)


def test_A20_a_death_that_is_reported_between_two_batches():
    with (
        pytest.raises(LoaderError, match=r"process 4711\) was killed by a signal \(Killed\) between two batches; .* memory"),
        deaths_told(),
    ):
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match=r"^something else$"), deaths_told():
        raise RuntimeError("something else")


@a_row
@pytest.mark.parametrize("stated", [True, False], ids=["timeout of the loader", "ours"])
def test_A21_loader_worker_hangs(stated, monkeypatch):
    monkeypatch.setattr(reading, "STALL", 0.5)
    model = net("mlp_tanh", torch.float32).model
    loader = DataLoader(Rows(hangs), batch_size=4, num_workers=1, timeout=1 if stated else 0)
    with refuses(LoaderTimeoutError, "no batch 1 of pass 1", "1 s" if stated else "0.5 s", "num_workers=0", "timeout=", model=model):
        fastsharp.lanczos(model, loader, LOSS, k=1)
    assert loader.timeout == (1 if stated else 0)


def test_A21_the_limit_is_five_minutes_and_leaves_the_callers_loader_alone():
    loader = DataLoader(Rows(nothing), batch_size=4, num_workers=1, persistent_workers=True)
    held = dict(loader.__dict__)
    assert watched(loader).timeout == 300.0
    assert loader.__dict__ == held
    own = DataLoader(Rows(nothing), num_workers=1, timeout=7)
    alone = DataLoader(Rows(nothing))
    assert watched(own) is own and watched(alone) is alone and watched([1]) == [1]


def test_errors_of_fastsharp_and_of_memory_pass_as_they_are():
    for error in (EmptyLoaderError("own"), MemoryError("full")):

        def failing(error: BaseException = error) -> Any:
            yield 1
            raise error

        with pytest.raises(type(error)) as caught:
            list(read(failing(), 1))
        assert caught.value is error
