"""Parts of a curvature matrix against the same parts of the dense Hessian."""

from __future__ import annotations

import pytest
import torch

import fastsharp
from fastsharp.composite import name_of
from fastsharp.curvature.restriction import Submatrix
from fastsharp.errors import ArgumentTypeError, InputError, ParamError, ShapeError, StaleOperatorError
from fastsharp.operator import CountingOperator, DenseOperator
from fastsharp.params import ParamLayout
from tests.cases import net
from tests.curvature.checks import DTYPES, PRODUCT_GATE, exact, hessian, product_error
from tests.unchanged import check_message, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
NETS = ("mlp_tanh", "mlp_relu", "cnn_batchnorm_eval", "cnn_residual", "vit_block", "hf_style", "tied_language_model")


def module(name: str) -> str:
    return name.rpartition(".")[0]


def places(layout: ParamLayout, of: str) -> torch.Tensor:
    """Coordinates of the parameters of a module."""
    bounds = zip(layout.names, layout.offsets, layout.offsets[1:], strict=False)
    return torch.cat([torch.arange(a, b) for name, a, b in bounds if module(name) == of])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_blocks_are_those_of_the_dense_hessian(name, dtype):
    n, D = net(name, dtype), exact(name)
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    modules = list(dict.fromkeys(module(p) for p in H.layout.names))
    only = torch.zeros_like(D)
    for m in modules:
        i = places(H.layout, m)
        only[i[:, None], i] = D[i][:, i]
    blocks = fastsharp.block_diagonal(H)
    assert list(blocks.blocks) == modules and product_error(blocks, only) <= PRODUCT_GATE[dtype]
    one = fastsharp.restrict(H, f"{modules[0]}.*")
    i, j = places(H.layout, modules[0]), places(H.layout, modules[-1])
    assert product_error(one, D[i][:, i]) <= PRODUCT_GATE[dtype]
    assert product_error(blocks.block(modules[0]), D[i][:, i]) <= PRODUCT_GATE[dtype]
    assert one.layout == blocks.block(modules[0]).layout and set(map(module, one.layout.names)) == {modules[0]}
    across = fastsharp.Coupling(H, f"{modules[0]}.*", f"{modules[-1]}.*")
    both = torch.cat([i, j])
    want = torch.zeros_like(D)
    want[i[:, None], j], want[j[:, None], i] = D[i][:, j], D[j][:, i]
    # rounding is that of products of the whole, of which the block may be a small part
    assert product_error(across, want[both][:, both]) <= PRODUCT_GATE[dtype] * float(D.norm() / D[i][:, j].norm())
    assert product_error(blocks, D) > 1e-3  # what a block view leaves out is there


@pytest.mark.parametrize("order", [("0.*", "4.*"), ("4.*", "0.*"), (["0.bias", "4.weight"], "2.*")], ids=str)
def test_singular_values_of_a_block_are_eigenvalues_of_its_symmetric_form(order):
    H, D = hessian("mlp_tanh"), exact("mlp_tanh")
    C = fastsharp.Coupling(H, *order)
    rows, cols = (torch.cat([torch.arange(131)[a:b] for a, b in pieces(H.layout, part.names)]) for part in (C.row_layout, C.col_layout))
    B = D[rows][:, cols]
    eye = torch.eye(len(cols), dtype=torch.float64)
    assert float((C.matvec(eye).T - B).norm()) <= 1e-12 * float(D.norm())
    assert float((C.rmatvec(torch.eye(len(rows), dtype=torch.float64)).T - B.T).norm()) <= 1e-12 * float(D.norm())
    assert C.matvec(eye[0]).shape == (len(rows),)
    result = fastsharp.lanczos(C, k=3, tol=1e-9)
    S = torch.linalg.svdvals(B)
    assert float((result.eigenvalues - S[:3]).abs().max()) <= 1e-9 * float(S[0])
    U, V = C.split(result.eigenvectors)
    assert float((U.norm(dim=1) - 1).abs().max()) <= 1e-6 and float((V.norm(dim=1) - 1).abs().max()) <= 1e-6
    assert float((C.matvec(V) - result.eigenvalues[:, None] * U).norm()) <= 1e-6 * float(S[0])
    assert abs(float(fastsharp.frobenius(C)) / 2**0.5 - float(B.norm())) <= 0.02 * float(B.norm())


def pieces(layout: ParamLayout, names: tuple[str, ...]) -> list[tuple[int, int]]:
    where = dict(zip(layout.names, zip(layout.offsets, layout.offsets[1:], strict=False), strict=True))
    return [where[name] for name in names]


def test_a_restricted_hessian_is_linearised_over_its_own_parameters_and_shares_the_data():
    H = hessian("mlp_tanh")
    one = fastsharp.restrict(H, ["2.weight", "0.bias"])
    assert isinstance(one, fastsharp.Hessian) and one.layout.names == ("0.bias", "2.weight") and one.n == 8 + 48
    assert one.objective.batches is H.objective.batches
    assert fastsharp.restrict(H, "*") is H
    with unchanged(H.objective.model):
        result = fastsharp.lanczos(one, k=2)
    assert result.settings["preflight"]["level"] == "fast" and H.preflight["level"] == "off"
    assert result.provenance["params"] == ("0.bias", "2.weight")
    same = fastsharp.lanczos(one.objective.model, list(net("mlp_tanh").batches), params=["0.bias", "2.weight"], k=2)
    assert torch.allclose(result.eigenvalues, same.eigenvalues, rtol=1e-9)


