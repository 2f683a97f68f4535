"""Measures of a spectrum against the eigenvalues of dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

import fastsharp
from fastsharp.measures.eigen import MEASURES, hessian_measures
from tests.cases import net
from tests.oracles.dense import dense_hessian


def matrix(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed)).double()).Q
    A = Q @ torch.diag(values) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("name", ["mlp_tanh", "mlp_relu", "regression", "vit_block"])
def test_of_a_network_against_its_dense_hessian(name: str) -> None:
    case = net(name)
    values = torch.linalg.eigvalsh(dense_hessian(case.model, case.objective, case.whole))
    found = hessian_measures(fastsharp.spectrum(case.model, case.batches, case.loss_fn, k=2, rtol=0.02))
    assert set(found) == set(MEASURES)
    for key, at in (("lambda_max", -1), ("lambda_min", 0)):
        low, high = found[key].interval
        assert low - 1e-12 <= float(values[at]) <= high + 1e-12
    assert float(found["trace"]) == pytest.approx(float(values.sum()), abs=0.05 * float(values.norm()))
    assert float(found["frobenius"]) == pytest.approx(float(values.norm()), rel=0.05)
    share = float((values < -32 * torch.finfo(torch.float32).eps * float(values.abs().max())).double().mean())
    low, high = found["negative_share"].interval
    assert low <= share <= high
    exact = float(values.sum() ** 2 / values.square().sum())
    low, high = found["effective_rank"].interval
    assert low <= exact <= high


@pytest.mark.parametrize("count", [1, 3, 9])
def test_outliers_above_a_bulk_are_counted(count: int) -> None:
    bulk = torch.linspace(0.0, 1.0, 150).double()
    top = 20.0 * 1.4 ** torch.arange(count).double()
    found = hessian_measures(fastsharp.spectrum(matrix(torch.cat([bulk, top])), k=2))
    assert float(found["outliers"]) == count
    low, high = found["bulk_edge"].interval
    assert 0.9 <= low <= 1.0 + 1e-9 and high == pytest.approx(20.0, rel=1e-6)
    assert low < float(found["bulk_edge"]) < high


def test_an_indistinct_edge_says_so_and_a_negative_matrix_has_none() -> None:
    # a full set of Ritz values: their ratios are those of the eigenvalues, all about 1.01
    even = hessian_measures(fastsharp.spectrum(matrix(torch.linspace(1.0, 1.5, 40).double()), k=2))
    assert any("not distinct" in note for note in even["outliers"].notes)
    negative = hessian_measures(fastsharp.spectrum(matrix(-torch.linspace(1.0, 2.0, 60).double()), k=2))
    assert float(negative["outliers"]) == 0 and math.isnan(float(negative["bulk_edge"]))
    assert float(negative["negative_share"]) == pytest.approx(1.0)


def test_the_rank_of_a_projector_is_its_trace() -> None:
    values = torch.cat([torch.zeros(90), torch.full((10,), 3.0)]).double()
    found = hessian_measures(fastsharp.spectrum(matrix(values), k=2))
    assert float(found["effective_rank"]) == pytest.approx(10.0, rel=0.05)
    low, high = found["effective_rank"].interval
    assert low <= 10.0 + 1e-9 and high >= 10.0 - 1e-9
