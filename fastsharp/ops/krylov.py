"""The three fused passes of a Lanczos step: alpha, dots, update.

Note on numerical properties. Scalars go in and come out in float64 on the device of the vectors, so that a step on a GPU needs
no synchronisation. alpha, w'w and the sum of update are float64 throughout; dots adds products of float32 vectors in float32
over chunks of at most 256 elements and the chunk sums in float64, so its error does not grow with n beyond sqrt(n) eps |v||w|.
alpha must be removed before the dots: left to the Gram-Schmidt pass, orthogonality is lost by step 20-40.
Every result is bitwise repeatable, on the native backends also across thread counts: no atomics, sums in an order fixed by n.
"""

from __future__ import annotations

from torch import Tensor

from fastsharp.ops import _border, _registry


def alpha(v: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """out[0] = v'w.

    v, w    (n,) contiguous, float32 or float64, one device
    out     (1,) float64, written and returned
    cost    reads 2n elements
    """
    _border.check("alpha", "v", v, 1, _border.VECTOR_DTYPES)
    _border.check("alpha", "w", w, 1, (v.dtype,), v.device)
    _border.check_length("alpha", "w", w, v.shape[0], f"as v is {tuple(v.shape)}")
    _border.check_nonempty("alpha", "v", v)
    _border.check_out("alpha", out, 1, v.device, v, w)
    _registry.choose(v.device).alpha(v, w, out)
    _border.wrote(out)
    return out


def dots(V: Tensor, w: Tensor, ab: Tensor, *, out: Tensor) -> Tensor:
    """w <- w - ab[0] V[j-1] - ab[1] V[j-2]; then out[:j] = V w and out[j] = w'w, in one pass over V and w.

    V       (j, n) rows, j >= 1, row stride >= n; float32 or float64
    w       (n,) written in place; may lie in the storage of V, outside its rows
    ab      (2,) float64: alpha and the last beta. A zero skips its term (a second Gram-Schmidt pass: both zero);
            for j = 1 there is no V[j-2] and ab[1] is ignored
    out     (j + 1,) float64, written and returned
    cost    reads (j + 1) n elements, writes n
    """
    _border.check_basis("dots", V, w)
    _border.check_scalars("dots", "ab", ab, 2, V.device)
    _border.check_out("dots", out, V.shape[0] + 1, V.device, V, w)
    _registry.choose(V.device).dots(V, w, ab, out)
    _border.wrote(w, out)
    return out


def update(V: Tensor, w: Tensor, c: Tensor, *, out: Tensor) -> Tensor:
    """w <- w - V'c; out[0] = w'w of the new w, in one pass.

    V       (j, n) rows, j >= 1, row stride >= n; float32 or float64
    w       (n,) written in place; may lie in the storage of V, outside its rows
    c       (j,) float64; not rounded: the sum is kept in float64 and rounded once, when w is stored
    out     (1,) float64, written and returned
    cost    reads (j + 1) n elements, writes n
    """
    _border.check_basis("update", V, w)
    _border.check_scalars("update", "c", c, V.shape[0], V.device)
    _border.check_out("update", out, 1, V.device, V, w)
    _registry.choose(V.device).update(V, w, c, out)
    _border.wrote(w, out)
    return out
