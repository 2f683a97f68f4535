"""Products of fully connected nets against the dense float64 Hessian of autograd, for odd widths, several nets and vectors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsharp.errors import DtypeError, InputError, ShapeError
from fastsharp.ops import _registry, force, mlp

WIDTHS = [(3, 17, 5, 2), (2, 19, 7, 9, 4), (5, 3), (1, 1, 1), (67, 4, 3)]
CPU = torch.device("cpu")
LEVELS = ("scalar", "avx2", "avx512")


def net_of(widths: tuple[int, ...], activation: str, loss: str, biases: bool = True) -> mlp.Net:
    weights, offsets, at = [], [], 0
    for i, o in pairwise(widths):
        weights.append(at)
        at += i * o
        offsets.append(at if biases else None)
        at += o if biases else 0
    return mlp.Net(widths, tuple(weights), tuple(offsets), activation, loss, at)


class Problem:
    """E nets with data of their own, float64 masters of everything."""

    def __init__(self, net: mlp.Net, E: int, N: int) -> None:
        g = torch.Generator().manual_seed(N + net.n)
        self.net = net
        self.theta = torch.randn(E, net.n, generator=g, dtype=torch.float64).float().double() * 0.4
        self.x = torch.randn(E, N, net.widths[0], generator=g, dtype=torch.float64).float().double()
        if net.loss == "cross_entropy":
            self.target = torch.randint(0, net.widths[-1], (E, N), generator=g)
        else:
            self.target = torch.randn(E, N, net.widths[-1], generator=g, dtype=torch.float64).float().double()
        self.weight = torch.rand(E, N, generator=g, dtype=torch.float64).float().double() / N

    def prepared(self, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> mlp.Prepared:
        target = self.target.to(device) if self.net.loss == "cross_entropy" else self.target.to(device, dtype)
        return mlp.prepare(self.net, *(t.to(device, dtype) for t in (self.theta, self.x)), target, self.weight.to(device, dtype))

    def output(self, e: int, theta: Tensor) -> Tensor:
        """z_L of net e, by torch's own operations."""
        phi = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu, "identity": lambda z: z}
        phi["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")
        a = self.x[e].to(theta.dtype)
        for l in range(1, self.net.layers + 1):  # noqa: E741
            a = F.linear(a, self.net.weight(theta, l), self.net.bias(theta, l))
            a = phi[self.net.activation](a) if l < self.net.layers else a
        return a

    def loss_of(self, e: int, z: Tensor) -> Tensor:
        if self.net.loss == "cross_entropy":
            losses = F.cross_entropy(z, self.target[e], reduction="none")
        else:
            losses = (z - self.target[e].to(z.dtype)).square().sum(1) / 2
        return (self.weight[e].to(z.dtype) * losses).sum()

    def loss(self, e: int, theta: Tensor) -> Tensor:
        return self.loss_of(e, self.output(e, theta))

    @cache  # noqa: B019
    def dense(self, e: int, gauss: bool) -> Tensor:
        theta = self.theta[e]
        if not gauss:
            return torch.autograd.functional.hessian(lambda t: self.loss(e, t), theta)
        J = torch.autograd.functional.jacobian(lambda t: self.output(e, t), theta)  # (N, C, n)
        z = self.output(e, theta)
        H = torch.autograd.functional.hessian(lambda v: self.loss_of(e, v.view_as(z)), z.flatten())
        J = J.flatten(0, 1)
        return J.T @ H @ J


@cache
def problem(widths: tuple[int, ...], activation: str, loss: str) -> Problem:
    return Problem(net_of(widths, activation, loss, biases=widths[0] != 2), E=2, N=37)


def product(prepared: mlp.Prepared, V: Tensor, member: Tensor | None = None, gauss: bool = False) -> Tensor:
    there = V.to(prepared.primal.theta.device)
    return prepared.product(there, out=torch.full_like(there, float("nan")), member=member, gauss=gauss).to(V.device)


