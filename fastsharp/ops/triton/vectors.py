"""combine and probes as Triton programs: Ritz vectors from rows, random vectors from counters.

Note on numerical properties: combine keeps each sum in float64 and rounds once. Probes are functions of (seed, row, column) alone:
Philox-4x32-10 in 32-bit integers; normals by Box-Muller in float64, rounded once to float32.
"""

import triton
import triton.language as tl

_UNIT = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(6.283185307179586 * 2.0**-32)


@triton.jit
def _combine_tile(
    S, S_row, V, V_row, out, out_row, k, j, left,
    K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)[None, None, :]
    if FULL:
        inside = tl.full([1, 1, BLOCK], 1, tl.int1)
    else:
        inside = at < left
    for first in range(0, k, K):  # V comes from memory for the first group and from the cache for the others
        i = first + tl.arange(0, K).to(tl.int64)[:, None, None]
        total = tl.zeros([K, 1, BLOCK], tl.float64)
        for first_row in range(0, j, R):
            r = first_row + tl.arange(0, R).to(tl.int64)[None, :, None]
            a = tl.load(S + i * S_row + r, mask=(i < k) & (r < j), other=0)
            rows = tl.load(V + r * V_row + at, mask=(r < j) & inside, other=0).to(tl.float64)
            total += tl.sum(a * rows, axis=1, keep_dims=True)
        tl.store(out + i * out_row + at, total.to(out.dtype.element_ty), mask=(i < k) & inside)


@triton.jit(do_not_specialize=["k", "j"])
def combine(
    S, S_row: tl.int64, V, V_row: tl.int64, out, out_row: tl.int64, k: tl.int64, j: tl.int64, n: tl.int64,
    K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = S V on one tile of columns, K combinations at a time."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if n - start >= BLOCK:
        _combine_tile(S, S_row, V + start, V_row, out + start, out_row, k, j, n - start, K, R, BLOCK, True)
    else:
        _combine_tile(S, S_row, V + start, V_row, out + start, out_row, k, j, n - start, K, R, BLOCK, False)


@triton.jit
def _words(seed, stream, counter):
    """Philox-4x32-10 at (counter, stream) with key `seed`, low words first."""
    high = (stream >> 32).to(tl.uint32) + tl.zeros_like(counter).to(tl.uint32)
    low = stream.to(tl.uint32) + tl.zeros_like(counter).to(tl.uint32)
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), low, high)


@triton.jit
def _in_order(a, b, c, d, Q: tl.constexpr):
    """(Q, 4): four vectors of length Q side by side."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [Q, 4])


@triton.jit(do_not_specialize=["seed", "first"])
def rademacher(seed: tl.int64, first: tl.int64, out, out_row: tl.int64, n: tl.int64, tiles: tl.int64, Q: tl.constexpr):
    """Q counters of one row: 128 signs each, one a bit."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    counter = program % tiles * Q + tl.arange(0, Q)
    a, b, c, d = _words(seed, first + row, counter)
    words = _in_order(a, b, c, d, Q)
    bits = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    at = counter[:, None, None] * 128 + tl.arange(0, 4)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    tl.store(out + row * out_row + at, tl.where(bits != 0, -1.0, 1.0).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _box_muller(a, b):
    """Two independent standard normals from two uniform words, in float64."""
    radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float64) + 1.0) * _UNIT))
    angle = b.to(tl.float64) * _TURN
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["seed", "first"])
def normal(seed: tl.int64, first: tl.int64, out, out_row: tl.int64, n: tl.int64, tiles: tl.int64, Q: tl.constexpr):
    """Q counters of one row: four normals each."""
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    counter = program % tiles * Q + tl.arange(0, Q)
    a, b, c, d = _words(seed, first + row, counter)
    z0, z1 = _box_muller(a, b)
    z2, z3 = _box_muller(c, d)
    at = counter[:, None] * 4 + tl.arange(0, 4)[None, :]
    z = _in_order(z0, z1, z2, z3, Q).to(tl.float32)
    tl.store(out + row * out_row + at, z.to(out.dtype.element_ty), mask=at < n)
