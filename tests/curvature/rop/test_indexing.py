"""Rules of reads and writes by index."""

from __future__ import annotations

import pytest
import torch

from fastsharp.curvature.rop.rule import RULES, Call
from tests.curvature.rop.check import part_of
from tests.curvature.rop.subsets import Case, channels_last, check_case

aten = torch.ops.aten
i = torch.tensor

CASES = [
    Case(aten.embedding.default, lambda r: (r(5, 3), i([[0, 4, 4], [2, 2, 2]]))),
    Case(aten.embedding.default, lambda r: (r(5, 3), i([[0, 4, 4], [2, 2, 2]]), 4)),
    Case(aten.embedding.default, lambda r: (r(5, 3), i(2))),
    Case(aten.index_select.default, lambda r: (r(3, 5, 2), -2, i([4, 0, 4]))),
    Case(aten.index.Tensor, lambda r: (r(4, 3), [i([[0, -1], [3, 3]])])),
    Case(aten.index.Tensor, lambda r: (r(4, 3, 5), [None, i([2, 0, 2])])),
    Case(aten.index.Tensor, lambda r: (r(4, 3, 5), [i([[1], [3]]), i([0, 2, 0])])),
    Case(aten.index.Tensor, lambda r: (r(4, 3, 5), [i([1, 3]), None, i([0, 4])])),
    Case(aten.index.Tensor, lambda r: (r(2, 4, 3, 5), [None, i([[1, 3], [0, 0]]), None, i([0, 4])])),
    Case(aten.index.Tensor, lambda r: (r(2, 3), [i([[True, False, True], [False, True, True]])])),
    Case(aten.index.Tensor, lambda r: (channels_last(r(2, 3, 4, 4)), [None, None, i([3, 0]), i([1, 1])])),
    Case(aten.index_put.default, lambda r: (r(4, 3), [i([1, 3])], r(2, 3))),
    Case(aten.index_put.default, lambda r: (r(4, 3), [i([1, 1])], r(3), True)),
    Case(aten.index_put.default, lambda r: (r(4, 3, 5), [i([1, 3]), None, i([0, 4])], r(2, 3))),
    Case(aten.index_put.default, lambda r: (r(2, 3), [i([[True, False, True], [False, True, True]])], r(()))),
    Case(aten.gather.default, lambda r: (r(3, 4), -1, i([[0, 3], [1, 1]]))),
    Case(aten.scatter.src, lambda r: (r(3, 4), 1, i([[0, 3], [1, 2]]), r(2, 2))),
    Case(aten.scatter.value, lambda r: (r(3, 4), 0, i([[0, 2], [0, 1]]), 2.0)),
    Case(aten.scatter_add.default, lambda r: (r(3, 4), 1, i([[0, 0], [1, 2]]), r(2, 2))),
    Case(aten.index_add.default, lambda r: (r(3, 4), 1, i([2, 2]), r(3, 2))),
    Case(aten.masked_select.default, lambda r: (r(2, 3), i([[True, False, True], [False, True, True]]))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("b", [1, 3])
def test_embedding_adds_into_the_result(b: int) -> None:
    _, part = part_of(aten.embedding.default, torch.randn(5, 2), i([1, 1, 4]))
    into, g = torch.ones(b, 5, 2), torch.randn(b, 3, 2)
    assert part.backward([g], None, [into, None]) == [None, None]
    want = torch.ones(b, 5, 2)
    want[:, 1] += g[:, 0] + g[:, 1]
    want[:, 4] += g[:, 2]
    torch.testing.assert_close(into, want)


def test_what_is_not_defined_is_refused() -> None:
    x, src = torch.randn(3, 4), torch.randn(2, 4)
    twice = Call(aten.index_put.default, (x, [i([1, 1])], src), {}, x, lambda t: True)
    assert RULES[aten.index_put.default](twice) is None
    frequency = Call(aten.embedding.default, (x, i([1, 1]), -1, True), {}, x, lambda t: t is x)
    assert RULES[aten.embedding.default](frequency) is None
