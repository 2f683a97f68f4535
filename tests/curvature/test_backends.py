"""Which backend computes the products, and what happens where one cannot: a sum has one backend, and a result says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.curvature import backends
from fastsharp.curvature.autograd import graph_products
from fastsharp.curvature.batch_products import Made, Request, Unavailable
from fastsharp.curvature.mlp import mlp_products
from fastsharp.errors import EngineError, InputError
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")
REASON = "the third batch has an odd number of samples"
KINDS = {"hessian": fastsharp.Hessian, "ggn": fastsharp.GGN}


class Picky:
    """autograd's products, times four so that they show, refused from the given batch on; `made` lists the batches that were not."""

    def __init__(self, refuses: int | None) -> None:
        self.refuses, self.made = refuses, list[object]()

    def __call__(self, request: Request) -> Made:
        if request.index == self.refuses:
            raise Unavailable(REASON)
        self.made.append(request.index)
        made = graph_products(request)
        return Made(made.products, 4.0 * made.scale, made.count)


@pytest.fixture
def with_picky(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], Picky]:
    """Enters a `Picky` as backend "picky", the first that "auto" tries."""

    def enter(refuses: int | None) -> Picky:
        picky = Picky(refuses)
        monkeypatch.setitem(backends.MAKERS, "picky", picky)
        monkeypatch.setattr(backends, "AUTO", ("picky", "autograd"))
        monkeypatch.setattr("fastsharp.curvature.backends.BACKENDS", ("auto", *backends.MAKERS))
        return picky

    return enter


def problem() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3
    return model, list(zip(x.split(4), y.split(4), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["auto", 0])
def test_a_refusal_in_mid_pass_starts_the_sum_over_with_the_next_backend(kind, memory, with_picky):
    model, batches = problem()
    want = KINDS[kind](model, batches, backend="autograd")
    V = torch.randn(2, want.n, dtype=torch.float64)
    exact = want.apply(V)
    picky = with_picky(2)
    operator = KINDS[kind](model, batches, memory=memory)
    assert operator.backend == "picky" and not any(REASON in note for note in operator.notes)
    got = operator.apply(V)
    assert picky.made == [0, 1]
    assert torch.equal(got, exact)  # nothing of the first two batches' products is left
    assert operator.backend == operator.settings["backend"] == "autograd"
    assert sum(note == f"products by autograd: {REASON}" for note in operator.notes) == 1
    assert torch.equal(operator.apply(V), exact) and picky.made == [0, 1]  # and it is not asked again


def test_output_that_was_partly_summed_is_not_returned_where_the_caller_gave_it(with_picky):
    model, batches = problem()
    with_picky(1)
    operator = fastsharp.Hessian(model, batches)
    V = torch.randn(2, operator.n, dtype=torch.float64)
    out = torch.full_like(V, float("nan"))
    operator.apply(V, out=out)
    assert torch.equal(out, fastsharp.Hessian(model, batches, backend="autograd").apply(V))


def test_a_backend_that_serves_all_batches_stays(with_picky):
    model, batches = problem()
    with_picky(None)
    operator = fastsharp.Hessian(model, batches)
    v = torch.randn(operator.n, dtype=torch.float64)
    assert torch.equal(operator @ v, 4.0 * (fastsharp.Hessian(model, batches, backend="autograd") @ v))
    assert operator.backend == "picky" and not any("products by" in note for note in operator.notes)


def test_a_named_backend_is_not_replaced(with_picky):
    model, batches = problem()
    with_picky(2)
    operator = fastsharp.Hessian(model, batches, backend="picky")
    with pytest.raises(EngineError, match=REASON) as caught:
        operator @ torch.ones(operator.n, dtype=torch.float64)
    check_message(caught.value)
    assert "backend='picky'" in str(caught.value) and "backend='auto'" in str(caught.value)


def test_the_refusal_outlives_refresh_and_is_not_passed_to_another_operator(with_picky):
    model, batches = problem()
    with_picky(0)
    operator = fastsharp.Hessian(model, batches)
    operator @ torch.ones(operator.n, dtype=torch.float64)
    assert operator.refresh().backend == "autograd"
    assert fastsharp.Hessian(model, batches).backend == "picky"


def test_a_result_says_which_backend_and_why(with_picky):
    model, batches = problem()
    with_picky(0)
    result = fastsharp.lanczos(model, batches, k=1)
    assert result.settings["backend"] == "autograd" and f"products by autograd: {REASON}" in result.notes
    with pytest.raises(EngineError, match=REASON):
        fastsharp.lanczos(model, batches, k=1, backend="picky")


def test_the_preflight_catches_a_backend_that_computes_another_matrix(with_picky):
    model, batches = problem()
    picky = with_picky(None)

    def wrong(request: Request) -> Made:
        made = picky(request)
        kept = made.products.add_products
        made.products.add_products = lambda V, out, scale: kept(V, out, 1.1 * scale)
        return made

    backends.MAKERS["picky"] = wrong
    with pytest.raises(EngineError, match=r"misses autograd.s by 1\.0e-01") as caught:
        fastsharp.lanczos(model, batches, k=1)
    check_message(caught.value)


def test_settling_asks_the_first_batch_only(with_picky):
    model, batches = problem()
    picky = with_picky(2)
    operator = fastsharp.Hessian(model, batches)
    operator.settle_backend()
    assert picky.made == [0] and operator.backend == "picky"
    with_picky(0)
    operator = fastsharp.Hessian(model, batches)
    operator.settle_backend()
    assert operator.backend == "autograd"


def test_an_unknown_backend_is_refused_with_the_list():
    with pytest.raises(InputError, match="'auto', 'rop', 'mlp', 'autograd'"):
        fastsharp.Hessian(*problem(), backend="fast")


@pytest.mark.parametrize("kind", KINDS)
def test_cheap_twins_fall_back_by_themselves(kind, with_picky):
    model, batches = problem()
    with_picky(0)
    operator = KINDS[kind](model.float(), [(x.float(), y) for x, y in batches])
    twin = operator.cheap("bf16")
    twin @ torch.ones(twin.n)
    assert twin.backend == "autograd" and any(REASON in note for note in twin.notes)
    assert operator.backend == "picky" and not any(REASON in note for note in operator.notes)


def test_the_native_kernel_says_what_it_does_not_take():
    model, batches = problem()
    deep = nn.Sequential(model, nn.Softplus(), nn.Linear(3, 3).double())
    operator = fastsharp.Hessian(deep, batches, backend="mlp")
    with pytest.raises(EngineError, match="softplus"):
        operator @ torch.ones(operator.n, dtype=torch.float64)
    assert backends.MAKERS["mlp"] is mlp_products
