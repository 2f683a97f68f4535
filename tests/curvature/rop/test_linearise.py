"""Products of a linearised tape against dense autograd, and what they hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.curvature.rop import linearise
from fastsharp.curvature.rop.linearise import Linearised
from fastsharp.curvature.rop.tape import record
from fastsharp.guard import untouched
from tests.cases import NAMES, net
from tests.curvature.rop.engine import CPU, check, dense, gauss_newton, hessian, linearised, rows, same


def _evaluation(name: str) -> tuple[Callable[[], tuple[Any, torch.Tensor]], list[torch.Tensor], nn.Module]:
    n = net(name)

    def fn() -> tuple[Any, torch.Tensor]:
        seen: list[Any] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(n.model(*args, **kwargs))
            return seen[-1]

        loss = n.objective(call, n.whole)
        return (seen[0]["logits"] if isinstance(seen[0], dict) else seen[0]), loss

    return fn, [p for p in n.model.parameters() if p.requires_grad], n.model


@pytest.mark.parametrize("name", NAMES)
def test_hessian_by_rules_and_by_islands_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, params, model = _evaluation(name)
    lin = linearised(fn, params, model)
    H = hessian(fn, params)
    same(dense(lin, params), H)
    monkeypatch.setattr(linearise, "RULES", {})
    bare = linearised(fn, params, model)
    assert len(bare.islands) >= len(lin.islands)
    assert {row.by for row in bare.table()} == {"island"}
    few = torch.randn(2, H.shape[0], dtype=H.dtype)
    out = torch.zeros_like(few)
    bare.product(rows(few, params), rows(out, params))
    same(out, few @ H)


def _loss_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    n = net(name)
    if name == "hf_style":
        return lambda z: F.cross_entropy(z.flatten(0, 1), n.whole["labels"].flatten())
    return lambda z: n.objective(lambda *args: z, n.whole)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_residual", "vit_block", "tied_language_model", "regression", "hf_style", "lstm"])
def test_gauss_newton(name: str) -> None:
    fn, params, model = _evaluation(name)
    lin = linearised(fn, params, model)
    assert not lin.bypassed
    G = dense(lin, params, gauss=True)
    same(G, gauss_newton(fn, params, _loss_of(name)))
    assert float(torch.linalg.eigvalsh((G + G.T) / 2).min()) > -1e-12 * float(G.abs().max())
    same(dense(lin, params), hessian(fn, params))  # one tape serves both


def test_gauss_newton_of_outputs_that_the_loss_views_in_its_own_way() -> None:
    """The second derivative of the network is left out though the loss takes the memory of its last product under another shape."""
    layer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, params = torch.randn(5, 6, 3, dtype=torch.float64), list(layer.parameters())

    def fn() -> tuple[Any, torch.Tensor]:
        z = layer(x)
        return z, z.view(30, 2).exp().sum()

    lin = linearised(fn, params)
    assert not lin.bypassed
    same(dense(lin, params, gauss=True), gauss_newton(fn, params, lambda z: z.exp().sum()))


def test_a_loss_with_a_path_beside_the_output_says_so() -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def fn() -> tuple[Any, torch.Tensor]:
        z = (w @ w).tanh()
        return z, z.pow(2).sum() + w.pow(4).sum()

    assert linearised(fn, [w]).bypassed
    two = check(lambda: ([w.sin(), w.exp()], (w.sin() * w.exp()).sum()), [w])
    assert two.bypassed  # the loss computes its own sine: not what was handed out


def test_several_outputs_and_inputs() -> None:
    a, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def fn() -> tuple[Any, torch.Tensor]:
        z = {"first": (a * b).sin(), "second": (a + b).exp()}
        return z, (z["first"] * z["second"]).sum()

    lin = check(fn, [a, b])
    assert not lin.bypassed

    def joined(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.cat([(p * q).sin(), (p + q).exp()])

    def flat() -> tuple[Any, torch.Tensor]:
        return joined(a, b), torch.zeros(())

    same(dense(lin, [a, b], gauss=True), gauss_newton(flat, [a, b], lambda z: (z[:4] * z[4:]).sum()))


@pytest.mark.parametrize("b", [1, 3])
def test_products_add_into_strided_rows(b: int) -> None:
    """Rows of a wider buffer, at a scale: nothing else of the buffer is touched."""
    fn, params, model = _evaluation("mlp_tanh")
    lin, H = linearised(fn, params, model), hessian(fn, params)
    n = H.shape[0]
    wide, V = torch.randn(b, n + 5, dtype=H.dtype), torch.randn(n, b, dtype=H.dtype).T
    before, given = wide.clone(), V.clone()
    lin.product(rows(V, params), rows(wide[:, 2 : n + 2], params), scale=-0.25)
    want = before.clone()
    want[:, 2 : n + 2] -= 0.25 * (V @ H)
    same(wide, want)
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, n + 2 :], before[:, n + 2 :])
    assert torch.equal(V, given)


@pytest.mark.parametrize("gauss", [False, True])
def test_vectors_whose_tangents_are_large_go_a_few_at_a_time(gauss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, params, model = _evaluation("cnn_residual")
    n = sum(p.numel() for p in params)
    V, together = torch.randn(5, n, dtype=params[0].dtype), torch.ones(5, n, dtype=params[0].dtype)
    a_few = together.clone()
    linearised(fn, params, model).product(rows(V, params), rows(together, params), scale=2.0, gauss=gauss)
    widths: set[int] = set()
    forward = Linearised._forward

    def watched(self: Linearised, values: list[torch.Tensor | None], gauss: bool) -> list[Any]:
        widths.update(len(t) for t in values if t is not None)
        return forward(self, values, gauss)

    monkeypatch.setattr(Linearised, "_forward", watched)
    with untouched(model, CPU):
        tape = record(fn, params)
        largest = max(t.nbytes for call in tape.calls for t in call.outputs)
        monkeypatch.setattr(linearise, "TOGETHER", 2 * largest)
        Linearised(tape).product(rows(V, params), rows(a_few, params), scale=2.0, gauss=gauss)
    assert widths == {1, 2}
    same(a_few, together)


def test_scale_of_the_loss() -> None:
    fn, params, model = _evaluation("regression")
    lin = linearised(fn, params, model, scale=3.0)
    same(dense(lin, params), 3 * hessian(fn, params))
    same(dense(lin, params, gauss=True), 3 * gauss_newton(fn, params, _loss_of("regression")))
    plain = linearised(fn, params, model)
    assert lin.gradient is not None and plain.gradient is not None
    for g, h in zip(lin.gradient, plain.gradient, strict=True):
        assert g is not None and h is not None
        same(g, 3 * h, 1e-14)
    assert torch.equal(lin.loss, plain.loss)


def test_unused_parameters_and_constant_gradients() -> None:
    fn, params, model = _evaluation("unused")
    lin = linearised(fn, params, model)
    assert lin.unused == (2, 3)
    assert lin.gradient is not None
    assert [g is None for g in lin.gradient] == [i in lin.unused for i in range(len(params))]
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    flat = linearised(lambda: (None, 3 * w.sum()), [w])
    assert not dense(flat, [w]).any()  # H = 0


def test_a_parameter_is_the_loss() -> None:
    w = torch.randn((), dtype=torch.float64, requires_grad=True)
    lin = linearised(lambda: (None, w), [w])
    assert lin.gradient == [torch.ones_like(w)]
    assert not dense(lin, [w]).any()


def test_data_dependent_evaluations_have_each_their_own_tape() -> None:
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for steps in (1, 4):

        def fn(steps: int = steps) -> tuple[Any, torch.Tensor]:
            y = w
            for _ in range(steps):
                y = (y * w).sin()
            return None, y.sum()

        check(fn, [w])


def test_float32_is_as_exact_as_double_backward() -> None:
    n = net("vit_block", torch.float32)
    params, double = list(n.model.parameters()), net("vit_block")
    H = hessian(lambda: (None, double.objective(double.model, double.whole)), list(double.model.parameters()))
    by_autograd = hessian(lambda: (None, n.objective(n.model, n.whole)), params)
    by_tape = dense(linearised(lambda: (None, n.objective(n.model, n.whole)), params, n.model), params)
    error, allowed = float((by_tape.double() - H).norm()), float((by_autograd.double() - H).norm())
    assert error <= 3 * allowed


def test_bytes_held_and_ignored() -> None:
    w, x = torch.randn(50, 40, dtype=torch.float64, requires_grad=True), torch.randn(300, 50, dtype=torch.float64)
    lin = linearised(lambda: (None, (x @ w).tanh().pow(2).sum()), [w])
    known = {t.untyped_storage().data_ptr() for t in (w, x)}
    without, all_ = lin.nbytes(known), lin.nbytes(set())
    assert all_ - without in (x.nbytes, x.nbytes + w.nbytes)
    activation = 300 * 40 * 8
    assert activation <= without <= 8 * activation


class _Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps weak references to every tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def test_products_leave_nothing_behind() -> None:
    fn, params, model = _evaluation("vit_block")
    lin = linearised(fn, params, model)
    n = sum(p.numel() for p in params)
    V, out = torch.randn(2, n, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
    given, sums, held = rows(V, params), rows(out, params), lin.nbytes(set())
    for gauss in (False, True):
        with _Live() as live:
            lin.product(given, sums, gauss=gauss)
        assert live.made
        ours = {id(t) for t in (*given, *sums)}  # in-place calls return what they were given
        assert not [r for r in live.made if r() is not None and id(r()) not in ours]
    assert lin.nbytes(set()) == held


def test_operators_die_without_the_garbage_collector() -> None:
    """1,000 in a loop: neither they nor their parts wait for it."""
    fn, params, model = _evaluation("regression")
    gc.collect()
    gc.disable()
    try:
        with untouched(model, CPU):
            before = len(gc.get_objects())
            dead: list[weakref.ref[Linearised]] = []
            for _ in range(1000):
                lin = Linearised(record(fn, params))
                dead.append(weakref.ref(lin))
                del lin
            assert all(r() is None for r in dead)
            del dead
            assert len(gc.get_objects()) - before < 500  # half an object an operator
    finally:
        gc.enable()
