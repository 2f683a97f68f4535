"""combine: X = S V in one pass, against extended precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsharp.ops import combine
from tests.ops.blocks import STORAGES, block, check_combine
from tests.ops.cases import VARIANTS, device_of, using


@pytest.fixture(params=VARIANTS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with using(request.param):
        yield device_of(request.param)


def coefficients(k: int, j: int, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(k, j, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(("k", "j", "n"), [(1, 1, 1), (2, 3, 31), (8, 4, 1024), (15, 9, 2049), (3, 300, 1500)])
def test_combinations_are_rounded_once(device: torch.device, k: int, j: int, n: int, storage: torch.dtype) -> None:
    check_combine(coefficients(k, j, device), block("single", 1, 1, j, n, storage, device=device).V[0])


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 20), j=st.integers(1, 40), n=st.integers(1, 3000), storage=st.sampled_from(STORAGES), pad=st.integers(0, 5))
def test_any_shape(k: int, j: int, n: int, storage: torch.dtype, pad: int) -> None:
    check_combine(coefficients(k, j, seed=n), block("single", 1, 1, j, n, storage, pad=pad).V[0])


def test_cancellation_is_kept_in_float64(device: torch.device) -> None:
    V = torch.ones(3, 500, device=device)
    V[1] = -1
    S = torch.tensor([[1e12, 1e12, 0.25]], dtype=torch.float64, device=device)
    assert torch.equal(combine(S, V, out=torch.empty(1, 500, device=device)), torch.full((1, 500), 0.25, device=device))


def test_no_combinations_are_nothing_to_do(device: torch.device) -> None:
    assert (
        combine(
            torch.empty(0, 3, dtype=torch.float64, device=device), torch.ones(3, 5, device=device), out=torch.empty(0, 5, device=device)
        ).numel()
        == 0
    )


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("cpu")])
def test_thread_count_and_company_do_not_change_a_bit(variant: str) -> None:
    S, V, before = coefficients(15, 7), block("single", 1, 1, 7, 9001, torch.float16).V[0], torch.get_num_threads()
    try:
        with using(variant):
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(combine(S, V, out=torch.empty(15, 9001)))
            alone = torch.cat([combine(s[None], V, out=torch.empty(1, 9001)) for s in S])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], x) for x in (*results[1:], alone))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("cpu")])
def test_results_past_the_caches_are_the_same_bits(variant: str, offset: int) -> None:
    """From 2 MiB on results are stored past the caches, by whole registers where the address allows it."""
    n, piece = 2**18 + 77, 100_000
    S, V = coefficients(2, 3), block("single", 1, 1, 3, n, torch.float16).V[0]
    with using(variant):
        x = torch.full((2, n + 8), torch.nan)
        whole = combine(S, V, out=x[:, offset : offset + n])
        assert whole.nbytes >= 2**21
        parts = [combine(S, v, out=torch.empty(2, v.shape[1])) for v in V.split(piece, dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert bool(x[:, :offset].isnan().all()) and bool(x[:, offset + n :].isnan().all()), "written beyond a row"
