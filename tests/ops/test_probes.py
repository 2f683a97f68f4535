"""probes: the stream that the definition names, the same everywhere, with the moments of its distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsharp.ops import force, probes
from fastsharp.ops.reference.krylov import philox
from tests.ops.cases import VARIANTS, device_of, using
from tests.tolerance import eps

KINDS = ("rademacher", "normal")
CPU = [v for v in VARIANTS if v.startswith("cpu")]


@pytest.fixture(params=VARIANTS)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with using(request.param):
        yield device_of(request.param)


def words(seed: int, q: int, stream: int) -> list[int]:
    """Philox-4x32-10 in Python integers."""
    low, (k0, k1) = 2**32 - 1, (seed & 2**32 - 1, seed >> 32 & 2**32 - 1)
    c = [q & low, q >> 32, stream & low, stream >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & low, p0 >> 32 ^ c[3] ^ k1, p0 & low]
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c


def entry(kind: str, seed: int, row: int, i: int) -> float:
    """Entry i of random vector `row`, from the definition."""
    if kind == "rademacher":
        return -1.0 if words(seed, i // 128, row)[i % 128 // 32] >> i % 32 & 1 else 1.0
    a, b = words(seed, i // 4, row)[i % 4 // 2 * 2 :][:2]
    radius, angle = math.sqrt(-2 * math.log((a + 1) / 2**32)), 2 * math.pi * b / 2**32
    return radius * (math.cos(angle) if i % 2 == 0 else math.sin(angle))


# Random123's published test vectors for philox4x32-10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]) -> None:
    q, stream, seed = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32, key[0] | key[1] << 32
    assert tuple(words(seed, q, stream)) == want
    signed = q - 2**64 if q >= 2**63 else q
    if signed >= 0 and stream < 2**63:  # the reference counts in int64
        assert tuple(int(x) for x in philox(seed, torch.tensor([signed]), stream)) == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "first"), [(0, 0), (-1, 7), (2**64 - 3, 2**32 + 5), (123456789012345, 2**61)])
def test_entries_are_those_of_the_definition(device: torch.device, kind: str, dtype: torch.dtype, seed: int, first: int) -> None:
    n = 70001  # above one task of the CPU kernel
    out = torch.full((2, n + 3), torch.nan, dtype=dtype, device=device)
    assert probes(kind, out=(rows := out[:, :n]), seed=seed, first=first) is rows
    assert bool(out[:, n:].isnan().all())
    for r in range(2):
        for i in (0, 1, 2, 3, 4, 31, 32, 127, 128, 4095, 4096, 65535, 65536, n - 2, n - 1):
            want = entry(kind, seed, first + r, i)
            assert abs(float(rows[r, i]) - want) <= (0 if kind == "rademacher" else eps(torch.float32) / 2 * abs(want) + 1e-14)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 10_000), seed=st.integers(-(2**63), 2**64 - 1), first=st.integers(0, 2**62 - 2), kind=st.sampled_from(KINDS))
def test_native_and_reference_agree(n: int, seed: int, first: int, kind: str) -> None:
    """Bitwise for signs; a normal may round to the neighbour where two libraries' functions differ in the last bits of float64."""
    with force("reference"):
        want = probes(kind, out=torch.empty(2, n), seed=seed, first=first)
    got = probes(kind, out=torch.empty(2, n), seed=seed, first=first)
    if kind == "rademacher":
        assert torch.equal(got, want)
    else:
        assert bool(((got - want).abs() <= eps(torch.float32) * want.abs()).all())
        assert int((got != want).sum()) <= 1  # of 20,000: such a rounding happens less than once in a million


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", CPU)
def test_bits_do_not_depend_on_threads_or_on_the_cut_into_calls(variant: str, kind: str) -> None:
    before = torch.get_num_threads()
    try:
        with using(variant):
            torch.set_num_threads(1)
            whole = probes(kind, out=torch.empty(5, 130_001), seed=3)
            torch.set_num_threads(3)
            again = probes(kind, out=torch.empty(5, 130_001), seed=3)
            parts = torch.cat(
                [probes(kind, out=torch.empty(2, 130_001), seed=3), probes(kind, out=torch.empty(3, 130_001), seed=3, first=2)]
            )
            shorter = probes(kind, out=torch.empty(5, 77), seed=3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, again) and torch.equal(whole, parts) and torch.equal(whole[:, :77], shorter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", CPU)
def test_results_past_the_caches_are_the_same_bits(variant: str, dtype: torch.dtype, offset: int, kind: str) -> None:
    """From 2 MiB on results are stored past the caches, by whole registers where the address allows it."""
    n = 2**18 + 77
    with using(variant):
        x = torch.full((2, n + 8), torch.nan, dtype=dtype)
        whole = probes(kind, out=x[:, offset : offset + n], seed=3)
        assert whole.nbytes >= 2**21
        rows = [probes(kind, out=torch.empty(1, n), seed=3, first=i) for i in range(2)]
    assert torch.equal(whole, torch.cat(rows).to(dtype))
    assert bool(x[:, :offset].isnan().all()) and bool(x[:, offset + n :].isnan().all()), "written beyond a row"


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_independence(kind: str) -> None:
    """Means of products of k entries lie within five standard deviations of what independent entries give."""
    b, n = 8, 200_000
    x = probes(kind, out=torch.empty(b, n, dtype=torch.float64), seed=11).numpy()
    bound = 5 / math.sqrt(n)
    fourth = 1.0 if kind == "rademacher" else 3.0
    assert np.all(np.abs(x.mean(1)) <= bound)
    assert np.all(np.abs((x**2).mean(1) - 1) <= bound * math.sqrt(fourth - 1))
    assert np.all(np.abs((x**4).mean(1) - fourth) <= bound * math.sqrt(96) * (kind == "normal"))
    correlations = x @ x.T / n  # between rows
    assert np.all(np.abs(correlations[~np.eye(b, dtype=bool)]) <= bound)
    for lag in (1, 2, 3, 4, 31, 32, 128):  # within a row, across words and blocks
        assert np.all(np.abs((x[:, :-lag] * x[:, lag:]).mean(1)) <= bound * 1.01)
    other = probes(kind, out=torch.empty(b, n, dtype=torch.float64), seed=12).numpy()
    assert np.all(np.abs((x * other).mean(1)) <= bound)


def test_normals_pass_a_kolmogorov_smirnov_test() -> None:
    x = probes("normal", out=torch.empty(1, 10**6), seed=5)[0].double().sort().values
    distance = (torch.special.ndtr(x) - (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6).abs().max()
    assert float(distance) <= 1.95 / 1000  # probability 1e-3 under the null, and the seed is fixed
    assert float(x.abs().max()) <= 6.7


def test_extreme_words_give_finite_normals(device: torch.device) -> None:
    """a = 0 is the longest radius, sqrt(64 ln 2) = 6.66; u = 0 cannot occur."""
    out = probes("normal", out=torch.empty(1, 2_000_000, device=device), seed=99)
    assert bool(out.isfinite().all()) and float(out.abs().max()) <= math.sqrt(64 * math.log(2)) * (1 + eps(torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_is_nothing_to_do(device: torch.device, kind: str) -> None:
    for shape in ((0, 5), (3, 0)):
        assert probes(kind, out=torch.empty(shape, device=device), seed=0).shape == shape
