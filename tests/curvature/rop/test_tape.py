"""The tape is the function that autograd differentiates, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

from fastsharp.curvature.rop.tape import Unrecorded
from tests.curvature.rop.engine import check, linearised

Body = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _case(body: Body) -> tuple[Callable[[], tuple[Any, torch.Tensor]], list[torch.Tensor]]:
    """A cubic loss of body(w, x); w is (4, 5), x a constant (4, 5)."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(4096, generator=generator, dtype=torch.float64)

    def fn() -> tuple[Any, torch.Tensor]:
        y = body(w, x.clone())
        return None, (y.pow(3) * weights[: y.numel()].view(y.shape)).sum() + (w * y.sum()).sum()

    return fn, [w]


def _in_place(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * x).add_(w.exp()).mul_(w).sub_(x, alpha=2).clamp_(-2, 2).tanh_()


def _overwritten_after_use(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    z = y * y.detach().clone() + y  # needs the y of now
    y.add_(w * 3)
    return z + y.sin()


def _slices_written(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(5, 4, dtype=w.dtype)
    for i in range(5):
        out[i] = (w[:, i] * x[:, i]).sin()
    out[1:3, ::2] += w[:2, :2] ** 2
    return out


def _view_of_a_written_base(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    row, block, transposed = y[1], y[1:3, 1:4], y.t()
    before = row + 1
    y.mul_(w)
    return before.sum() + row.exp().sum() * block + transposed[1:4, 1:3].t()


def _base_of_a_written_view(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    flat = y.view(-1)
    flat[3:9].mul_(w.reshape(-1)[3:9])
    y[:, 1].mul_(2)
    y.t()[1:4].exp_()
    return y * flat.view(4, 5)


def _diagonal_written(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.diagonal().copy_(w[0, :4] * w[1, :4])
    y[:2, :2] = w[2:, 3:]
    return y


def _siblings(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    a, b = y[:, :3], y[:, 3:]
    a.relu_()
    return torch.cat([a * w[:, :3], b * a[:, :2]], 1)


def _unsafe_siblings(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    a, b = (w * x)[:, :4].contiguous().unsafe_chunk(2, 1)
    a.add_(w[:, :2]).sigmoid_()
    return a * b


def _constant_written(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(x)
    y = w.exp() + mask
    mask.fill_(3.0)
    z = w.sin() - mask
    mask.zero_()
    return y * z


def _filled(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.masked_fill_(x > 1, 0.5)
    y[0].zero_()
    y[1, 2:] = 7.0
    y.index_put_((torch.tensor([2, 3]), torch.tensor([1, 0])), w[0, :2])
    return y


def _turned(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.t_().unsqueeze_(0)
    y.mul_(w.t())
    return y.squeeze_()


def _permuted_base(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x).t().contiguous().t()
    y.add_(w)
    y[2].mul_(2)
    return y


def _widened(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x).double()
    y.copy_(w[0])
    y += x[:1].float()
    return y * w


def _silu_chain(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu_(F.hardtanh_(F.silu(w * x, inplace=True), -1, 2), 0.2)


def _detached(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    with torch.no_grad():
        scale = y.abs().max() + w.sum()
    return y * scale + (y.round() - y).detach() + y.detach() * w + y.data * w


def _detached_in_place(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x).exp()
    y.detach_()
    return y * w


def _control_flow(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    for _ in range(1 + int(y.abs().sum().item()) % 2):
        y = y.sin() if bool(y.sum() > 0) else y.exp()
    return y[y > 0] if bool((y > 0).any()) else y


def _gradient_inside(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_()
    (g,) = torch.autograd.grad((w * x).sin().sum(), x, create_graph=True)
    return g * w


def _checkpointed(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = checkpoint(lambda a: (a * x).sin().exp(), w, use_reentrant=False)
    return y


def _mapped(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.func.vmap(lambda a, b: torch.tanh(a * b).cumsum(0))(w, x)
    return y


def _einsum(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,kj->ik", w, x).softmax(-1)


def _as_strided(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    part = y[1:]
    part.mul_(w[1:])
    return part.as_strided((2, 3), (5, 1), 6) * torch.as_strided(w, (2, 3), (7, 2), 1)


def _made_like(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    out, noise = torch.empty_like(y), torch.zeros_like(y).fill_(0.3)
    out.copy_(y)
    return out * noise.mul_(2) + y.new_ones(5) * w


def _several_outputs(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    values, order = (w * x).sort(dim=1)
    top, at = w.max(dim=0)
    return values * top + order + at


BODIES = [
    _in_place, _overwritten_after_use, _slices_written, _view_of_a_written_base, _base_of_a_written_view, _diagonal_written, _siblings,
    _unsafe_siblings, _constant_written, _filled, _turned, _permuted_base, _widened, _silu_chain, _detached, _detached_in_place,
    _control_flow, _gradient_inside, _checkpointed, _mapped, _einsum, _as_strided, _made_like, _several_outputs,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=[b.__name__.strip("_") for b in BODIES])
def test_is_what_autograd_differentiates(body: Body) -> None:
    check(*_case(body))


class _Doubled(torch.autograd.Function):
    """sin with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * g * ctx.saved_tensors[0].cos()


def _node_hooked(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.grad_fn.register_hook(lambda inputs, outputs: (2 * inputs[0], inputs[1]))  # type: ignore[union-attr]
    return y.sum()


def _node_prehooked(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.grad_fn.register_prehook(lambda outputs: (2 * outputs[0],))  # type: ignore[union-attr]
    return y.sum()


def _hooked(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.register_hook(lambda g: 2 * g)
    return y


def _without_grad(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    with torch.no_grad():
        y.mul_(2)
    return y


def _through_data(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.detach().mul_(2)
    return y


def _into_detached(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.detach().copy_(w.sin())
    return y


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda w, x: _Doubled.apply(w * x), "custom autograd.Function _Doubled"),
        (_hooked, "hook on the gradient of a tensor"),
        (_node_hooked, r"hook on a node of autograd's graph \(MulBackward0\)"),
        (_node_prehooked, r"hook on a node of autograd's graph \(MulBackward0\)"),
        (_without_grad, "autograd does not see"),
        (_through_data, "autograd does not see"),
        (_into_detached, "autograd does not see"),
        (lambda w, x: torch.fft.fft(w * x).abs(), "complex"),
        (lambda w, x: torch.rrelu(w * x, training=True), "random"),
    ],
)
def test_refusals(body: Body, reason: str) -> None:
    fn, params = _case(body)
    with pytest.raises(Unrecorded, match=reason):
        linearised(fn, params)


def test_a_graph_from_before_is_refused() -> None:
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    before = w.sin()
    with pytest.raises(Unrecorded, match="from before"):
        linearised(lambda: (None, (w * before).sum()), [w])


def test_frozen_parameters_are_constants() -> None:
    w, frozen, other = (torch.randn(3, 3, dtype=torch.float64, requires_grad=i != 1) for i in range(3))
    lin = check(lambda: (None, ((w @ frozen).tanh() @ other).pow(2).sum()), [w])
    assert lin.unused == ()
    assert sum(row.calls for row in lin.table()) == 5


def test_parameters_in_one_buffer() -> None:
    buffer = torch.randn(18, dtype=torch.float64)
    a, b = nn.Parameter(buffer[:9].view(3, 3)), nn.Parameter(buffer[9:].view(3, 3))
    check(lambda: (None, (a.t() @ b).tanh().sum()), [a, b])
    check(lambda: (None, (a.t() @ b).tanh().sum()), [b])
    twin = nn.Parameter(a.data)
    with pytest.raises(Unrecorded, match="same memory"):
        linearised(lambda: (None, (a @ twin).sum()), [a, twin])


def test_fixed_dropout_is_a_constant_mask() -> None:
    w, x = torch.randn(20, dtype=torch.float64, requires_grad=True), torch.randn(20, dtype=torch.float64)

    def fused() -> tuple[Any, torch.Tensor]:
        torch.manual_seed(5)
        return None, (torch.native_dropout(w * x, 0.4, True)[0] * w).sin().sum()

    def composed() -> tuple[Any, torch.Tensor]:
        torch.manual_seed(5)
        return None, (F.dropout(w * x, 0.4) * w).sin().sum()

    check(fused, [w])
    check(composed, [w])


def _no_hooks() -> None:
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks


def test_module_names_and_no_trace_of_the_hooks() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    lin = check(lambda: (None, model(x).pow(2).sum()), list(model.parameters()), model)
    assert {(row.op, row.module) for row in lin.table()} >= {("tanh.default", "1.0"), ("linear", "0"), ("linear", "1.1")}
    _no_hooks()

    def interrupted() -> tuple[Any, torch.Tensor]:
        model(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearised(interrupted, list(model.parameters()), model)
    _no_hooks()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_forward_hooks_are_part_of_the_function() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: output.sin())
    x = torch.randn(5, 3, dtype=torch.float64)
    check(lambda: (None, model(x).pow(2).sum()), list(model.parameters()), model)


@pytest.mark.parametrize("kind", ["full", "pre", "parameter", "scripted"])
def test_what_changes_gradients_is_refused_before_the_model_runs(kind: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if kind == "full":
        model[0].register_full_backward_hook(lambda *a: None)  # type: ignore[operator,union-attr]
    elif kind == "pre":
        model[1].register_full_backward_pre_hook(lambda *a: None)  # type: ignore[operator,union-attr]
    elif kind == "parameter":
        next(model.parameters()).register_hook(lambda g: g)
    else:
        model = nn.Sequential(torch.jit.trace(model[0], torch.randn(2, 3)))  # type: ignore[index]

    def fn() -> tuple[Any, torch.Tensor]:
        raise AssertionError("the model ran")

    with pytest.raises(Unrecorded, match=r"hook|scripted"):
        linearised(fn, list(model.parameters()), model)
    _no_hooks()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_seen_as_their_calls(kind: type[nn.RNNBase]) -> None:
    """In float32 the CPU has a fused LSTM without a second derivative."""
    layer, x = kind(3, 4), torch.randn(5, 2, 3)
    enabled = torch.backends.mkldnn.enabled
    lin = linearised(lambda: (None, layer(x)[0].pow(2).sum()), list(layer.parameters()), layer)
    assert not [row.op for row in lin.table() if "mkldnn" in row.op or "rnn" in row.op or "lstm" in row.op]
    assert torch.backends.mkldnn.enabled == enabled
