"""P14: every error of fastsharp is raised here by a call that deserves it, and its message reads as promised."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastsharp
from fastsharp import errors
from fastsharp.data.idx import read_idx
from fastsharp.errors import FastsharpError
from fastsharp.ops import _registry, force
from tests.cases import net
from tests.test_errors import ABSTRACT, CLASSES
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")
FOREIGN = ("ARPACK", "LAPACK", "INTERNAL ASSERT", "c10::", "std::", "0x")  # text of a library alone helps nobody
LOSS = nn.CrossEntropyLoss()
TRIGGERS: dict[str, Callable[[Path], Any]] = {}
CALLED = [cls for cls in CLASSES if cls.__name__ not in ABSTRACT]


def raises(trigger: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Register the call that ends with the error of its own name."""
    TRIGGERS[trigger.__name__] = trigger
    return trigger


def measure(model: nn.Module | None = None, data: Any = None, loss_fn: Any = LOSS, **options: Any) -> Any:
    n = net("mlp_tanh", torch.float32)
    return fastsharp.lanczos(n.model if model is None else model, n.batches if data is None else data, loss_fn, **({"k": 1} | options))


class Net(nn.Module):
    """Two layers with `between` in the middle."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 5), nn.Linear(5, 3), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    return net("mlp_tanh", torch.float32).whole


def labelled(labels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(whole()[0][: len(labels)], labels)]


@raises
def InputError(path: Path) -> Any:
    return measure(k=0)


@raises
def ArgumentTypeError(path: Path) -> Any:
    return measure(k=2.5)


@raises
def ModelModeError(path: Path) -> Any:
    return measure(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)))


@raises
def LoaderExhaustedError(path: Path) -> Any:
    return measure(data=iter(net("mlp_tanh", torch.float32).batches), memory=64)


@raises
def EmptyLoaderError(path: Path) -> Any:
    return measure(data=[])


@raises
def BatchFormatError(path: Path) -> Any:
    return measure(data=[{"pixels": whole()[0]}])


@raises
def OutputFormatError(path: Path) -> Any:
    class Scores(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return {"scores": super().forward(x)}

    return measure(Scores(torch.tanh))


@raises
def ReductionUnknownError(path: Path) -> Any:
    return measure(loss_fn=lambda o, t: nn.functional.cross_entropy(o, t, reduction="sum") ** 0.5)


@raises
def LabelError(path: Path) -> Any:
    return measure(data=labelled(torch.tensor([0, 1, 5])))


@raises
def LabelShapeError(path: Path) -> Any:
    return measure(nn.Linear(6, 1), [(torch.randn(8, 6), torch.randn(8))], nn.MSELoss())


@raises
def LossShapeError(path: Path) -> Any:
    return measure(loss_fn=nn.CrossEntropyLoss(reduction="none"))


@raises
def DisconnectedLossError(path: Path) -> Any:
    return measure(loss_fn=lambda o, t: nn.functional.cross_entropy(o.detach(), t), reduction="mean")


@raises
def ParamError(path: Path) -> Any:
    return measure(params="9.weight")


@raises
def NoParametersError(path: Path) -> Any:
    return measure(nn.Tanh())


@raises
def DtypeError(path: Path) -> Any:
    return measure(nn.Linear(6, 3).double())


@raises
def DeviceError(path: Path) -> Any:
    return measure(nn.Linear(6, 3, device="meta"))


@raises
def ShapeError(path: Path) -> Any:
    return measure(v0=torch.ones(5))


@raises
def PrecisionError(path: Path) -> Any:
    return measure(nn.Linear(6, 3).half())


@raises
def InferenceTensorError(path: Path) -> Any:
    with torch.inference_mode():
        model = nn.Linear(6, 3)
    return measure(model)


@raises
def SparseGradError(path: Path) -> Any:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    return measure(model, [(torch.randint(7, (5, 2)), torch.arange(5) % 3)])


@raises
def DistributedError(path: Path) -> Any:
    class Share(nn.Linear):
        """What torch's sharding makes of a module, by the name of a base class."""

    Share.__module__ = "torch.distributed.fsdp.shares"
    return measure(nn.Sequential(Share(6, 3)))


@raises
def NondeterministicOperatorError(path: Path) -> Any:
    return measure(Net(lambda x: x + 0.1 * torch.rand_like(x)))


@raises
def NotSymmetricError(path: Path) -> Any:
    return fastsharp.lanczos(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), k=1)


