"""Tiles of like samples: units that are off in a whole tile are left out, and the product stays the dense one."""

from __future__ import annotations

import pytest
import torch

from fastsharp.ops import _registry, mlp
from fastsharp.ops._mlp_tiles import tiled, tiles
from tests.ops.test_mlp import LEVELS, Problem, net_of, product

NATIVE = not isinstance(_registry.native("cpu"), str)


def cut(p: Problem, size: int = 32):
    primal = p.prepared().primal
    return primal, tiles(primal.slope, p.net.widths, size, True)


@pytest.mark.skipif(not NATIVE, reason="the kernel is not built")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gauss", [False, True])
def test_products_with_units_left_out_are_those_of_the_dense_matrix(level: str, gauss: bool) -> None:
    p = Problem(net_of((2, 23, 18, 3), "relu", "cross_entropy"), E=2, N=300)
    _, found = cut(p)
    assert float((found.counts[..., 1] * found.counts[..., 2]).double().mean()) < 0.7 * 23 * 18  # there is something to leave out
    module = _registry.native("cpu")
    before = module.simd()
    if not module.set_simd(level):
        pytest.skip(f"{level} is not on this CPU")
    try:
        V = torch.randn(4, p.net.n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        member = torch.tensor([1, 0, 0, 1])
        got = product(p.prepared(), V, member, gauss)
    finally:
        module.set_simd(before)
    for r, e in enumerate(member.tolist()):
        A = p.dense(e, gauss)
        assert float((got[r] - A @ V[r]).norm()) <= 1e-13 * float(A.norm() * V[r].norm())


def test_a_unit_is_left_out_where_it_is_off_for_all_samples_of_the_tile_and_nowhere_else() -> None:
    p = Problem(net_of((2, 23, 18, 3), "relu", "squared"), E=2, N=100)
    primal, found = cut(p)
    assert all(sorted(order) == list(range(100)) for order in found.order.tolist())
    starts = [0, 2, 25, 43, 46]
    for l, d in enumerate(p.net.widths):  # noqa: E741
        units, counts = found.units[..., starts[l] : starts[l + 1]], found.counts[..., l]
        assert bool((units.sort(-1).values == torch.arange(d)).all())
        if l in (0, 3):
            assert bool((counts == d).all())
            continue
        on = tiled(primal.slope[l - 1], found.order, 32).ne(0).any(2)
        for e in range(2):
            for i in range(4):
                assert sorted(units[e, i, : counts[e, i]].tolist()) == on[e, i].nonzero()[:, 0].tolist()


def test_patterns_without_anything_in_common_keep_their_order() -> None:
    g = torch.Generator().manual_seed(0)
    slope = (torch.rand(1, 256, 400, generator=g) > 0.5).float()
    assert torch.equal(tiles((slope,), (9, 400, 2), 64, True).order[0], torch.arange(256))


def test_smooth_activations_use_every_unit() -> None:
    p = Problem(net_of((2, 5, 3), "tanh", "squared"), E=1, N=70)
    found = tiles(p.prepared().primal.slope, p.net.widths, 32, False)
    assert torch.equal(found.order[0], torch.arange(70)) and found.counts.tolist() == [[[2, 5, 3]] * 3]


@pytest.mark.skipif(not NATIVE, reason="the kernel is not built")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("N", [20, 700])
def test_what_is_not_finite_is_not_hidden_by_a_dead_unit(bad: float, N: int) -> None:
    net = net_of((2, 4, 2), "relu", "squared")
    p = Problem(net, E=1, N=N)
    start = net.biases[0]
    assert start is not None
    p.theta[0, start + 1] = -100.0  # unit 1 is off everywhere
    V = torch.ones(2, net.n, dtype=torch.float64)
    V[0, start + 1] = bad
    got = product(p.prepared(), V)
    assert bool(got[0].isnan().all()) and bool(torch.isfinite(got[1]).all())


@pytest.mark.parametrize("N", [20, 700])
def test_scale_and_divisor(N: int) -> None:
    p = Problem(net_of((2, 9, 4), "relu", "cross_entropy"), E=1, N=N)
    prepared = p.prepared(torch.float32)
    V = torch.randn(3, p.net.n, generator=torch.Generator().manual_seed(1))
    plain = product(prepared, V)
    got = prepared.product(V, out=torch.full_like(V, float("nan")), scale=7.0, divisor=1000.0)
    assert torch.equal(got, plain.mul(7.0).div(1000.0)) or not NATIVE
    assert mlp.native(torch.device("cpu")) == NATIVE and not mlp.native(torch.device("meta"))
