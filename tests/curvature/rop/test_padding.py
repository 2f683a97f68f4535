"""Rules of padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.curvature.rop.check import part_of
from tests.curvature.rop.engine import check, linearised
from tests.curvature.rop.subsets import Case, channels_last, check_case

aten = torch.ops.aten

CASES = [
    Case(aten.constant_pad_nd.default, lambda r: (r(2, 3, 4), [1, 2])),
    Case(aten.constant_pad_nd.default, lambda r: (r(2, 3, 4), [0, 2, -1, 1], 7.0)),
    Case(aten.constant_pad_nd.default, lambda r: (r(2, 3, 4), [-1, -1, -2, 0])),
    Case(aten.constant_pad_nd.default, lambda r: (r(2, 3, 4), [-3, 2])),
    Case(aten.constant_pad_nd.default, lambda r: (r(2, 3, 4), [0, 0])),
    Case(aten.constant_pad_nd.default, lambda r: (r(3).expand(2, 3), [1, 0, 0, 1])),
    Case(aten.constant_pad_nd.default, lambda r: (channels_last(r(2, 3, 4, 5)), [1, 2, 3, -1, 0, 1])),
    *(
        Case(getattr(aten, f"{kind}_pad{n}d").default, lambda r, n=n, lead=lead: (r(*lead, *(4, 5, 3)[:n]), [2, 1, 0, 2, 1, 1][: 2 * n]))
        for kind in ("reflection", "replication")
        for n in (1, 2, 3)
        for lead in ((2, 3), (3,))
    ),
    *(
        Case(getattr(aten, f"{kind}_pad2d").default, lambda r: (channels_last(r(2, 3, 4, 5)), [1, 2, 0, 3]))
        for kind in ("reflection", "replication")
    ),
    Case(aten.replication_pad2d.default, lambda r: (r(2, 3, 5, 5), [-1, 2, 1, -2])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_autograd(case: Case) -> None:
    check_case(case)


def test_padding_that_only_grows_has_a_view_for_its_adjoint() -> None:
    _, part = part_of(aten.constant_pad_nd.default, torch.randn(2, 3), [1, 2])
    g = torch.randn(3, 2, 6)
    (x_g,) = part.backward([g], None, ())
    assert x_g is not None and x_g.untyped_storage().data_ptr() == g.untyped_storage().data_ptr()


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_mode_is_covered(mode: str, dim: int) -> None:
    x = torch.randn(1, 1, *(3,) * dim, dtype=torch.float64, requires_grad=True)
    lin = linearised(lambda: (None, F.pad(x, (1, 2) * dim, mode=mode).pow(3).sum()), [x])
    assert lin.islands == ()


def test_circular() -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    check(lambda: (None, F.pad(x, (1, 2, 2, 0), mode="circular").pow(3).sum()), [x])