@raises
def DoubleBackwardError(path: Path) -> Any:
    return measure(Net(lambda x: x * x.detach()))


@raises
def NonFiniteError(path: Path) -> Any:
    return measure(data=[(whole()[0] / 0.0, whole()[1])])


@raises
def StaleOperatorError(path: Path) -> Any:
    n = net("mlp_tanh", torch.float32)
    H = fastsharp.Hessian(n.model, n.batches, LOSS)
    with torch.no_grad():
        n.model[0].weight.mul_(2.0)
    return H @ torch.ones(H.n)


@raises
def EngineError(path: Path) -> Any:
    return measure(net("lstm", torch.float32).model, net("lstm", torch.float32).batches, backend="mlp")


@raises
def KernelError(path: Path) -> Any:
    with force(replace(_registry.choose(torch.device("cpu")), name="elsewhere", device_types=("cuda",))):
        return fastsharp.lanczos(torch.eye(80), k=1, method="lanczos")


@raises
def BasisMemoryError(path: Path) -> Any:
    return fastsharp.density(fastsharp.CallableOperator(lambda v: v, 10**9, torch.float32), memory="1GiB")


@raises
def DataNotFoundError(path: Path) -> Any:
    return fastsharp.data.load("cifar10", root=path, download=False)


@raises
def DataFormatError(path: Path) -> Any:
    (path / "labels").write_bytes(b"\0\0\x08\x01\0\0\0\x09123")
    return read_idx(path / "labels", 1)


@raises
def LogError(path: Path) -> Any:
    return measure(resume=path)


@raises
def ResumeMismatchError(path: Path) -> Any:
    measure(resume=path / "run.log")
    return measure(resume=path / "run.log", params="0.*")


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        raise OSError("no such picture")


@raises
def LoaderError(path: Path) -> Any:
    return measure(data=DataLoader(Unreadable(), batch_size=4))


@raises
def LoaderTimeoutError(path: Path) -> Any:
    def late() -> Any:
        raise RuntimeError("DataLoader timed out after 5 seconds")
        yield

    class Late:
        timeout = 5.0

        def __iter__(self) -> Any:
            return late()

    return measure(data=Late())


@raises
def NotConvergedError(path: Path) -> Any:
    return measure(max_iter=3, method="lanczos", tol=1e-9, strict=True)


@raises
def Interrupted(path: Path) -> Any:
    class Rings(Net):
        def forward(self, x: torch.Tensor) -> Any:
            raise KeyboardInterrupt

    return measure(Rings(torch.tanh))


@raises
def NotConvergedWarning(path: Path) -> Any:
    return measure(max_iter=3, method="lanczos", tol=1e-9)


@raises
def UnusedParamWarning(path: Path) -> Any:
    return measure(net("unused", torch.float32).model)


@raises
def UnstableDataWarning(path: Path) -> Any:
    x, y = whole()

    class Noisy(Dataset):
        def __len__(self) -> int:
            return 11

        def __getitem__(self, i: int) -> Any:
            return x[i] + torch.randn(6), y[i]

    return measure(data=DataLoader(Noisy(), batch_size=4))


@raises
def LogStoppedWarning(path: Path) -> Any:
    write = os.pwritev

    def full(fd: int, parts: Any, offset: int) -> int:
        if offset > 3000:
            raise OSError(28, "No space left on device")
        return write(fd, parts, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        return measure(resume=path / "run.log", method="lanczos")


@pytest.mark.parametrize("cls", CALLED, ids=lambda c: c.__name__)
def test_P14_message_names_the_object_the_cause_and_one_thing_to_do(cls: type, tmp_path: Path) -> None:
    trigger = TRIGGERS[cls.__name__]
    if issubclass(cls, Warning):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trigger(tmp_path)
        (text,) = {str(w.message) for w in seen if w.category is cls}
    else:
        with pytest.raises(cls) as caught:
            trigger(tmp_path)
        assert type(caught.value) is cls
        check_message(caught.value)
        text = str(caught.value)
    assert len(text.splitlines()) <= 5 and len(text) <= 700
    assert not any(word in text for word in FOREIGN), text


def test_P14_every_class_has_its_call() -> None:
    assert set(TRIGGERS) == {cls.__name__ for cls in CALLED}


def test_P14_codes_are_unique_and_roots_are_never_raised() -> None:
    codes = [cls.code for cls in CLASSES if not issubclass(cls, Warning)]
    assert len(codes) == len(set(codes))
    assert all(issubclass(getattr(errors, name), FastsharpError) for name in ABSTRACT)
