"""Theorems about the Hessian of a loss over data: it is the oracle's matrix, whatever the batches, the order and the normalisation."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import UnusedParamWarning
from tests.cases import NAMES, SAMPLES, cut, net
from tests.curvature.checks import DTYPES, PRODUCT_GATE, eigenvalue_error, exact, hessian, product_error

pytestmark = pytest.mark.usefixtures("one_thread")


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def product(model: nn.Module, data: object, loss_fn: object, v: torch.Tensor, **options: object) -> torch.Tensor:
    return fastsharp.Hessian(model, data, loss_fn, **options) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_dense_hessian(name, dtype):
    assert product_error(hessian(name, dtype), exact(name)) <= PRODUCT_GATE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_top_five_eigenvalues_are_those_of_the_dense_hessian(name, dtype):
    assert eigenvalue_error(name, dtype) <= PRODUCT_GATE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_uneven_batches_equal_one_big_batch(name, dtype):
    n = net(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedParamWarning)
        v = torch.randn(exact(name).shape[0], dtype=dtype)
        whole = product(n.model, [n.whole], n.loss_fn, v)
        for sizes in ((4, 4, 3), (1, 10), (2,) * 5 + (1,)):
            uneven = product(n.model, cut(n.whole, sizes), n.loss_fn, v)
            assert difference(uneven, whole) <= (1e-6 if dtype == torch.float32 else 1e-13)  # P9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_residual", "vit_block", "lstm"])
def test_sum_is_sample_count_times_mean(name, dtype):
    n = net(name, dtype)
    v = torch.randn(exact(name).shape[0], dtype=dtype)
    mean = product(n.model, n.batches, nn.CrossEntropyLoss(), v)
    total = product(n.model, n.batches, nn.CrossEntropyLoss(reduction="sum"), v)
    assert difference(total, SAMPLES * mean) <= 4 * eps(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_residual", "vit_block", "lstm"])
def test_order_of_samples_does_not_matter(name, dtype):
    n = net(name, dtype)
    v = torch.randn(exact(name).shape[0], dtype=dtype)
    first = product(n.model, n.batches, n.loss_fn, v)
    x, y = n.whole
    for _ in range(3):
        p = torch.randperm(SAMPLES)
        assert difference(product(n.model, cut((x[p], y[p])), n.loss_fn, v), first) <= 8 * eps(dtype)


@pytest.mark.parametrize("name", ["mlp_tanh", "tied_language_model", "gru"])
def test_the_assembled_matrix_is_symmetric_and_columns_are_columns(name):
    H = hessian(name)
    eye = torch.eye(H.n, dtype=H.dtype)
    rows, columns = H.apply(eye), H @ eye
    assert difference(rows, exact(name)) <= 1e-12
    assert torch.equal(rows.T, columns)
    assert difference(rows, rows.T) <= 16 * eps(H.dtype)


def test_products_are_linear():
    H = hessian("transformer_encoder")
    u, v = torch.randn(2, H.n, dtype=H.dtype)
    assert difference(H @ (2.5 * u - v), 2.5 * (H @ u) - H @ v) <= 32 * eps(H.dtype)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_a_power_of_two_in_the_loss_scales_the_product_bitwise(scale):  # P8
    n = net("mlp_tanh", torch.float32)
    v = torch.randn(exact("mlp_tanh").shape[0])
    plain = product(n.model, n.batches, lambda o, t: F.cross_entropy(o, t), v, reduction="mean")
    scaled = product(n.model, n.batches, lambda o, t: scale * F.cross_entropy(o, t), v, reduction="mean")
    assert torch.equal(scaled, scale * plain)


def test_unused_parameters_are_zero_rows_and_named():
    H = hessian("unused")
    with pytest.warns(UnusedParamWarning, match="spare.weight, spare.bias"):
        rows = H.layout.unflatten(H @ torch.randn(H.n, dtype=H.dtype))
    assert not bool(rows["spare.weight"].any()) and not bool(rows["spare.bias"].any())
    assert bool(rows["first.weight"].all())
    assert any("spare" in note for note in H.notes)


def test_a_selection_is_a_principal_submatrix():
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn, params=["4.*", "0.bias"])
    names = [name for name, _ in n.model.named_parameters()]
    sizes = [p.numel() for p in n.model.parameters()]
    parts = dict(zip(names, torch.arange(sum(sizes)).split(sizes), strict=True))
    index = torch.cat([parts[name] for name in ("0.bias", "4.weight", "4.bias")])
    assert H.layout.names == ("0.bias", "4.weight", "4.bias")  # the model's order, not the caller's
    assert difference(H.apply(torch.eye(H.n, dtype=H.dtype)), exact("mlp_tanh")[index][:, index]) <= 1e-12


# --- the checker itself must be able to fail ---------------------------------------------------------------------------


def _forget_last_scale(operator: fastsharp.Hessian) -> None:
    operator @ torch.ones(operator.n, dtype=operator.dtype)  # builds and keeps the graphs
    last = max(operator._kept)
    operator._kept[last] = (operator._kept[last][0], 1.0)


def _zero_one_block(operator: fastsharp.Hessian) -> None:
    unhurt = operator._apply

    def apply(V: torch.Tensor, out: torch.Tensor) -> None:
        unhurt(V, out)
        for row in out:
            operator.layout.views(row)[1].zero_()

    operator._apply = apply


def _sum_for_mean(operator: fastsharp.Hessian) -> None:
    operator @ torch.ones(operator.n, dtype=operator.dtype)
    operator._denominator = 1.0


def _average_over_batches(operator: fastsharp.Hessian) -> None:
    operator @ torch.ones(operator.n, dtype=operator.dtype)
    operator._kept = {i: (graph, 1.0) for i, (graph, _) in operator._kept.items()}
    operator._denominator = float(len(operator._kept))


def _forget_a_batch(operator: fastsharp.Hessian) -> None:
    operator @ torch.ones(operator.n, dtype=operator.dtype)
    operator._kept.pop(1)


@pytest.mark.parametrize("mutate", [_forget_last_scale, _zero_one_block, _sum_for_mean, _average_over_batches, _forget_a_batch])
@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_batchnorm_eval"])
def test_mutants_are_caught(name, mutate):
    broken = hessian(name)
    mutate(broken)
    assert product_error(broken, exact(name)) > 1e3 * PRODUCT_GATE[torch.float32]