@pytest.fixture(params=[*LEVELS, "reference", "cuda"])
def kernel(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the nets lie, for every instruction set of this CPU, the reference, and the CUDA kernel."""
    if request.param == "reference":
        with force("reference"):
            yield CPU
        return
    if request.param == "cuda":
        found = _registry.available()["cuda"]
        if isinstance(found, str):
            pytest.skip(found)
        yield torch.device("cuda")
        return
    module = _registry.native("cpu")
    if isinstance(module, str):
        pytest.skip(module)
    before = module.simd()
    if not module.set_simd(request.param):
        pytest.skip(f"{request.param} is not on this CPU")
    try:
        yield CPU
    finally:
        module.set_simd(before)


@pytest.mark.parametrize("loss", mlp.LOSSES)
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_against_the_dense_matrix(activation: str, loss: str, kernel: torch.device) -> None:
    for widths in WIDTHS:
        p = problem(widths, activation, loss)
        member = torch.tensor([1, 0, 1])
        V = torch.randn(3, p.net.n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for gauss in (False, True):
            found = product(p.prepared(device=kernel), V, member, gauss)
            for r, e in enumerate(member.tolist()):
                A = p.dense(e, gauss)
                assert float((found[r] - A @ V[r]).norm()) <= 1e-13 * float(A.norm() * V[r].norm())


@pytest.mark.parametrize("N", [1, 15, 64, 65, 500])
def test_every_cut_into_tiles_and_slabs(N: int, kernel: torch.device) -> None:
    p = Problem(net_of((3, 19, 6, 4), "gelu", "cross_entropy"), E=1, N=N)
    V = torch.randn(2, p.net.n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    A = p.dense(0, False)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        found = product(p.prepared(dtype, kernel), V.to(dtype)).double()
        assert float((found - V.to(dtype).double() @ A).norm()) <= tolerance * float(A.norm() * V.norm())


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_float32_error_is_at_most_twice_that_of_torch(activation: str, kernel: torch.device) -> None:
    p = Problem(net_of((2, 100, 100, 2), activation, "cross_entropy"), E=1, N=1000)
    V = torch.randn(4, p.net.n, generator=torch.Generator().manual_seed(3))
    exact = product(p.prepared(), V.double())
    ours = product(p.prepared(torch.float32, kernel), V).double()
    theta = p.theta[0].float().requires_grad_()
    (g,) = torch.autograd.grad(p.loss(0, theta), theta, create_graph=True)
    theirs = torch.stack([torch.autograd.grad(g, theta, v, retain_graph=True)[0] for v in V]).double()
    assert float((ours - exact).norm()) <= 2 * float((theirs - exact).norm())


def test_bits_depend_neither_on_threads_nor_on_other_rows() -> None:
    p = Problem(net_of((3, 40, 21, 3), "tanh", "cross_entropy"), E=3, N=700)
    prepared = p.prepared(torch.float32)
    member = torch.tensor([2, 0, 1, 1, 0])
    V = torch.randn(5, p.net.n, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(product(prepared, V, member))
    finally:
        torch.set_num_threads(before)
    if _registry.choose(torch.device("cpu")).name == "cpu":
        assert all(torch.equal(r, results[0]) for r in results)
        for r in range(5):
            assert torch.equal(product(prepared, V[r : r + 1], member[r : r + 1])[0], results[0][r])


def test_bits_of_a_row_on_a_gpu_are_its_own() -> None:
    found = _registry.available()["cuda"]
    if isinstance(found, str):
        pytest.skip(found)
    p = Problem(net_of((3, 40, 21, 3), "tanh", "cross_entropy"), E=3, N=700)
    prepared = p.prepared(torch.float32, torch.device("cuda"))
    member = torch.tensor([2, 0, 1, 1, 0])
    V = torch.randn(5, p.net.n, generator=torch.Generator().manual_seed(4))
    result = product(prepared, V, member)
    assert torch.equal(product(prepared, V, member), result)
    for r in range(5):
        assert torch.equal(product(prepared, V[r : r + 1], member[r : r + 1])[0], result[r])


def test_gradient_and_value_are_those_of_the_loss() -> None:
    for loss in mlp.LOSSES:
        p = Problem(net_of((3, 9, 4), "gelu_tanh", loss), E=2, N=11)
        primal = p.prepared().primal
        for e in range(2):
            theta = p.theta[e].clone().requires_grad_()
            value = p.loss(e, theta)
            (g,) = torch.autograd.grad(value, theta)
            assert float(primal.value[e]) == pytest.approx(float(value.detach()), rel=1e-13)
            torch.testing.assert_close(primal.gradient()[e], g, rtol=1e-12, atol=1e-14)


def test_ignored_samples_have_no_part() -> None:
    p = Problem(net_of((3, 9, 4), "relu", "cross_entropy"), E=1, N=30)
    p.weight[0, 10:] = 0.0
    q = Problem(p.net, E=1, N=30)
    q.theta, q.x, q.target, q.weight = p.theta, p.x[:, :10], p.target[:, :10], p.weight[:, :10]
    p.target[0, 12] = -100
    V = torch.randn(1, p.net.n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(product(p.prepared(), V), product(q.prepared(), V), rtol=1e-12, atol=1e-15)


def test_rows_may_lie_apart_and_the_weights_are_a_copy() -> None:
    p = Problem(net_of((3, 9, 4), "relu", "squared"), E=1, N=30)
    V = torch.randn(2, p.net.n + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))[:, : p.net.n]
    wide = torch.full((2, p.net.n + 3), 7.0, dtype=torch.float64)
    prepared = p.prepared()
    expected = product(prepared, V.contiguous())
    p.theta.zero_()
    prepared.product(V, out=wide[:, : p.net.n])
    assert torch.equal(wide[:, : p.net.n], expected) and bool((wide[:, p.net.n :] == 7.0).all())


def test_wrong_arguments_are_named() -> None:
    p = Problem(net_of((3, 9, 4), "relu", "cross_entropy"), E=2, N=6)
    prepared, V = p.prepared(), torch.zeros(2, p.net.n, dtype=torch.float64)
    with pytest.raises(DtypeError, match=r"mlp_product: V is torch\.float32"):
        product(prepared, V.float())
    with pytest.raises(ShapeError, match=r"out has shape \(1, 76\)"):
        prepared.product(V, out=V.new_empty(1, p.net.n))
    with pytest.raises(ShapeError, match="V has 3 rows for 2 nets"):
        product(prepared, V.new_zeros(3, p.net.n))
    with pytest.raises(InputError, match="member holds 0 to 2, expected 0 to 1"):
        product(prepared, V, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="out overlaps V"):
        prepared.product(V, out=V)
    p.target[1, 3] = 4
    with pytest.raises(InputError, match="target holds classes 0 to 4, expected 0 to 3"):
        p.prepared()
    with pytest.raises(ShapeError, match="must fill a flat vector"):
        mlp.prepare(mlp.Net((3, 4), (1,), (None,), "relu", "squared", 13), *(4 * [torch.zeros(1, 13)]))


def test_a_planted_fault_is_seen() -> None:
    """A product without the second derivative of the activation passes no comparison with the dense matrix."""
    p = Problem(net_of((3, 17, 5, 2), "tanh", "cross_entropy"), E=1, N=37)
    prepared = p.prepared()
    for bend in prepared.primal.bend:
        bend.zero_()
    with force("reference"):
        made, _ = _registry.choose(torch.device("cpu")).mlp(prepared.primal)
    V = torch.randn(1, p.net.n, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = product(mlp.Prepared(prepared.primal, made, 0), V)
    assert float((found - V @ p.dense(0, False)).norm()) > 1e-3 * float(found.norm())
