"""Watch: whatever changes the marks of a model or a mode that matters changes the flat list as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.errors import StaleOperatorError
from fastsharp.guard import Watch, marks

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Sequential(nn.Linear(5, 3))).eval()


def assign_data(m: Any) -> None:
    m[0].weight.data = m[0].weight.data.clone()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written": lambda m: m[0].weight.data.add_(0.0),  # .data shares no version: see below
    "in place": lambda m: m[3][0].bias.detach().mul_(2.0),
    "replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(5, 4))),
    "other memory": assign_data,
    "buffer": lambda m: m[1].running_mean.add_(1.0),
    "buffer replaced": lambda m: setattr(m[1], "running_var", torch.ones(5)),
    "mode": lambda m: m[2].train(),
    "module replaced": lambda m: m.__setitem__(3, nn.Linear(5, 3)),
    "parameter added": lambda m: m[3].register_parameter("extra", nn.Parameter(torch.zeros(1))),
    "parameter removed": lambda m: setattr(m[0], "bias", None),
    "module added": lambda m: m[3].add_module("more", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "written"])
def test_a_change_is_seen(name: str) -> None:
    model = net()
    watch = Watch(model)
    assert watch.unchanged()
    H = fastsharp.Hessian(model, [(X, Y)], nn.CrossEntropyLoss())
    v = torch.ones(H.n)
    H @ v
    with torch.no_grad():
        CHANGES[name](model)
    assert not watch.unchanged()
    with pytest.raises(StaleOperatorError):
        H @ v


def test_equal_lists_mean_equal_marks() -> None:
    """A write that leaves no mark leaves none here either; the checksum of a run sees it."""
    model = net()
    watch, before = Watch(model), marks(model.named_parameters())
    CHANGES["written"](model)
    assert watch.unchanged() and marks(model.named_parameters()) == before


def test_what_makes_no_difference_is_looked_at_once_and_accepted() -> None:
    model = net()
    H = fastsharp.Hessian(model, [(X, Y)], nn.CrossEntropyLoss())
    v = torch.ones(H.n)
    want = H @ v
    model[0].train()  # a linear layer has one mode
    seen: list[int] = []
    looked = H.objective._present_marks
    H.objective._present_marks = lambda: seen.append(1) or looked()  # type: ignore[method-assign, func-returns-value]
    assert torch.equal(H @ v, want) and torch.equal(H @ v, want) and len(seen) == 1


class OwnListing(nn.Sequential):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return super().named_parameters(*args, **kwargs)


def test_models_that_keep_their_parameters_elsewhere_are_not_known() -> None:
    assert Watch.knows(net()) and not Watch.knows(torch.jit.script(nn.Linear(2, 2)))
    assert not Watch.knows(nn.Sequential(OwnListing(nn.Linear(2, 2))))


@pytest.mark.parametrize("own", ["mode of every module", "written data"])
def test_a_model_that_is_not_known_is_watched_as_before(own: str) -> None:
    model = OwnListing(nn.Linear(4, 3), nn.Dropout(0.5)).eval()
    H = fastsharp.Hessian(model, [(X, Y)], nn.CrossEntropyLoss())
    H @ torch.ones(H.n)
    with torch.no_grad():
        _ = model.train() if own.startswith("mode") else model[0].weight.add_(1.0)
    with pytest.raises(StaleOperatorError):
        H @ torch.ones(H.n)
