"""alpha, dots, update: theorems about one step, on every backend and instruction set of this machine.

The oracle is numpy in extended precision: it shares no code with torch or with the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsharp.ops import alpha, dots, update
from tests.ops.cases import DTYPES, VARIANTS, Case, case, check_alpha, check_dots, check_update, device_of, poisoned, using
from tests.tolerance import assert_close, eps, exact

# One element, one chunk and its neighbours, one tile and its neighbours, a prime above two tiles.
SIZES = (1, 2, 3, 31, 255, 256, 257, 1023, 1024, 1025, 10007)
ROWS = (1, 2, 3, 4, 5, 50)


@pytest.fixture(params=VARIANTS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with using(request.param):
        yield device_of(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(k: Case) -> list[torch.Tensor]:
    """All results of alpha, dots, update in a row, on a copy."""
    k = k.copy()
    a = alpha(k.V[-1], k.w, out=poisoned(1, k.w.device))
    c = dots(k.V, k.w, k.ab, out=poisoned(k.j + 1, k.w.device))
    after_dots = k.w.clone()
    ww = update(k.V, k.w, c[: k.j] / k.n, out=poisoned(1, k.w.device))
    return [a, c, after_dots, ww, k.w.clone()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_alpha_is_the_inner_product(device: torch.device, n: int, dtype: torch.dtype) -> None:
    check_alpha(case(1, n, dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("j", ROWS)
@pytest.mark.parametrize("n", SIZES)
def test_dots_removes_two_terms_and_returns_the_products_of_the_new_w(device: torch.device, n: int, j: int, dtype: torch.dtype) -> None:
    check_dots(case(j, n, dtype, pad=n % 7, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("j", ROWS)
@pytest.mark.parametrize("n", SIZES)
def test_update_subtracts_the_combination_and_returns_the_square_of_the_new_w(
    device: torch.device, n: int, j: int, dtype: torch.dtype
) -> None:
    check_update(case(j, n, dtype, pad=n % 7, device=device))


@settings(max_examples=40, deadline=None)
@given(j=st.integers(1, 70), n=st.integers(1, 9000), pad=st.integers(0, 40), seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES))
def test_any_size_and_stride(j: int, n: int, pad: int, seed: int, dtype: torch.dtype) -> None:
    for check in (check_alpha, check_dots, check_update):
        check(case(j, n, dtype, pad=pad, seed=seed))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extreme_scales_neither_overflow_nor_underflow(device: torch.device, scale: float) -> None:
    for check in (check_alpha, check_dots, check_update):
        check(case(5, 4099, torch.float32, scale=scale, device=device))


def test_zero_coefficients_leave_w_bitwise_and_touch_no_row(device: torch.device) -> None:
    """A second Gram-Schmidt pass: 0 * inf must not turn w into NaN."""
    k = case(3, 300, torch.float32, device=device)
    before = k.w.clone()
    k.V[-2:] = torch.inf
    k.ab.zero_()
    out = dots(k.V, k.w, k.ab, out=poisoned(4, device))
    assert torch.equal(k.w, before)
    assert out[0].isfinite() and out[3].isfinite() and not out[2].isfinite()


def test_one_zero_coefficient_skips_that_term_alone(device: torch.device) -> None:
    for skipped in (0, 1):
        k = case(3, 300, torch.float64, device=device)
        want = exact(k.w) - exact(k.ab)[1 - skipped] * exact(k.V)[-2 + skipped]
        k.ab[skipped] = 0
        k.V[-1 - skipped] = torch.inf
        dots(k.V, k.w, k.ab, out=poisoned(4, device))
        assert_close(k.w, want, 4 * eps(torch.float64) * abs(want).max(), f"w with ab[{skipped}] = 0")


def test_beta_is_ignored_when_there_is_no_second_row(device: torch.device) -> None:
    k, other = case(1, 300, torch.float32, device=device), case(1, 300, torch.float32, device=device)
    other.ab[1] = torch.nan
    results = [dots(x.V, x.w, x.ab, out=poisoned(2, device)) for x in (k, other)]
    assert torch.equal(results[0], results[1]) and torch.equal(k.w, other.w)


def test_a_nan_or_inf_in_w_reaches_every_result(device: torch.device) -> None:
    for bad in (torch.nan, torch.inf):
        k = case(3, 4099, torch.float32, device=device)
        k.w[4098] = bad
        assert not any(bool(t.isfinite().all()) for t in step(k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_bitwise_repeatable(device: torch.device, dtype: torch.dtype) -> None:
    k = case(7, 50021, dtype, pad=3, device=device)
    first = step(k)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, step(k), strict=True))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("cpu")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_does_not_change_a_bit(variant: str, dtype: torch.dtype, threads: None) -> None:
    k = case(7, 50021, dtype, pad=3)
    results = []
    with using(variant):
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(step(k))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("cpu")])
def test_address_and_stride_do_not_change_a_bit_on_the_cpu(variant: str) -> None:
    tight, loose = case(5, 4099, torch.float32), case(5, 4099, torch.float32, pad=1)
    with using(variant):
        assert all(torch.equal(x, y) for x, y in zip(step(tight), step(loose), strict=True))


def test_one_step_leaves_w_orthogonal_to_an_orthonormal_basis(device: torch.device) -> None:
    """|V w| <= c eps sqrt(n) |w0|: what dots and update are for."""
    for dtype in DTYPES:
        k = case(20, 3001, dtype, device=device)
        k.V.copy_(torch.linalg.qr(k.V.T.double())[0].T)
        norm = float(k.w.double().norm())
        k.ab.zero_()
        out = dots(k.V, k.w, k.ab, out=poisoned(21, device))
        update(k.V, k.w, out[:20], out=poisoned(1, device))
        left = exact(k.V) @ exact(k.w)
        assert_close(left, 0 * left, 4 * eps(dtype) * norm, "V w after one pass")


def test_in_place_writes_bump_the_version(device: torch.device) -> None:
    k = case(2, 10, torch.float32, device=device)
    out = poisoned(3, device)
    before = k.w._version, out._version
    dots(k.V, k.w, k.ab, out=out)
    assert k.w._version > before[0] and out._version > before[1]
    single = poisoned(1, device)
    before = k.w._version, single._version
    update(k.V, k.w, k.c, out=single)
    assert k.w._version > before[0] and single._version > before[1]


def test_out_is_returned_itself(device: torch.device) -> None:
    k = case(2, 10, torch.float32, device=device)
    out, single = poisoned(3, device), poisoned(1, device)
    assert dots(k.V, k.w, k.ab, out=out) is out
    assert update(k.V, k.w, k.c, out=single) is single
    assert alpha(k.V[0], k.w, out=single) is single


def test_padding_and_neighbours_are_not_written(device: torch.device) -> None:
    k = case(3, 257, torch.float32, pad=6, device=device)
    rows = k.V.clone()
    dots(k.V, k.w, k.ab, out=poisoned(4, device))
    update(k.V, k.w, k.c, out=poisoned(1, device))
    assert torch.equal(k.V, rows) and bool(k.basis[:, k.n :].isnan().all())


def test_works_in_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        check_dots(case(3, 100, torch.float32, device=device))
