"""Sharing of bytes between strided layouts, against sets of addresses."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastsharp.ops._overlap import Layout, layout, overlaps

DIMENSIONS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=3)


def addresses(start: int, item: int, dimensions: list[tuple[int, int]]) -> set[int]:
    """Every byte of a tensor with these (size, stride in elements)."""
    starts = {start}
    for size, stride in dimensions:
        starts = {s + k * stride * item for s in starts for k in range(size)}
    return {s + b for s in starts for b in range(item)}


def build(start: int, item: int, dimensions: list[tuple[int, int]]) -> Layout:
    return layout(start, item, tuple(size for size, _ in dimensions), tuple(stride for _, stride in dimensions))


@settings(max_examples=400, deadline=None)
@given(
    x=st.integers(0, 60),
    y=st.integers(0, 60),
    a=DIMENSIONS,
    b=DIMENSIONS,
    items=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 4])),
)
def test_overlap_is_that_of_the_sets_of_bytes(
    x: int, y: int, a: list[tuple[int, int]], b: list[tuple[int, int]], items: tuple[int, int]
) -> None:
    want = bool(addresses(x, items[0], a) & addresses(y, items[1], b))
    assert overlaps(build(x, items[0], a), build(y, items[1], b)) == want


def test_a_column_beside_a_block_does_not_meet_it() -> None:
    block, column = layout(0, 8, (10**6, 20), (21, 1)), layout(160, 8, (10**6,), (21,))
    assert not overlaps(block, layout(8 * 20, 8, (1,), (1,)))
    assert overlaps(block, layout(8 * 22, 8, (1,), (1,)))
    assert column.run == 8 and block.run == 160


def test_contiguous_dimensions_are_one_run() -> None:
    assert layout(8, 4, (3, 5, 2), (10, 2, 1)) == Layout(8, 120, (), ())
    assert layout(8, 4, (3, 1, 2), (7, 99, 1)) == Layout(8, 8, (3,), (28,))
