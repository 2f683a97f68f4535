"""Rows B9, B14, B20-B22 of the catalogue of bad input: sparse and quantised modules, parallel wrappers, several devices."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastsharp
from fastsharp.errors import DeviceError, DoubleBackwardError, NoParametersError, SparseGradError
from tests.cases import net
from tests.unchanged import refuses

pytestmark = pytest.mark.usefixtures("one_thread")
a_row = pytest.mark.usefixtures("row")
LOSS = nn.CrossEntropyLoss()
ROOT = Path(__file__).resolve().parents[1]


class Words(nn.Module):
    """An embedding of tokens and a linear layer on their sum."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "bag":
            self.table = nn.EmbeddingBag(7, 4, sparse=True, mode="sum")
        elif kind == "module":
            self.table = nn.Embedding(7, 4, sparse=True)
        else:
            self.weight = nn.Parameter(torch.randn(7, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.weight, sparse=True) if self.kind == "function" else self.table(tokens)
        return self.head(torch.tanh(x if self.kind == "bag" else x.sum(1)))


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(7, (11, 5)), torch.arange(11) % 3


@a_row
@pytest.mark.parametrize("backend", ["auto", "rop", "autograd"])
@pytest.mark.parametrize(("kind", "named"), [("module", "'table'"), ("bag", "'table'"), ("function", "functional.embedding")])
def test_B9_sparse_gradients(kind, named, backend):
    model, data = Words(kind), [tokens()]
    with refuses(SparseGradError, named, "sparse=False", model=model):
        fastsharp.lanczos(model, data, LOSS, k=2, backend=backend)


@a_row
def test_B9_a_sparse_embedding_that_is_not_measured_is_no_alarm():
    result = fastsharp.lanczos(Words("module"), [tokens()], LOSS, k=2, params="head.*")
    assert bool(result.converged.all())


def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantisation moves to another package
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


class Whole(nn.Module):
    """Weights that are stored as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-5, 5, (3, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.float())


@a_row
@pytest.mark.parametrize("how", ["torch.ao", "integers"])
def test_B14_quantised_model(how):
    model = quantised(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))) if how == "torch.ao" else Whole()
    with refuses(NoParametersError, "no floating parameters", type(model).__name__, model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)


@a_row
@pytest.mark.parametrize("backend", ["auto", "rop", "autograd"])
@pytest.mark.parametrize("where", [1, 2], ids=["in the middle", "last"])
def test_B14_partly_quantised_model(where, backend):
    """Autograd takes such a layer for a constant: zeros in place of a curvature, with a warning of torch's at most."""
    layers = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    layers[where] = quantised(nn.Sequential(layers[where]))
    model = nn.Sequential(*layers)
    with refuses(DoubleBackwardError, f"quantised modules {where}.0", "no derivative", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1, backend=backend)


@a_row
def test_B14_a_quantised_layer_before_the_measured_ones_is_no_alarm():
    x, y = net("mlp_tanh", torch.float32).whole
    first, last = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), quantised(nn.Sequential(nn.Linear(6, 5)))), nn.Linear(5, 3)
    result = fastsharp.lanczos(nn.Sequential(first, last), [(x, y)], LOSS, k=2, params="1.*")
    alone = fastsharp.lanczos(last, [(first(x).detach(), y)], LOSS, k=2)
    assert float((result.eigenvalues - alone.eigenvalues).abs().max()) <= 1e-5
    assert not any("kinks" in note for note in result.notes)  # the ReLU lies before them too


@a_row
def test_B14_an_operation_registered_without_a_derivative():
    @torch.library.custom_op("fastsharp_tests::square", mutates_args=())
    def square(x: torch.Tensor) -> torch.Tensor:
        return x * x

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return square(self.inner(x))

    model = Squares()
    with refuses(DoubleBackwardError, "fastsharp_tests.square", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)


@a_row
def test_B20_data_parallel_around_a_part_and_the_whole():
    n = net("mlp_tanh")
    plain = fastsharp.lanczos(n.model, n.batches, LOSS, k=2)
    for wrapped in (nn.DataParallel(n.model), nn.Sequential(nn.DataParallel(n.model[:2]), n.model[2:])):
        result = fastsharp.lanczos(wrapped, n.batches, LOSS, k=2)
        assert float((result.eigenvalues - plain.eigenvalues).abs().max()) <= 1e-10


JOB = """
import sys
import torch, torch.distributed as dist
from torch import nn
import fastsharp
from fastsharp.errors import DistributedError
from tests.cases import net
from tests.unchanged import refuses, unchanged

rank, world, meeting = int(sys.argv[1]), 2, sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=world, init_method="file://" + meeting)
alone = [dist.new_group([r]) for r in range(world)][rank]
n = net("mlp_tanh")
wrapped = nn.parallel.DistributedDataParallel(n.model, process_group=alone)
with unchanged(wrapped):
    result = fastsharp.lanczos(wrapped, n.batches, n.loss_fn, k=2)
want = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=2)
assert float((result.eigenvalues - want.eigenvalues).abs().max()) <= 1e-10
both = nn.parallel.DistributedDataParallel(n.model)
for model, name in ((both, "the model"), (nn.Sequential(both), "module '0'")):
    with refuses(DistributedError, name, "2 processes", ".module", model=model):
        fastsharp.lanczos(model, n.batches, n.loss_fn, k=2)
    with refuses(DistributedError, model=model):
        fastsharp.Hessian(model, n.batches, n.loss_fn)
dist.destroy_process_group()
print("as promised")
"""


def test_B21_distributed_data_parallel(tmp_path: Path):
    """Two processes over gloo: a wrapper over one of them is measured, a wrapper over both is refused by each (DistributedError)."""
    commands = [[sys.executable, "-W", "ignore", "-c", JOB, str(rank), str(tmp_path / "meeting")] for rank in range(2)]
    job = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        ends = [p.communicate(timeout=100) for p in job]
    finally:
        for p in job:
            p.kill()
    assert [out.strip().splitlines()[-1:] for out, _ in ends] == [["as promised"]] * 2, "\n".join(err[-2000:] for _, err in ends)


@a_row
def test_B22_parameters_on_several_devices():
    """A second device that needs no hardware: torch's fake tensors."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with FakeTensorMode():
        there = nn.Parameter(torch.empty(3, 5, device="cuda:0"))
    model[1].weight = there
    with refuses(DeviceError, "'0.weight' (cpu)", "'1.weight' (cuda:0)", "one device", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)


@a_row
def test_B22_a_frozen_part_elsewhere():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, device="meta").requires_grad_(False))
    with refuses(DeviceError, "'1.weight'", "meta device", "Load the weights", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)


@a_row
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_B22_on_a_gpu():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3).cuda())
    with refuses(DeviceError, "'0.weight' (cpu)", "'1.weight' (cuda:0)", model=model):
        fastsharp.lanczos(model, net("mlp_tanh", torch.float32).batches, LOSS, k=1)
