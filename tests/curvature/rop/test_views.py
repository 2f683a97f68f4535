"""Rules of views, copies and joins."""

from __future__ import annotations

import pytest
import torch

from fastsharp.curvature.rop.rule import RULES, Call
from tests.curvature.rop.check import part_of
from tests.curvature.rop.subsets import Case, channels_last, check_case

aten = torch.ops.aten

CASES = [
    Case(aten.view.default, lambda r: (r(3, 4), [2, 6])),
    Case(aten.view.default, lambda r: (r(()), [1, 1])),
    Case(aten.view.default, lambda r: (channels_last(r(2, 3, 1, 1)), [2, 3])),
    Case(aten._unsafe_view.default, lambda r: (r(3, 4), [12])),
    Case(aten.alias.default, lambda r: (r(3, 4),)),
    Case(aten.unsqueeze.default, lambda r: (r(3, 4), -1)),
    Case(aten.squeeze.default, lambda r: (r(1, 3, 1),)),
    Case(aten.squeeze.dim, lambda r: (r(1, 3, 1), -1)),
    Case(aten.squeeze.dims, lambda r: (r(1, 3, 1), [0, 2])),
    Case(aten.t.default, lambda r: (r(3, 4),)),
    Case(aten.t.default, lambda r: (r(3),)),
    Case(aten.transpose.int, lambda r: (r(3, 4, 2), -1, 0)),
    Case(aten.permute.default, lambda r: (r(3, 4, 2), [2, 0, -2])),
    Case(aten.expand.default, lambda r: (r(3, 1), [2, -1, 5])),
    Case(aten.expand.default, lambda r: (r(()), [2, 3])),
    Case(aten.select.int, lambda r: (r(3, 4, 2), -2, 3)),
    Case(aten.select.int, lambda r: (channels_last(r(2, 3, 4, 5)), 1, -1)),
    Case(aten.slice.Tensor, lambda r: (r(3, 7), -1, 1, 9, 2)),
    Case(aten.slice.Tensor, lambda r: (r(3, 7), 1, -3)),
    Case(aten.slice.Tensor, lambda r: (r(3, 7),)),
    Case(aten.slice.Tensor, lambda r: (r(7, 3).t(), 0, 1, 2)),
    Case(aten.diagonal.default, lambda r: (r(3, 4, 5), -1, 2, 0)),
    Case(aten.as_strided.default, lambda r: (r(3, 4), [2, 2], [4, 2], 1)),
    Case(aten.as_strided.default, lambda r: (r(4, 3).t(), [5, 3], [1, 2])),
    Case(aten.split.Tensor, lambda r: (r(3, 7), 3, -1)),
    Case(aten.unsafe_split.Tensor, lambda r: (r(3, 7), 3, -1)),
    Case(aten.unsafe_split_with_sizes.default, lambda r: (r(3, 7), [2, 5], 1)),
    Case(aten.split_with_sizes.default, lambda r: (channels_last(r(2, 6, 3, 3)), [1, 2, 3], 1)),
    Case(aten.unbind.int, lambda r: (r(3, 4, 2), 1)),
    Case(aten.cat.default, lambda r: ([r(2, 3), r(2, 1), r(2, 4)], -1)),
    Case(aten.cat.default, lambda r: ([channels_last(r(2, 3, 4, 4)), channels_last(r(2, 1, 4, 4))], 1)),
    Case(aten.stack.default, lambda r: ([r(2, 3), r(2, 3)], -1)),
    Case(aten.stack.default, lambda r: ([r(()), r(())],)),
    Case(aten.clone.default, lambda r: (r(3, 4),)),
    Case(aten.clone.default, lambda r: (r(4, 3).t(),), {"memory_format": torch.contiguous_format}),
    Case(aten.clone.default, lambda r: (r(2, 3, 4, 5),), {"memory_format": torch.channels_last}),
    Case(aten.clone.default, lambda r: (r(3, 1).expand(3, 4),)),
    Case(aten._to_copy.default, lambda r: (r(3, 4),), {"memory_format": torch.contiguous_format}),
    Case(aten.lift_fresh_copy.default, lambda r: (r(3),)),
    Case(aten.slice_scatter.default, lambda r: (r(5, 4), r(2, 4), 0, 1, 5, 2)),
    Case(aten.select_scatter.default, lambda r: (r(5, 4), r(5), -1, 2)),
    Case(aten.diagonal_scatter.default, lambda r: (r(3, 4), r(3))),
    Case(aten.tril.default, lambda r: (r(2, 3, 4), -1)),
    Case(aten.triu.default, lambda r: (r(3, 4), 1)),
    Case(aten.flip.default, lambda r: (r(2, 3, 4), [-1, 0])),
    Case(aten.roll.default, lambda r: (r(2, 5, 4), [2, -1], [1, 2])),
    Case(aten.roll.default, lambda r: (r(2, 5), [3])),
    Case(aten.cumsum.default, lambda r: (r(2, 5, 3), -2)),
    Case(aten.repeat.default, lambda r: (r(2, 3), [2, 1, 3])),
    Case(aten.repeat.default, lambda r: (r(()), [2])),
    Case(aten.unfold.default, lambda r: (r(2, 7), -1, 3, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


def test_tangent_of_a_view_is_a_view() -> None:
    x = torch.randn(4, 6)
    t = torch.randn(2, 4, 6)
    for func, args in (
        (aten.view.default, ([6, 4],)),
        (aten.permute.default, ([1, 0],)),
        (aten.slice.Tensor, (1, 2, 5)),
        (aten.split.Tensor, (2, 1)),
    ):
        _, part = part_of(func, x, *args)
        assert all(y.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for y in part.tangent([t])[0])


def test_window_adds_into_the_result() -> None:
    _, part = part_of(aten.select.int, torch.randn(3, 4), 0, 1)
    into, g = torch.ones(2, 3, 4), torch.randn(2, 4)
    assert part.backward([g], None, [into]) == [None]
    assert torch.equal(into[:, 1], 1 + g) and torch.equal(into[:, 0], torch.ones(2, 4))


def test_tangents_keep_channels_last() -> None:
    x = channels_last(torch.randn(2, 3, 4, 5))
    _, part = part_of(aten.cat.default, [x, x], 1)
    y_t = part.tangent([torch.randn(2, 2, 3, 4, 5)] * 2)[0][0]
    assert y_t is not None and y_t[0].is_contiguous(memory_format=torch.channels_last)


def test_as_strided_beyond_its_tensor_is_refused() -> None:
    x = torch.randn(4, 4)[:2]
    call = Call(aten.as_strided.default, (x, [8], [2]), {}, x.as_strided([8], [2]), lambda t: t is x)
    assert RULES[aten.as_strided.default](call) is None


def test_cast_casts_the_tangent() -> None:
    _, part = part_of(aten._to_copy.default, torch.randn(3), dtype=torch.float64)
    (y_t,), _ = part.tangent([torch.randn(2, 3)])
    (x_gt,) = part.backward([torch.randn(2, 3, dtype=torch.float64)], None, [None])
    assert y_t is not None and y_t.dtype == torch.float64
    assert x_gt is not None and x_gt.dtype == torch.float32


def test_copy_replaces_the_values() -> None:
    """aten.copy has no derivative in torch; that of copy_ is 0 for what was there and a broadcast for what is written."""
    _, part = part_of(aten.copy.default, torch.randn(3, 4), torch.randn(4))
    src_t, g = torch.randn(2, 4), torch.randn(2, 3, 4)
    (y_t,), _ = part.tangent([torch.randn(2, 3, 4), src_t])
    x_gt, src_gt = part.backward([g], None, [None, None])
    assert y_t is not None and torch.equal(y_t, src_t[:, None].expand(2, 3, 4))
    assert x_gt is None and src_gt is not None
    torch.testing.assert_close(src_gt, g.sum(1))
