"""Deliberately wrong kernels: the checkers behind tests/ops/test_krylov.py must go red on every one of them.

A checker that lets a mutant live asserts nothing. Each mutant makes one mistake that a real kernel could make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsharp.ops import _registry, force
from fastsharp.ops.reference import krylov as truth
from tests.ops.cases import Case, case, check_alpha, check_dots, check_update
from tests.tolerance import assert_close

REFERENCE = _registry.available()["reference"]
assert isinstance(REFERENCE, _registry.Backend)
TILE = 1024


def true_alpha(v: Tensor, w: Tensor, out: Tensor) -> None:
    truth.alpha(v[None], w[None], out)


def true_dots(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    truth.dots(V[None], w[None, None], (ab[None], V[None, -1], V[None, -2]), out[None, None])


def true_update(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    truth.update(V[None], w[None, None], c[None, None], None, out[None])


def on_single_vectors(op: str, mutant: Callable[..., None]) -> Callable[..., None]:
    """A mutant of one vector and one basis as an op of a backend."""
    if op == "alpha":
        return lambda v, w, out: mutant(v[0], w[0], out)
    if op == "dots":
        return lambda V, w, removed, out: mutant(V[0], w[0, 0], removed[0][0], out[0, 0])
    return lambda V, w, c, row, out: mutant(V[0], w[0, 0], c[0, 0], out[0])


def alpha_in_float32(v: Tensor, w: Tensor, out: Tensor) -> None:
    out[0] = v.float() @ w.float()


def alpha_without_last_element(v: Tensor, w: Tensor, out: Tensor) -> None:
    true_alpha(v[:-1], w[:-1], out)


def dots_without_beta(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab * torch.tensor([1.0, 0.0], dtype=torch.float64), out)


def dots_with_swapped_coefficients(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab.flip(0), out)


def dots_with_wrong_sign(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, -ab, out)


def dots_of_the_old_w(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    old = w.clone()
    true_dots(V, w, ab, out)
    out[:-1] = V.double() @ old.double()


def dots_without_last_tile(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab, out)
    whole = w.shape[0] // TILE * TILE
    out[:-1] = V[:, :whole].double() @ w[:whole].double()


def dots_accumulated_in_half_precision(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab, out)
    out[:-1] = (V.bfloat16().float() @ w.bfloat16().float()).double()


def dots_with_the_norm_instead_of_its_square(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab, out)
    out[-1] = out[-1].sqrt()


def dots_with_the_square_in_float32(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab, out)
    out[-1] = w @ w


def dots_divided_by_the_norm(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    true_dots(V, w, ab, out)
    out[:-1] /= out[-1].sqrt()


def dots_that_leave_the_last_slot(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    last = out[-1].clone()
    true_dots(V, w, ab, out)
    out[-1] = last


def dots_that_write_back_unrounded_sums_only(V: Tensor, w: Tensor, ab: Tensor, out: Tensor) -> None:
    """The products are those of the new w, but w itself is not stored."""
    true_dots(V, w.clone(), ab, out)


def update_with_wrong_sign(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    true_update(V, w, -c, out)


def update_without_last_row(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    true_update(V[:-1], w, c[:-1], out)


def update_with_the_old_square(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    old = w.double() @ w.double()
    true_update(V, w, c, out)
    out[0] = old


def update_with_the_square_in_float32(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    true_update(V, w, c, out)
    out[0] = w @ w


def update_with_coefficients_rounded_to_half(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    true_update(V, w, c.bfloat16().double(), out)


def update_without_tail(V: Tensor, w: Tensor, c: Tensor, out: Tensor) -> None:
    whole = w.shape[0] // 16 * 16
    true_update(V[:, :whole], w[:whole], c, out)


MUTANTS: list[tuple[str, Callable[..., None], Callable[[Case], None]]] = [
    *[("alpha", m, check_alpha) for m in (alpha_in_float32, alpha_without_last_element)],
    *[
        ("dots", m, check_dots)
        for m in (
            dots_without_beta,
            dots_with_swapped_coefficients,
            dots_with_wrong_sign,
            dots_of_the_old_w,
            dots_without_last_tile,
            dots_accumulated_in_half_precision,
            dots_with_the_norm_instead_of_its_square,
            dots_with_the_square_in_float32,
            dots_divided_by_the_norm,
            dots_that_leave_the_last_slot,
            dots_that_write_back_unrounded_sums_only,
        )
    ],
    *[
        ("update", m, check_update)
        for m in (
            update_with_wrong_sign,
            update_without_last_row,
            update_with_the_old_square,
            update_with_the_square_in_float32,
            update_with_coefficients_rounded_to_half,
            update_without_tail,
        )
    ],
]


@pytest.mark.parametrize(("op", "mutant", "check"), MUTANTS, ids=[m.__name__ for _, m, _ in MUTANTS])
def test_a_wrong_kernel_is_caught(op: str, mutant: Callable[..., None], check: Callable[[Case], None]) -> None:
    k = case(5, 2 * TILE + 37, torch.float32, pad=3)
    with force(REFERENCE):
        check(k.copy())  # the truth passes on this very case
    changed: Any = {op: on_single_vectors(op, mutant)}
    with force(replace(REFERENCE, name="mutant", **changed)), pytest.raises(AssertionError):
        check(k.copy())


@pytest.mark.parametrize("check", [check_alpha, check_dots, check_update])
def test_a_sum_that_overflows_float32_is_caught(check: Callable[[Case], None]) -> None:
    k = case(5, 300, torch.float32, scale=1e30)
    wrong = replace(
        REFERENCE,
        name="mutant",
        alpha=on_single_vectors("alpha", lambda v, w, out: alpha_in_float32(v * 1e30, w, out)),
        dots=on_single_vectors("dots", dots_with_the_square_in_float32),
        update=on_single_vectors("update", update_with_the_square_in_float32),
    )
    with force(REFERENCE):
        check(k.copy())
    with force(wrong), pytest.raises(AssertionError):
        check(k.copy())


@pytest.mark.parametrize(
    ("got", "want", "bound"),
    [([1.0, 2.0], [1.0, 2.1], 0.05), ([float("nan")], [1.0], 9.0), ([1.0], [float("nan")], 9.0), ([1.0], [1.0, 1.0], 9.0), ([], [], 9.0)],
    ids=["off", "nan", "nan-expected", "shape", "empty"],
)
def test_the_comparison_itself_can_fail(got: list[float], want: list[float], bound: float) -> None:
    with pytest.raises(AssertionError):
        assert_close(got, want, bound)


def test_the_comparison_refuses_an_infinite_bound() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        assert_close([1.0], [2.0], float("inf"))


def test_the_comparison_names_the_worst_entry() -> None:
    with pytest.raises(AssertionError, match=r"1 of 3 entries off, worst at \(2,\): got 3.0, expected 2.0.* = 10 x the bound 0.1"):
        assert_close([1.0, 2.0, 3.0], [1.0, 2.0, 2.0], 0.1)
