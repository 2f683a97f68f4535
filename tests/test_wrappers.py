"""Wrapped models: the numbers and the names are those of the model inside, and a note says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastsharp
from tests.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = [(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3)]


@pytest.fixture
def gloo() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile, DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_inside_is_measured_and_named(name: str, gloo: None) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    wrapper = WRAPPERS[name](model)  # first: DistributedDataParallel writes the weights
    plain = fastsharp.Hessian(model, DATA, nn.CrossEntropyLoss())
    with unchanged(model):
        wrapped = fastsharp.Hessian(wrapper, DATA, nn.CrossEntropyLoss(), params=["0.*"])
    V = torch.eye(plain.n, dtype=torch.float64)
    assert wrapped.layout.names == ("0.weight", "0.bias")
    assert torch.allclose(wrapped.apply(V[:15, :15].contiguous()), plain.apply(V)[:15, :15], rtol=0, atol=1e-14)
    assert f"measured and named is the model inside {name}" in wrapped.notes


def test_a_wrapper_with_a_hook_is_measured_with_its_hook() -> None:
    model = nn.Linear(4, 3).double()
    wrapper = nn.DataParallel(model)
    plain = fastsharp.Hessian(model, DATA, nn.CrossEntropyLoss())
    wrapper.register_forward_hook(lambda module, given, output: 2 * output)
    doubled = fastsharp.Hessian(wrapper, DATA, nn.CrossEntropyLoss())
    V = torch.eye(plain.n, dtype=torch.float64)
    assert doubled.layout.names == ("module.weight", "module.bias")
    assert not torch.allclose(doubled.apply(V), plain.apply(V), rtol=0.1)
