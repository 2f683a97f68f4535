"""Names, shapes and order of the parameters behind the flat vector, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastsharp.errors import ArgumentTypeError, DtypeError, NoParametersError, ParamError
from fastsharp.params import ParamLayout, select
from tests.cases import TiedLM, net
from tests.unchanged import check_message


@pytest.fixture
def model() -> nn.Module:
    return net("mlp_tanh").model


def test_the_flat_order_is_that_of_named_parameters(model):
    chosen = select(model)
    assert chosen.names == tuple(name for name, _ in model.named_parameters())
    assert all(p is q for p, q in zip(chosen.params, model.parameters(), strict=True))
    assert chosen.layout.n == sum(p.numel() for p in model.parameters()) == 131
    assert (chosen.dtype, chosen.device) == (torch.float64, torch.device("cpu"))


def test_views_share_memory_and_cover_everything_once(model):
    layout = select(model).layout
    flat = torch.zeros(layout.n)
    for view in layout.views(flat):
        view.add_(1)
    assert bool((flat == 1).all())
    assert [tuple(v.shape) for v in layout.views(flat)] == [tuple(p.shape) for p in model.parameters()]
    assert layout.unflatten(flat)["4.bias"].data_ptr() == layout.views(flat)[-1].data_ptr()


def test_a_layout_of_scalars_and_empty_parameters():
    layout = ParamLayout.of(["a", "b", "c"], [torch.zeros(()), torch.zeros(0, 3), torch.zeros(2)])
    assert layout.offsets == (0, 1, 1, 3) and layout.n == 3
    assert [tuple(v.shape) for v in layout.views(torch.arange(3.0))] == [(), (0, 3), (2,)]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (None, ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")),
        ("*.bias", ("0.bias", "2.bias", "4.bias")),
        ("4.*", ("4.weight", "4.bias")),
        (["4.bias", "0.weight"], ("0.weight", "4.bias")),
        (("[02].weight", "4.bias"), ("0.weight", "2.weight", "4.bias")),
        ((name for name in ["2.bias"]), ("2.bias",)),
        (lambda name, p: p.ndim == 2, ("0.weight", "2.weight", "4.weight")),
    ],
    ids=["all", "glob", "prefix", "names", "mixed", "iterator", "callable"],
)
def test_selectors(model, params, names):
    assert select(model, params).names == names


def test_frozen_parameters_are_left_out_and_said(model):
    model[0].requires_grad_(False)
    chosen = select(model)
    assert chosen.names[0] == "2.weight" and chosen.frozen == ("0.weight", "0.bias")
    assert chosen.notes() == ["frozen parameters left out: 0.weight, 0.bias"]
    assert select(model, "*.bias").frozen == ("0.bias",)


def test_tied_parameters_answer_to_both_names():
    model = TiedLM()
    for params in ("embed.weight", "head.weight", ["head.weight", "embed.weight"]):
        chosen = select(model, params)
        assert chosen.names == ("embed.weight",) and chosen.layout.n == 36
        assert chosen.tied == (("head.weight", "embed.weight"),)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ("5.*", ParamError, ("'5.*'", "0.weight")),
        (["0.weight", "nothing"], ParamError, ("'nothing'",)),
        ([], ParamError, ("empty", "0.weight")),
        (lambda name, p: False, ParamError, ("callable",)),
        ([3], ArgumentTypeError, ("int", "globs")),
    ],
    ids=["glob", "name", "empty list", "callable", "number"],
)
def test_selectors_that_choose_nothing(model, params, error, words):
    with pytest.raises(error) as caught:
        select(model, params)
    check_message(caught.value, *words)


def test_a_frozen_parameter_by_name_and_a_frozen_selection(model):
    model[0].requires_grad_(False)
    with pytest.raises(ParamError) as caught:
        select(model, "0.weight")
    check_message(caught.value, "'0.weight'", "frozen", "requires_grad_(True)")
    with pytest.raises(NoParametersError) as none:
        select(model, "0.*")
    check_message(none.value, "2 chosen parameters", "'0.weight'")


def test_lazy_modules_have_no_shape_yet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # older versions of torch speak of lazy modules here
        model = nn.LazyLinear(3)
    with pytest.raises(ParamError) as caught:
        select(model)
    check_message(caught.value, "'weight'", "lazy")


def test_dtypes_of_parameters_left_out_do_not_matter(model):
    model[4].half()
    assert select(model, "[02].*").dtype == torch.float64
    with pytest.raises(DtypeError) as caught:
        select(model)
    check_message(caught.value, "'4.weight'", "float16")


def test_long_lists_of_names_are_cut():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30))).requires_grad_(False)
    model[29].requires_grad_(True)
    assert select(model).notes()[0].endswith("and 52 more")
