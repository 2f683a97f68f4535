"""Ensembles: row by row the products of the members' own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.curvature import GGN, Hessian
from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.ensemble import GenericEnsemble, MlpEnsemble
from fastsharp.errors import InputError, ShapeError, StaleOperatorError


def members(kind: Any, E: int = 4, loss: Any = None, widths: tuple[int, int, int] = (3, 11, 4)) -> list[Any]:
    found = []
    for e in range(E):
        torch.manual_seed(e)
        model = nn.Sequential(nn.Linear(widths[0], widths[1]), nn.GELU(), nn.Linear(widths[1], widths[2])).double()
        y = torch.randint(0, widths[2], (17,)) if loss is None else torch.randn(17, widths[2], dtype=torch.float64)
        found.append(kind(model, [(torch.randn(17, widths[0], dtype=torch.float64), y)], loss, backend="autograd"))
    return found


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("ensemble", [GenericEnsemble, MlpEnsemble])
@pytest.mark.parametrize("loss", [None, F.mse_loss, nn.MSELoss(reduction="sum")], ids=["ce", "mse", "mse, sum"])
def test_rows_are_the_members_own_products(loss: Any, ensemble: Any, kind: Any) -> None:
    operators = members(kind, loss=loss)
    A = ensemble(operators)
    V = torch.randn(4, A.n, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = torch.cat([o.apply(v[None]) for o, v in zip(operators, V, strict=True)])
    torch.testing.assert_close(A.apply(V), expected, rtol=1e-11, atol=1e-13)
    some = torch.tensor([3, 1, 3])
    expected = torch.cat([operators[e].apply(V[r][None]) for r, e in enumerate(some.tolist())])
    torch.testing.assert_close(A.apply(V[:3], some), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("loss", [None, F.mse_loss, nn.MSELoss(reduction="sum")], ids=["ce", "mse", "mse, sum"])
def test_what_the_kernel_is_compared_with_is_autograds(loss: Any, kind: Any) -> None:
    operators = members(kind, loss=loss)
    v = torch.randn(92, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = torch.cat([o.apply(v[None]) for o in operators])
    torch.testing.assert_close(MlpEnsemble(operators).by_autograd(v), expected, rtol=1e-11, atol=1e-13)


def test_what_does_not_fit_names_the_member() -> None:
    with pytest.raises(InputError, match="no members"):
        GenericEnsemble([])
    with pytest.raises(InputError, match="member 4 of the ensemble"):
        GenericEnsemble([*members(Hessian), *members(Hessian, 1, widths=(3, 5, 4))])
    odd = members(Hessian)
    odd[2] = members(Hessian, 1, loss=nn.SmoothL1Loss())[0]
    with pytest.raises(Unavailable, match="member 2: smooth_l1_loss is no linear layer"):
        MlpEnsemble(odd)
    A = MlpEnsemble(members(Hessian))
    with pytest.raises(ShapeError, match=r"expected \(4, 92\)"):
        A.apply(torch.zeros(3, 92, dtype=torch.float64))
    with pytest.raises(InputError, match="member holds 0 to 4"):
        A.apply(torch.zeros(2, 92, dtype=torch.float64), torch.tensor([0, 4]))


def test_a_changed_member_is_stale() -> None:
    operators = members(Hessian)
    A = MlpEnsemble(operators)
    A.check_unchanged()
    with torch.no_grad():
        operators[3].objective.model[0].weight.add_(1.0)
    with pytest.raises(StaleOperatorError):
        A.check_unchanged()
