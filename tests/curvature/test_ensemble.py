"""Ensembles: row by row the products of the members' own operators, and what has to be alike for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.batches import Batches
from fastsharp.curvature import GGN, Hessian
from fastsharp.curvature.batch_products import Unavailable
from fastsharp.curvature.ensemble import GenericEnsemble, MlpEnsemble
from fastsharp.curvature.stack_gradient import StackGradient
from fastsharp.errors import InputError, ShapeError, StaleOperatorError

F64 = torch.float64
LOSSES = [None, F.mse_loss, nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=F64))]
IDS = ["ce", "mse", "mse, sum", "ce, weights"]


class Own(nn.Module):
    """A net whose class says nothing of what it computes."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def members(kind: Any, E: int = 4, loss: Any = None, widths: tuple[int, int, int] = (3, 11, 4), own: bool = False) -> list[Any]:
    found = []
    for e in range(E):
        torch.manual_seed(e)
        model: nn.Module = nn.Sequential(nn.Linear(widths[0], widths[1]), nn.GELU(), nn.Linear(widths[1], widths[2])).double()
        labels = loss is None or isinstance(loss, nn.CrossEntropyLoss)
        y = torch.randint(0, widths[2], (17,)) if labels else torch.randn(17, widths[2], dtype=F64)
        found.append(kind(Own(model) if own else model, [(torch.randn(17, widths[0], dtype=F64), y)], loss, backend="autograd"))
    return found


def together(operators: list[Any]) -> MlpEnsemble:
    """The ensemble of what the operators were built from."""
    batches = [o.objective.batches for o in operators]
    return MlpEnsemble(operators[0], [o.objective.model for o in operators], batches)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("ensemble", [GenericEnsemble, together])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_rows_are_the_members_own_products(loss: Any, own: bool, ensemble: Any, kind: Any) -> None:
    operators = members(kind, loss=loss, own=own)
    A = ensemble(operators)
    V = torch.randn(4, A.n, dtype=F64, generator=torch.Generator().manual_seed(9))
    expected = torch.cat([o.apply(v[None]) for o, v in zip(operators, V, strict=True)])
    torch.testing.assert_close(A.apply(V), expected, rtol=1e-11, atol=1e-13)
    some = torch.tensor([3, 1, 3])
    expected = torch.cat([operators[e].apply(V[r][None]) for r, e in enumerate(some.tolist())])
    torch.testing.assert_close(A.apply(V[:3], some), expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(A.member(3).apply(V[:2]), operators[3].apply(V[:2]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_what_the_kernel_is_compared_with_is_autograds(loss: Any, kind: Any) -> None:
    operators = members(kind, loss=loss)
    v = torch.randn(92, dtype=F64, generator=torch.Generator().manual_seed(9))
    product, gradient = StackGradient(together(operators).stack, slice(1, 3), 17).product(v, gauss=kind is GGN)
    torch.testing.assert_close(product, torch.cat([o.apply(v[None]) for o in operators[1:3]]), rtol=1e-11, atol=1e-13)
    for o, g in zip(operators[1:3], gradient, strict=True):
        with o.objective.quiet():
            value = o.objective.evaluate(0, o.objective.batches.first())
        share = value.scale / value.count if value.count else 1.0
        own = torch.autograd.grad(value.loss * share, list(o.objective.selection.params))
        torch.testing.assert_close(g, torch.cat([p.reshape(-1) for p in own]), rtol=1e-11, atol=1e-13)


def test_what_does_not_fit_names_the_member() -> None:
    with pytest.raises(InputError, match="no members"):
        GenericEnsemble([])
    with pytest.raises(InputError, match="member 4 of the ensemble"):
        GenericEnsemble([*members(Hessian), *members(Hessian, 1, widths=(3, 5, 4))])
    with pytest.raises(Unavailable, match="smooth_l1_loss is no linear layer"):
        together(members(Hessian, loss=nn.SmoothL1Loss()))
    A = together(members(Hessian))
    with pytest.raises(ShapeError, match=r"expected \(4, 92\)"):
        A.apply(torch.zeros(3, 92, dtype=F64))
    with pytest.raises(InputError, match="member holds 0 to 4"):
        A.apply(torch.zeros(2, 92, dtype=F64), torch.tensor([0, 4]))


def scaled(module: nn.Module) -> None:
    module[0].register_forward_hook(lambda m, args, out: 2 * out)


def softer(module: nn.Module) -> None:
    module[1] = nn.GELU("tanh")


def other_layer(module: nn.Module) -> None:
    module[1] = nn.Tanh()


def without_bias(module: nn.Module) -> None:
    module[2].bias = None


def tied(module: nn.Module) -> None:
    module[2].bias = nn.Parameter(module[0].bias[:4].clone())
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())
    module[0].register_parameter("again", module[0].weight)


def frozen(module: nn.Module) -> None:
    module[0].weight.requires_grad_(False)


def buffered(module: nn.Module) -> None:
    module[0].register_buffer("seen", torch.zeros(1))


def patched(module: nn.Module) -> None:
    linear = module[0].forward
    module[0].forward = lambda x: 2 * linear(x)


def noisy(module: nn.Module) -> None:
    module[1] = nn.Dropout(0.5)


@pytest.mark.parametrize("change", [scaled, softer, other_layer, without_bias, tied, frozen, buffered, patched, noisy])
def test_a_member_that_computes_something_else_is_seen(change: Any) -> None:
    """Each of these would be a wrong matrix if the first member's structure were taken for granted."""
    operators = members(Hessian)
    models = [o.objective.model for o in operators]
    change(models[2])
    with pytest.raises(Unavailable, match="member 2"):
        MlpEnsemble(operators[0], models, [o.objective.batches for o in operators])


def test_data_of_another_kind_are_seen() -> None:
    operators = members(Hessian)
    models, batches = [o.objective.model for o in operators], [o.objective.batches for o in operators]
    x, y = batches[2].first()
    for other, reason in (
        ([(x[:9], y[:9])], "member 2: .* with 9 samples"),
        ([(x, y), (x, y)], "several batches"),
        ([(x * float("nan"), y)], "member 2: x"),
        ([(x, y + 4)], "member 2: labels"),
    ):
        data = [*batches[:2], Batches(other, x.device, 1 << 20), batches[3]]
        with pytest.raises(Unavailable, match=reason):
            MlpEnsemble(operators[0], models, data)
    with pytest.raises(Unavailable, match="several batches, or exceed"):
        MlpEnsemble(operators[0], models, [*batches[:3], Batches([(x, y)], x.device, 0)])


@pytest.mark.parametrize("how", ["mark", "data", "replaced", "batch"])
def test_a_changed_member_is_stale(how: str) -> None:
    operators = members(Hessian)
    A = together(operators)
    A.check_unchanged()
    model = operators[3].objective.model
    with torch.no_grad():
        if how == "mark":
            model[0].weight.add_(1.0)
        elif how == "data":
            model[0].weight.data.numpy()[0, 0] += 1.0
        elif how == "replaced":
            model[0].weight = nn.Parameter(model[0].weight.clone())
        else:
            A.batches[3].first()[0].add_(1.0)
    with pytest.raises(StaleOperatorError, match="member 3: "):
        A.check_unchanged()
