"""Kept graphs are an economy and nothing else: the products are those of graphs built anew, and memory stays in its budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.curvature.autograd import GradientGraph
from fastsharp.errors import DoubleBackwardError
from tests.cases import NAMES, cut, net

pytestmark = pytest.mark.usefixtures("one_thread")
SMOOTH = [name for name in NAMES if name != "unused"]


def graph_bytes(name: str) -> int:
    n = net(name)
    hessian = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    hessian @ torch.ones(hessian.n, dtype=torch.float64)
    return hessian._kept_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_kept_recomputed_and_streamed_products_are_bitwise_equal(name, dtype):
    n = net(name, dtype)
    data = sum(t.numel() * t.element_size() for b in n.batches for t in _tensors(b))
    kept = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    recomputed = fastsharp.Hessian(n.model, n.batches, n.loss_fn, memory=2 * data)
    streamed = fastsharp.Hessian(n.model, n.batches, n.loss_fn, memory=0)
    V = torch.randn(3, kept.n).to(dtype)
    first = kept.apply(V)
    assert torch.equal(kept.apply(V), first)  # the second product is the first on kept graphs
    for operator in (recomputed, streamed):
        assert torch.equal(operator.apply(V), first) and torch.equal(operator.apply(V), first)
    assert len(kept._kept) == len(n.batches) and len(recomputed._kept) < len(n.batches) and not streamed._kept
    assert any("keep" in note or "kept their graph" in note for note in recomputed.notes)
    assert any("read anew" in note for note in streamed.notes)


def _tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [t for part in (batch.values() if isinstance(batch, dict) else batch) for t in _tensors(part)]


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_graphs_are_kept_up_to_the_budget(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    batches = cut((torch.randn(60, 6, dtype=torch.float64), torch.arange(60) % 3), (10,) * 6)
    full = fastsharp.Hessian(model, batches)
    full @ torch.ones(full.n, dtype=torch.float64)
    budget = int(full._kept_bytes * share)
    some = fastsharp.Hessian(model, batches, memory=budget + full.objective.batches.nbytes)
    v = torch.randn(some.n, dtype=torch.float64)
    assert torch.equal(some @ v, full @ v)
    assert 0 < len(some._kept) < 6 and some._kept_bytes <= budget
    assert len(some._kept) == int(6 * share)  # six graphs of equal size


def test_the_size_of_a_graph_is_what_it_saves():
    """w -> sum(tanh(x w)): the product saves x, as x takes no gradient; tanh saves its result; the sum a number at most."""
    x, w = torch.randn(50, 20, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    graph = GradientGraph((x @ w).tanh().sum(), [w])
    result = 50 * 30 * 8
    size = graph.nbytes({x.untyped_storage().data_ptr()})
    assert result <= size < 2 * result
    assert graph.nbytes(set()) == size + x.numel() * 8


def test_a_gradient_that_is_constant_has_no_product():
    w = torch.randn(5, requires_grad=True)
    assert GradientGraph((3.0 * w).sum(), [w]).product([torch.ones(5)]) is None


def test_a_missing_derivative_is_named():
    w = torch.randn(2, 3, 4, 4, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        loss = torch.nn.functional.scaled_dot_product_attention(w, w, w).square().sum()
    with pytest.raises(DoubleBackwardError, match="no second derivative here"):
        GradientGraph(loss, [w]).product([torch.ones_like(w)])


def test_refresh_asks_for_a_new_preflight() -> None:
    """An outcome measured at other weights must not be reported for these."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    operator = fastsharp.Hessian(model, (torch.randn(20, 6), torch.arange(20) % 3))
    assert fastsharp.lanczos(operator, k=1).settings["preflight"]["level"] == "fast"
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert operator.refresh().preflight["level"] == "off"
    assert fastsharp.lanczos(operator, k=1, preflight="full").settings["preflight"]["level"] == "full"
