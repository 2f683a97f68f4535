"""Measures of data beyond the memory budget, which are read anew in every pass."""

from __future__ import annotations

import gc

import pytest
import torch

import fastsharp
from tests.cases import net


@pytest.mark.parametrize("kind", ["sam", "worst"])
def test_a_stream_gives_the_numbers_of_frozen_data_and_leaves_no_graph(kind: str) -> None:
    case = net("mlp_tanh")
    dataset = torch.utils.data.TensorDataset(*case.whole)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    options = {"kind": kind, "rho": 0.1} | ({"directions": 8} if kind == "sam" else {"steps": 3})
    frozen = fastsharp.sharpness(case.model, loader, case.loss_fn, **options)
    graphs = []
    hook = case.model.register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    streamed = fastsharp.sharpness(case.model, loader, case.loss_fn, memory=64, **options)
    hook.remove()
    gc.collect()
    assert any("read anew" in note for note in streamed.notes)
    assert float(streamed) == pytest.approx(float(frozen), rel=1e-12)
    if kind == "sam":  # no gradient is taken: the one graph is that of the first evaluation, which is looked at
        assert sum(graphs) <= 1
