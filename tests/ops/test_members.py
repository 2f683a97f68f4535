"""dots and update with members, several vectors and half-precision storage: theorems on every backend and instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsharp.ops import alpha, dots, update
from tests.ops.blocks import FORMS, STORAGES, block, check_dots, check_update, rounding_bound
from tests.ops.cases import VARIANTS, device_of, poisoned, using
from tests.tolerance import assert_close, exact, sum_bound

CPU = [v for v in VARIANTS if v.startswith("cpu")]


@pytest.fixture(params=VARIANTS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with using(request.param):
        yield device_of(request.param)


# (j, n): one element, an odd row beside four, the tile of half storage and its neighbour, above two tiles
SHAPES = ((1, 1), (5, 17), (4, 2048), (3, 2049), (6, 5003))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("j", "n"), SHAPES)
def test_dots_of_every_member_and_vector(device: torch.device, form: str, j: int, n: int, storage: torch.dtype) -> None:
    check_dots(block(form, 3, 3, j, n, storage, device=device), removal=False)
    if form in ("single", "members"):
        check_dots(block(form, 3, 1, j, n, storage, device=device))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("j", "n"), SHAPES)
def test_update_of_every_member_and_vector(device: torch.device, form: str, j: int, n: int, storage: torch.dtype) -> None:
    check_update(block(form, 3, 3, j, n, storage, device=device), with_row=False)
    if form in ("single", "members"):
        check_update(block(form, 3, 1, j, n, storage, device=device), with_row=True)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    E=st.integers(1, 5),
    b=st.integers(1, 19),
    j=st.integers(1, 12),
    n=st.integers(1, 3000),
    pad=st.integers(0, 9),
    storage=st.sampled_from(STORAGES),
)
def test_any_shape(form: str, E: int, b: int, j: int, n: int, pad: int, storage: torch.dtype) -> None:
    alone = form in ("single", "members")
    check_dots(block(form, E, b, j, n, storage, pad=pad), removal=alone)
    check_update(block(form, E, b, j, n, storage, pad=pad), with_row=alone)


def test_alpha_of_every_member(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        k = block("members", 4, 1, 2, 2049, dtype, device=device)
        v, w, out = k.V[:, 1], k.w[:, 0], poisoned(4, device)
        assert alpha(v, w, out=out) is out
        terms = exact(v) * exact(w)
        assert_close(out, terms.sum(1), sum_bound(terms), "alpha")


@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_vector_gets_the_same_bits_alone_and_in_company(variant: str, storage: torch.dtype) -> None:
    k = block("both", 3, 15, 6, 3001, storage)
    c = k.c.clone()
    with using(variant):
        sums = dots(k.V, k.w, out=k.fresh(7))
        single = [[dots(V, w, out=poisoned(7, w.device)) for w in ws] for V, ws in zip(k.V, k.w, strict=True)]
        assert all(torch.equal(sums[e, i], single[e][i]) for e in range(3) for i in range(15))
        alone = k.w.clone()
        squares = update(k.V, k.w, c, out=k.fresh())
        for e in range(3):
            for i in range(15):
                square = update(k.V[e], alone[e, i], c[e, i], out=poisoned(1, alone.device))
                assert torch.equal(alone[e, i], k.w[e, i]) and torch.equal(square[0], squares[e, i])


@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_thread_count_does_not_change_a_bit(variant: str, storage: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            k = block("both", 2, 3, 5, 20011, storage)
            with using(variant):
                sums = dots(k.V, k.w, out=k.fresh(6))
                results.append([sums, update(k.V, k.w, k.c, out=k.fresh()), k.w])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_read_exactly_and_written_to_nearest(device: torch.device, storage: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(storage)
    finite = every[every.isfinite()].to(device)
    # read: w <- 0 - (-1) v
    w = torch.zeros(finite.numel(), device=device)
    minus = torch.full((1,), -1.0, dtype=torch.float64, device=device)
    update(finite[None], w, minus, out=poisoned(1, device))
    assert torch.equal(w, finite.float())
    # write: numbers themselves, midpoints (ties to even), and either side of the midpoints
    f = finite.double().sort().values.unique()
    middle = ((f[1:] + f[:-1]) / 2).float()
    for x in (f.float(), middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)):
        row, V = torch.empty(x.numel(), dtype=storage, device=device), torch.zeros(1, x.numel(), dtype=storage, device=device)
        zero, factor = torch.zeros(1, dtype=torch.float64, device=device), torch.ones(1, dtype=torch.float64, device=device)
        update(V, x.clone(), zero, out=poisoned(1, device), row=row, factor=factor)
        assert torch.equal(row.view(torch.int16), x.to(storage).view(torch.int16))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
def test_values_that_no_half_holds(device: torch.device, storage: torch.dtype) -> None:
    """Overflow becomes infinity, NaN stays NaN, a tiny number becomes a subnormal or zero: as torch rounds."""
    x = torch.tensor([1e30, -1e30, 65519.0, 65520.0, 3.4e38, 1e-7, 3e-8, 2e-8, -1e-40, torch.inf, torch.nan] * 9, device=device)
    V, row = torch.zeros(1, x.numel(), dtype=storage, device=device), torch.empty(x.numel(), dtype=storage, device=device)
    zero, factor = torch.zeros(1, dtype=torch.float64, device=device), torch.ones(1, dtype=torch.float64, device=device)
    update(V, x.clone(), zero, out=poisoned(1, device), row=row, factor=factor)
    want = x.to(storage)
    assert torch.equal(row.isnan(), want.isnan()) and torch.equal(row.nan_to_num(7), want.nan_to_num(7))


def test_factor_is_applied_in_float64(device: torch.device) -> None:
    """1 / ||w|| of an unscaled vector: 1e-30 w must not underflow on the way."""
    w = torch.full((300,), 1e30, device=device)
    V, row = torch.zeros(1, 300, dtype=torch.float16, device=device), torch.empty(300, dtype=torch.float16, device=device)
    factor = torch.full((1,), 1e-30 / 3, dtype=torch.float64, device=device)
    out = update(V, w, torch.zeros(1, dtype=torch.float64, device=device), out=poisoned(1, device), row=row, factor=factor)
    want = exact(factor) * exact(w)
    assert_close(row, want, rounding_bound(want, torch.float16))
    assert_close(out, [(exact(w) ** 2).sum()], [sum_bound(exact(w) ** 2)])


def test_w_and_row_may_lie_in_the_storage_of_V(device: torch.device) -> None:
    basis = torch.randn(2, 5, 100, device=device)
    V, w, row = basis[:, :3], basis[:, 3], basis[:, 4]
    rows = V.clone()
    one = torch.ones(2, dtype=torch.float64, device=device)
    update(V, w, torch.ones(2, 3, dtype=torch.float64, device=device), out=poisoned(2, device), row=row, factor=one)
    assert torch.equal(row, w) and torch.equal(V, rows)


def test_scalars_may_be_columns_and_interleave(device: torch.device) -> None:
    """c and out as slices of one table, as a caller that keeps T's columns would hold them."""
    k = block("both", 2, 3, 4, 50, torch.float32, device=device)
    table = torch.full((2, 3, 6), torch.nan, dtype=torch.float64, device=device)
    table[..., :4] = k.c
    update(k.V, k.w.clone(), k.c, out=(want := k.fresh()))
    update(k.V, k.w, table[..., :4], out=table[..., 5])
    assert torch.equal(table[..., 5], want) and bool(table[..., 4].isnan().all())
