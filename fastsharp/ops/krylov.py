"""The fused passes of a Krylov method: alpha, dots, update; combine assembles Ritz vectors, probes draws random ones.

Note on numerical properties. Scalars go in and come out in float64 on the device of the vectors, so that a step on a GPU needs
no synchronisation. alpha, w'w and the sum of update are float64 throughout; dots adds products of float32 vectors in float32
over chunks of at most 256 elements and the chunk sums in float64, so its error does not grow with n beyond sqrt(n) eps |v||w|.
alpha must be removed before the dots: left to the Gram-Schmidt pass, orthogonality is lost by step 20-40.
Every result is bitwise repeatable, on the native backends also across thread counts: no atomics, sums in an order fixed by n.

Shapes. One vector against one basis: V (j, n), w (n,). Several vectors against one basis: w (b, n). Members of an ensemble, each
with its own basis: V (E, j, n), w (E, n) or (E, b, n). Results carry the same leading dimensions as w. The last dimension is
contiguous everywhere; the others may have any stride that keeps rows apart.
Storage. Rows of V have the dtype of w, or float16 or bfloat16 under a float32 w. A half-precision row stands for a multiple of a
vector; ops know nothing of the factor, which callers fold into `out` and `c`.
"""

from __future__ import annotations

from torch import Tensor

from fastsharp.ops import _arguments, _border, _registry

Last = tuple[Tensor, Tensor | None]


def alpha(v: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """out = v'w.

    v, w    (n,) or (E, n), float32 or float64, one device
    out     (1,) or (E,) float64, written and returned
    cost    reads 2n elements a member
    """
    _arguments.check_pair("alpha", v, w, out)
    v2, w2 = (v, w) if v.ndim == 2 else (v[None], w[None])
    _registry.choose(v.device).alpha(v2, w2, out)
    _border.wrote(out)
    return out


def dots(V: Tensor, w: Tensor, ab: Tensor | None = None, *, out: Tensor, last: Last | None = None) -> Tensor:
    """w <- w - ab[0] v_j - ab[1] v_{j-1}; then out[:j] = V w and out[j] = w'w, in one pass over V and w.

    V       (j, n) or (E, j, n) rows, j >= 1, row stride >= n; float32, float64, float16 or bfloat16
    w       (n,), (b, n), (E, n) or (E, b, n), written in place; may lie in the storage of V, outside its rows
    ab      (2,) or (E, 2) float64: alpha and the last beta. A zero skips its term; for j = 1 there is no v_{j-1} and ab[1] is
            ignored. None leaves w alone (a second Gram-Schmidt pass), the only choice for b vectors
    last    (v_j, v_{j-1}) in the dtype of w, each (n,) or (E, n), the second None for j = 1; None: the last two rows of V, which
            must then have the dtype of w where ab is given
    out     float64, the leading dimensions of w and then j + 1; written and returned
    cost    reads (j + b) n elements a member, writes b n where ab is given
    """
    p = _arguments.check_problem("dots", V, w)
    removed = _arguments.check_removed("dots", p, ab, last)
    out3 = _arguments.check_results("dots", p, out)
    _registry.choose(V.device).dots(p.V, p.w, removed, out3)
    _border.wrote(out, None if removed is None else w)
    return out


def update(V: Tensor, w: Tensor, c: Tensor, *, out: Tensor, row: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """w <- w - V'c; out = w'w of the new w; row <- factor w in the dtype of V, all in one pass.

    V       (j, n) or (E, j, n) rows, j >= 1, row stride >= n; float32, float64, float16 or bfloat16
    w       (n,), (b, n), (E, n) or (E, b, n), written in place; may lie in the storage of V, outside its rows
    c       float64, the leading dimensions of w and then j; not rounded: the sum is kept in float64 and rounded once
    out     (1,) for w (n,), else the leading dimensions of w; float64, written and returned
    row     (n,) or (E, n) in the dtype of V: the next basis row, written unless None; not for b vectors
    factor  (1,) or (E,) float64, with row
    cost    reads (j + b) n elements a member, writes b n, and n of V's dtype where row is given
    """
    p = _arguments.check_problem("update", V, w)
    c3 = _arguments.check_coefficients("update", p, c)
    out2 = _arguments.check_squares("update", p, out)
    rows = _arguments.check_row("update", p, row, factor, c, out)
    _registry.choose(V.device).update(p.V, p.w, c3, rows, out2)
    _border.wrote(w, out, row)
    return out


def combine(S: Tensor, V: Tensor, *, out: Tensor) -> Tensor:
    """out = S V: k combinations of the j rows of V in one pass over V, each sum kept in float64 and rounded once.

    S       (k, j) float64 on the device of V
    V       (j, n) rows, row stride >= n; float32, float64, float16 or bfloat16
    out     (k, n) float32 or float64, outside V; float64 for a float64 V, float32 otherwise; written and returned
    cost    reads j n elements, writes k n
    """
    _arguments.check_combination(S, V, out)
    if out.shape[0]:
        _registry.choose(V.device).combine(S, V, out)
        _border.wrote(out)
    return out


def probes(kind: str, *, out: Tensor, seed: int, first: int = 0) -> Tensor:
    """Row i of out is random vector number first + i of the stream of `seed`: the same numbers on every device and backend.

    kind    "rademacher" (entries +1 and -1) or "normal" (standard normals, |z| <= 6.7)
    out     (b, n) float32 or float64, written and returned; a float64 vector holds the same float32 numbers
    seed    any 64-bit integer; `first` >= 0 lets separate calls continue one stream

    Counter-based: Philox-4x32-10 (Salmon, Moraes, Dror & Shaw 2011) with key (seed's low word, high word) and counter (q's low
    word, q's high word, row's low word, row's high word). Rademacher: q = i // 128, entry i is -1 where bit i % 32 of word
    (i % 128) // 32 is set. Normal: q = i // 4; words (a, b) and (c, d) give the pairs i % 4 = 0, 1 and 2, 3 by Box-Muller with
    u = (a + 1) 2^-32: sqrt(-2 ln u) cos(2 pi b 2^-32) and the same with sin, in float64, rounded once to float32. Rademacher
    vectors are bitwise the same everywhere; a normal may differ in the last float32 bit where two libraries' ln or cos differ.
    """
    _arguments.check_probes(kind, out, seed, first)
    if out.numel():
        _registry.choose(out.device).probes(kind, seed, first, out)
        _border.wrote(out)
    return out
