"""The Krylov passes as Triton programs: one program a tile of 1024 columns, the tile of w in registers, rows of V streamed past it.

Note on numerical properties: products of float32 vectors are added in float32 over chunks of C = 128 and the chunk sums in
float64; alpha, w'w, the removal and the sum of update are float64 throughout and rounded once where they are stored.
Determinism: every program writes its sums to its own slots of `partial` (one row a result, one column a tile); a second launch
adds each row in an order fixed by n. No atomics, no autotuning: the tile depends on the number of vectors alone.
Offsets: rows, members and tiles in int64; only the position inside a tile is int32. Whole tiles test no column, so that their
loads stay vectorised where n is not a multiple of 16.
Shapes inside: (B, R, G, C), vectors x rows x chunks x elements of a chunk; a warp holds whole chunks.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(n, tiles, SIZE: tl.constexpr):
    """The tile of this program, what lies before the tile in the flat grid, and its columns from `start`."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    start = tile * SIZE
    return program // tiles, tile, start, n - start


@triton.jit
def _columns(left, G: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Positions inside a tile, (1, 1, G, C), and which of them exist."""
    at = tl.arange(0, G)[None, None, :, None] * C + tl.arange(0, C)[None, None, None, :]
    if FULL:
        inside = tl.full([1, 1, G, C], 1, tl.int1)
    else:
        inside = at < left
    return at, inside


@triton.jit
def _column_sum(x):
    """The sum over chunks and their elements: (B, R) of (B, R, G, C), in the dtype of x within a chunk and then in float64."""
    return tl.sum(tl.sum(x, axis=3).to(tl.float64), axis=2)


@triton.jit
def _alpha_tile(v, w, left, partial, G: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    at, inside = _columns(left, G, C, FULL)
    x = tl.load(v + at, mask=inside, other=0).to(tl.float64)
    y = tl.load(w + at, mask=inside, other=0).to(tl.float64)
    tl.store(partial + tl.zeros([1, 1], tl.int32), _column_sum(x * y))


@triton.jit
def alpha(v, v_member: tl.int64, w, w_member: tl.int64, partial, n: tl.int64, tiles: tl.int64, G: tl.constexpr, C: tl.constexpr):
    """partial[e, tile] = the tile's share of v_e'w_e."""
    e, tile, start, left = _tile(n, tiles, G * C)
    v += e * v_member + start
    w += e * w_member + start
    partial += e * tiles + tile
    if left >= G * C:
        _alpha_tile(v, w, left, partial, G, C, True)
    else:
        _alpha_tile(v, w, left, partial, G, C, False)


@triton.jit
def _dots_tile(
    V, V_row, w, w_row, ab, v1, v2, partial, tiles, b, j, left,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    at, inside = _columns(left, G, C, FULL)
    i = tl.arange(0, B).to(tl.int64)[:, None]
    here = (i < b)[:, :, None, None] & inside
    to_w = w + i[:, :, None, None] * w_row + at
    x = tl.load(to_w, mask=here, other=0)
    if ab is not None:  # then B = 1; a zero coefficient reads nothing
        one = tl.zeros([1, 1, 1, 1], tl.int32)  # a block: the interpreter spreads a scalar comparison as numbers
        first = tl.load(ab + one)
        exact = x.to(tl.float64) - first * tl.load(v1 + at, mask=here & (first != 0), other=0).to(tl.float64)
        changed = first != 0
        if v2 is not None:
            second = tl.load(ab + 1 + one)
            exact = exact - second * tl.load(v2 + at, mask=here & (second != 0), other=0).to(tl.float64)
            changed = changed | (second != 0)
        x = tl.where(here, exact, 0).to(x.dtype)  # inf * 0 beyond column n is no part of any sum
        tl.store(to_w, x, mask=here & changed)
    squares = x.to(tl.float64) * x.to(tl.float64)
    tl.store(partial + (i * (j + 1) + j) * tiles, _column_sum(squares), mask=i < b)
    for first_row in range(0, j, R):
        r = first_row + tl.arange(0, R).to(tl.int64)[None, :]
        to_rows = V + r[:, :, None, None] * V_row + at
        rows = tl.load(to_rows, mask=(r < j)[:, :, None, None] & inside, other=0).to(x.dtype)
        tl.store(partial + (i * (j + 1) + r) * tiles, _column_sum(rows * x), mask=(i < b) & (r < j))


@triton.jit(do_not_specialize=["b", "j"])
def dots(
    V, V_member: tl.int64, V_row: tl.int64, w, w_member: tl.int64, w_row: tl.int64,
    ab, ab_member: tl.int64, v1, v1_member: tl.int64, v2, v2_member: tl.int64,
    partial, b: tl.int64, j: tl.int64, n: tl.int64, tiles: tl.int64,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """w <- w - ab[0] v1 - ab[1] v2 (unless ab is None); partial[e, i, r, tile] = the tile's share of v_r'w_i, and of w_i'w_i for r = j."""
    outer, tile, start, left = _tile(n, tiles, G * C)
    groups = tl.cdiv(b, B)
    e, i = outer // groups, outer % groups * B
    V += e * V_member + start
    w += e * w_member + i * w_row + start
    partial += (e * b + i) * (j + 1) * tiles + tile
    if ab is not None:
        ab += e * ab_member
        v1 += e * v1_member + start
        if v2 is not None:
            v2 += e * v2_member + start
    if left >= G * C:
        _dots_tile(V, V_row, w, w_row, ab, v1, v2, partial, tiles, b - i, j, left, B, R, G, C, True)
    else:
        _dots_tile(V, V_row, w, w_row, ab, v1, v2, partial, tiles, b - i, j, left, B, R, G, C, False)


@triton.jit
def _update_tile(
    V, V_row, w, w_row, c, c_row, row, factor, partial, tiles, b, j, left,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    at, inside = _columns(left, G, C, FULL)
    i = tl.arange(0, B).to(tl.int64)[:, None]
    here = (i < b)[:, :, None, None] & inside
    to_w = w + i[:, :, None, None] * w_row + at
    exact = tl.load(to_w, mask=here, other=0).to(tl.float64)
    for first_row in range(0, j, R):
        r = first_row + tl.arange(0, R).to(tl.int64)[None, :]
        to_rows = V + r[:, :, None, None] * V_row + at
        rows = tl.load(to_rows, mask=(r < j)[:, :, None, None] & inside, other=0).to(tl.float64)
        a = tl.load(c + (i * c_row + r)[:, :, None, None], mask=((i < b) & (r < j))[:, :, None, None], other=0)
        exact -= tl.sum(a * rows, axis=1, keep_dims=True)
    x = tl.where(here, exact, 0).to(w.dtype.element_ty)
    tl.store(to_w, x, mask=here)
    squares = x.to(tl.float64) * x.to(tl.float64)
    tl.store(partial + i * tiles, _column_sum(squares), mask=i < b)
    if row is not None:  # then B = 1
        scaled = tl.load(factor) * x.to(tl.float64)
        if row.dtype.element_ty != tl.float64:
            scaled = scaled.to(tl.float32)  # on the way to half precision as torch goes
        tl.store(row + at, scaled.to(row.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["b", "j"])
def update(
    V, V_member: tl.int64, V_row: tl.int64, w, w_member: tl.int64, w_row: tl.int64, c, c_member: tl.int64, c_row: tl.int64,
    row, row_member: tl.int64, factor, factor_member: tl.int64,
    partial, b: tl.int64, j: tl.int64, n: tl.int64, tiles: tl.int64,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """w <- w - V'c; row <- factor w (unless row is None); partial[e, i, tile] = the tile's share of w_i'w_i."""
    outer, tile, start, left = _tile(n, tiles, G * C)
    groups = tl.cdiv(b, B)
    e, i = outer // groups, outer % groups * B
    V += e * V_member + start
    w += e * w_member + i * w_row + start
    c += e * c_member + i * c_row
    partial += (e * b + i) * tiles + tile
    if row is not None:
        row += e * row_member + start
        factor += e * factor_member
    if left >= G * C:
        _update_tile(V, V_row, w, w_row, c, c_row, row, factor, partial, tiles, b - i, j, left, B, R, G, C, True)
    else:
        _update_tile(V, V_row, w, w_row, c, c_row, row, factor, partial, tiles, b - i, j, left, B, R, G, C, False)


@triton.jit(do_not_specialize=["b", "width"])
def sum_partials(
    partial, out, out_member: tl.int64, out_row: tl.int64, b: tl.int64, width: tl.int64, tiles: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """out[e, i, r] = the sum of one row of partial: entry k to lane k mod BLOCK in order, then a tree over the lanes."""
    o = tl.program_id(0).to(tl.int64)
    r, vector = o % width, o // width
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK):
        total += tl.load(partial + o * tiles + first + lane, mask=first + lane < tiles, other=0)
    tl.store(out + vector // b * out_member + vector % b * out_row + r, tl.sum(total, axis=0))