def test_both_watch_the_weights_and_each_takes_new_ones():
    n = net("mlp_tanh")
    H = fastsharp.Hessian(n.model, n.batches, n.loss_fn)
    one, v = fastsharp.restrict(H, "0.*"), torch.randn(56, dtype=torch.float64)
    old = one @ v
    with torch.no_grad():
        n.model[4].weight.mul_(1.5)  # none of its own: its matrix depends on it all the same
    for operator in (H, one):
        with pytest.raises(StaleOperatorError):
            operator.check_unchanged()
    new = one.refresh() @ v
    fresh = fastsharp.Hessian(n.model, n.batches, n.loss_fn, params="0.*") @ v
    assert float((new - fresh).norm()) <= 1e-13 * float(fresh.norm()) < float((new - old).norm())
    with pytest.raises(StaleOperatorError):
        H.check_unchanged()


def test_a_sum_is_restricted_part_by_part_and_anything_else_by_its_products():
    H, D = hessian("mlp_tanh"), exact("mlp_tanh")
    d = torch.rand(131, dtype=torch.float64) + 0.5
    made = H + DenseOperator(torch.diag(d)) + fastsharp.identity_like(H)
    one = fastsharp.restrict(made, "2.*")
    i = places(H.layout, "2")
    want = (D + torch.diag(d) + torch.eye(131, dtype=torch.float64))[i][:, i]
    assert product_error(one, want) <= 1e-10
    assert [type(part) for part in one.parts] == [fastsharp.Hessian, Submatrix, Submatrix]
    scaled = fastsharp.restrict(fastsharp.Preconditioned(H, d), "2.*")
    assert product_error(scaled, (D / torch.outer(d.sqrt(), d.sqrt()))[i][:, i]) <= 1e-10
    assert name_of(scaled) == "preconditioned (hessian), restricted" and scaled.facts["params"] == ["2.weight", "2.bias"]


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_blocks_of_ones_own(rows):
    H, D = hessian("mlp_tanh"), exact("mlp_tanh")
    blocks = fastsharp.block_diagonal(H, {"ends": ["0.*", "4.*"], "middle": "2.*"})
    i = torch.cat([places(H.layout, "0"), places(H.layout, "4")])
    j = places(H.layout, "2")
    want = torch.zeros_like(D)
    want[i[:, None], i], want[j[:, None], j] = D[i][:, i], D[j][:, j]
    assert product_error(blocks, want, columns=rows) <= 1e-10
    assert product_error(fastsharp.block_diagonal(H, "parameter"), want) > 1e-3


def test_products_of_blocks_share_passes():
    counting = CountingOperator(hessian("mlp_tanh"))
    fastsharp.block_diagonal(counting) @ torch.ones(131, dtype=torch.float64)
    assert counting.count == 3


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda H: fastsharp.restrict(H, "5.*"), ParamError, ("restrict", "5.*", "0.weight")),
        (lambda H: fastsharp.restrict(H, []), ArgumentTypeError, ("restrict", "[]")),
        (lambda H: fastsharp.restrict(H, [3]), ArgumentTypeError, ("[3]",)),
        (lambda H: fastsharp.restrict(H.objective.model, "0.*"), ArgumentTypeError, ("Sequential",)),
        (lambda H: fastsharp.restrict(DenseOperator(torch.eye(3)), "0.*"), InputError, ("DenseOperator", "plain matrix")),
        (lambda H: fastsharp.block_diagonal(H, "layer"), InputError, ("'layer'", "'module'")),
        (lambda H: fastsharp.block_diagonal(H, {"a": "0.*", "b": ["0.bias", "2.*", "4.*"]}), InputError, ("0.bias", "'a'", "'b'")),
        (lambda H: fastsharp.block_diagonal(H, {"a": "0.*"}), InputError, ("2.weight", "no block")),
        (lambda H: fastsharp.block_diagonal(H).block("7"), InputError, ("'7'", "0, 2, 4")),
        (lambda H: fastsharp.Coupling(H, "0.*", "*"), InputError, ("0.weight", "rows and cols")),
        (lambda H: fastsharp.Coupling(H, "0.*", "2.*").matvec(torch.ones(3, dtype=torch.float64)), ShapeError, ("(3,)", "(54,)")),
        (lambda H: fastsharp.Coupling(H, "0.*", "2.*").rmatvec([1.0]), ArgumentTypeError, ("list",)),
        (lambda H: fastsharp.Coupling(H, "0.*", "2.*").split(torch.ones(3, dtype=torch.float64)), ShapeError, ("(3,)", "(110,)")),
    ],
)
def test_what_is_no_part_is_refused_by_name(make, error, words):
    with pytest.raises(error) as caught:
        make(hessian("mlp_tanh"))
    check_message(caught.value, *words)
