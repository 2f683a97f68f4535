"""An operator is the Hessian at the weights and data of its construction; whatever changes them afterwards is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.errors import InputError, ModelModeError, ParamError, StaleOperatorError
from fastsharp.objective import _bit_sums
from tests.cases import Net, net
from tests.oracles.dense import dense_hessian
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def n() -> Net:
    return net("cnn_batchnorm_eval")


@pytest.fixture
def operator(n: Net) -> fastsharp.Hessian:
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    H @ torch.ones(H.n, dtype=H.dtype)
    return H


def _step(n: Net) -> None:
    optimizer = torch.optim.SGD(n.model.parameters(), lr=0.1)
    n.loss_fn(n.model(n.whole[0]), n.whole[1]).backward()
    optimizer.step()


def _in_place(n: Net) -> None:
    with torch.no_grad():
        n.model[0].weight[0, 0, 0, 0] += 1e-6


def _replaced(n: Net) -> None:
    n.model[0].weight = nn.Parameter(n.model[0].weight.detach().clone())


def _loaded(n: Net) -> None:
    n.model.load_state_dict({name: t + 1 for name, t in n.model.state_dict().items()})


def _buffer(n: Net) -> None:
    n.model[1].running_var.mul_(1.001)


def _moved(n: Net) -> None:
    n.model.train()
    n.model(n.whole[0])
    n.model.eval()


CHANGES: dict[str, tuple[Callable[[Net], None], str]] = {
    "optimizer step": (_step, "0.weight"),
    "in-place edit": (_in_place, "0.weight"),
    "parameter replaced": (_replaced, "0.weight"),
    "load_state_dict": (_loaded, "0.weight"),
    "buffer edit": (_buffer, "1.running_var"),
    "batch statistics moved": (_moved, "1.num_batches_tracked"),
    "mode switched": (lambda n: n.model[5].train(), "the mode of 5"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed_by_the_next_product_and_refresh_takes_it(n, operator, change, name):
    change(n)
    with pytest.raises(StaleOperatorError) as caught:
        operator @ torch.ones(operator.n, dtype=operator.dtype)
    check_message(caught.value, name, "refresh()")
    n.model.eval()
    assert operator.refresh() is operator
    A = operator.apply(torch.eye(operator.n, dtype=operator.dtype))
    H = dense_hessian(n.model, n.objective, n.whole)
    assert float((A - H).norm()) <= 1e-10 * float(H.norm())


def test_refresh_refuses_another_selection(n, operator):
    n.model[0].bias.requires_grad_(False)
    with pytest.raises(ParamError) as caught:
        operator.refresh()
    check_message(caught.value, "requires_grad", "new operator")


def test_refresh_refuses_batchnorm_in_train_mode(n, operator):
    n.model.train()
    with pytest.raises(ModelModeError, match="BatchNorm"):
        operator.refresh()


def _data_edit(n: Net) -> None:
    n.model[0].weight.data[0, 0, 0, 0] += 1e-6


def _data_swap(n: Net) -> None:
    w = n.model[0].weight.data
    w[0], w[1] = w[1].clone(), w[0].clone()


def _data_of_buffer(n: Net) -> None:
    n.model[1].running_mean.data[0] += 1e-9


def _through_numpy(n: Net) -> None:
    n.model[0].bias.detach().numpy()[0] += 1e-9


@pytest.mark.parametrize("change", [_data_edit, _data_swap, _data_of_buffer, _through_numpy])
def test_an_edit_that_leaves_no_mark_is_noticed_around_a_run(n, operator, change):
    fastsharp.lanczos(operator, k=1, tol=1e-2)
    change(n)
    with pytest.raises(StaleOperatorError) as caught:
        fastsharp.lanczos(operator, k=1, tol=1e-2)
    check_message(caught.value, "refresh()")
    fastsharp.lanczos(operator.refresh(), k=1, tol=1e-2)


def test_an_edit_during_the_run_is_noticed_at_its_end(n):
    products = []

    class Editing(torch.autograd.Function):
        """The identity; its second derivative edits the weights on the side."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            products.append(1)
            if len(products) == 24:
                n.model[0].bias.data[0] += 1e-9
            return Editing.apply(grad)

    model = nn.Sequential(n.model, nn.Identity())
    model[1].forward = Editing.apply
    with pytest.raises(StaleOperatorError, match="bias"):
        fastsharp.lanczos(model, n.batches, n.loss_fn, k=2, tol=1e-4, method="lanczos")


def test_frozen_data_edited_in_place(n, operator):
    n.batches[1][0][0] += 1
    with pytest.raises(StaleOperatorError) as caught:
        operator @ torch.ones(operator.n, dtype=operator.dtype)
    check_message(caught.value, "data tensor", "in place")


def test_results_outlive_the_model(n):
    result = fastsharp.lanczos(n.model, n.batches, n.loss_fn, k=2, tol=1e-6)
    before = result.eigenvalues.clone(), result.eigenvectors.clone()
    _step(n)
    assert torch.equal(result.eigenvalues, before[0]) and torch.equal(result.eigenvectors, before[1])


def test_a_run_says_what_it_was_made_of(n, operator):
    made = operator.provenance
    assert made["n"] == operator.n and made["samples"] == 11 and made["dtype"] == "torch.float64" and made["model"] == "Sequential"
    _step(n)
    after = operator.refresh().provenance
    assert after["weights_hash"] != made["weights_hash"] and after["data_hash"] == made["data_hash"]
    whole = fastsharp.Hessian(n.model, [n.whole], n.loss_fn)
    assert whole.provenance["data_hash"] == made["data_hash"]  # a hash of the samples, not of the batches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_the_checksum_sees_every_single_change_and_swap(dtype):
    t = (10 * torch.randn(40)).to(dtype)
    t[3], t[4] = 0, 1
    before = _bit_sums(t)
    for i in range(t.numel()):
        changed = t.clone()
        changed[i] = not changed[i] if dtype == torch.bool else changed[i] + 1
        assert _bit_sums(changed) != before
    a, b = 3, 4
    swapped = t.clone()
    swapped[a], swapped[b] = t[b], t[a]
    assert _bit_sums(swapped) != before


def test_counts_that_add_up_to_nothing(n):
    def nothing(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        return model(batch[0]).square().sum(), 0

    with pytest.raises(InputError) as caught:
        fastsharp.lanczos(n.model, n.batches, fastsharp.batch_loss(nothing))
    check_message(caught.value, "add up to 0", "(sum, count)")
