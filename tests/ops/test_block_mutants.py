"""Deliberately wrong kernels for members, several vectors, half storage, combine and probes: the checkers must go red on every one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsharp.ops import _registry, force
from fastsharp.ops.reference import krylov as truth
from tests.ops import test_probes
from tests.ops.blocks import block, check_combine, check_dots, check_update

REFERENCE = _registry.available()["reference"]
assert isinstance(REFERENCE, _registry.Backend)
Removed, Row = truth.Removed, truth.Row


def dots_with_one_basis_for_all(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    truth.dots(V[:1].expand_as(V), w, removed, out)


def dots_with_one_vector_for_all(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    truth.dots(V, w, removed, out)
    out[:, 1:] = out[:, :1]


def dots_that_skip_the_last_member(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    truth.dots(V[:-1], w[:-1], removed and (removed[0][:-1], removed[1], removed[2]), out[:-1])


def dots_that_remove_rows_of_V(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    assert removed is not None
    truth.dots(V, w, (removed[0], V[:, -1], V[:, -2]), out)


def dots_with_coefficients_of_the_first_member(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    assert removed is not None
    truth.dots(V, w, (removed[0][:1].expand_as(removed[0]), removed[1], removed[2]), out)


def dots_with_rows_swapped(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    assert removed is not None and removed[2] is not None
    truth.dots(V, w, (removed[0], removed[2], removed[1]), out)


def dots_in_the_storage_type(V: Tensor, w: Tensor, removed: Removed | None, out: Tensor) -> None:
    truth.dots(V, w, removed, out)
    out[..., :-1] = torch.einsum("ejn,ebn->ebj", V.double(), w.to(V.dtype).double())


def update_with_one_set_of_coefficients(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    truth.update(V, w, c[:, :1].expand_as(c), row, out)


def update_rounded_between_rows(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    for r in range(V.shape[1]):
        truth.update(V[:, r : r + 1], w, c[..., r : r + 1], row, out)


def row_without_factor(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    assert row is not None
    truth.update(V, w, c, (row[0], torch.ones_like(row[1])), out)


def row_with_the_first_factor(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    assert row is not None
    truth.update(V, w, c, (row[0], row[1][:1].expand_as(row[1])), out)


def row_of_the_old_w(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    assert row is not None
    old = w[:, 0].double()
    truth.update(V, w, c, row, out)
    row[0].copy_(row[1][:, None] * old)


def row_truncated(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    """bfloat16 by dropping bits instead of rounding to nearest."""
    assert row is not None
    truth.update(V, w, c, row, out)
    x = (row[1][:, None] * w[:, 0].double()).float()
    row[0].copy_((x.view(torch.int32) & -65536).view(torch.float32))


def row_not_written(V: Tensor, w: Tensor, c: Tensor, row: Row | None, out: Tensor) -> None:
    truth.update(V, w, c, None, out)


def combine_in_float32(S: Tensor, V: Tensor, out: Tensor) -> None:
    out.copy_(S.float() @ V.float())


def combine_without_last_row(S: Tensor, V: Tensor, out: Tensor) -> None:
    truth.combine(S[:, :-1], V[:-1], out)


def combine_without_tail(S: Tensor, V: Tensor, out: Tensor) -> None:
    whole = V.shape[1] // 8 * 8
    truth.combine(S, V[:, :whole], out[:, :whole])


MUTANTS: list[tuple[str, Callable[..., None], str]] = [
    *[("dots", m, "both") for m in (dots_with_one_basis_for_all, dots_with_one_vector_for_all, dots_that_skip_the_last_member)],
    *[
        ("dots", m, "members")
        for m in (
            dots_that_remove_rows_of_V,
            dots_with_coefficients_of_the_first_member,
            dots_with_rows_swapped,
            dots_in_the_storage_type,
        )
    ],
    *[("update", m, "both") for m in (update_with_one_set_of_coefficients, update_rounded_between_rows)],
    *[("update", m, "members") for m in (row_without_factor, row_with_the_first_factor, row_of_the_old_w, row_truncated, row_not_written)],
    *[("combine", m, "") for m in (combine_in_float32, combine_without_last_row, combine_without_tail)],
]


def run(op: str, form: str) -> None:
    if op == "combine":
        S = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        check_combine(S, block("single", 1, 1, 5, 301, torch.float16).V[0])
        return
    k = block(form, 3, 3, 5, 301, torch.bfloat16)
    if op == "dots":
        check_dots(k, removal=form == "members")
    else:
        check_update(k, with_row=form == "members")


@pytest.mark.parametrize(("op", "mutant", "form"), MUTANTS, ids=[m.__name__ for _, m, _ in MUTANTS])
def test_a_wrong_kernel_is_caught(op: str, mutant: Callable[..., None], form: str) -> None:
    with force(REFERENCE):
        run(op, form)  # the truth passes on this very case
    changed: Any = {op: mutant}
    with force(replace(REFERENCE, name="mutant", **changed)), pytest.raises(AssertionError):
        run(op, form)


def swapped_pairs(kind: str, seed: int, first: int, out: Tensor) -> None:
    truth.probes(kind, seed, first, out)
    n = out.shape[1] // 4 * 4
    out[:, :n] = out[:, :n].reshape(-1, n // 4, 4).flip(2).reshape(-1, n)


def low_half_of_the_seed(kind: str, seed: int, first: int, out: Tensor) -> None:
    truth.probes(kind, seed & 2**32 - 1, first, out)


def low_half_of_the_row(kind: str, seed: int, first: int, out: Tensor) -> None:
    truth.probes(kind, seed, first & 2**32 - 1, out)


def rows_from_zero(kind: str, seed: int, first: int, out: Tensor) -> None:
    truth.probes(kind, seed, 0, out)


def other_sign(kind: str, seed: int, first: int, out: Tensor) -> None:
    truth.probes(kind, seed, first, out)
    out.neg_()


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("mutant", [swapped_pairs, low_half_of_the_seed, low_half_of_the_row, rows_from_zero, other_sign])
def test_a_wrong_generator_is_caught(mutant: Callable[..., None], kind: str) -> None:
    def check() -> None:
        test_probes.test_entries_are_those_of_the_definition(torch.device("cpu"), kind, torch.float32, 2**33 + 5, 2**32 + 5)

    with force(REFERENCE):
        check()
    with force(replace(REFERENCE, name="mutant", probes=mutant)), pytest.raises(AssertionError):
        check()
