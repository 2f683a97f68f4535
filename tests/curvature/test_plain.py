"""backend="auto" takes the native kernel for nets whose modules alone say what they compute, and says nothing where it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastsharp
from fastsharp.curvature import mlp as curvature_mlp
from fastsharp.curvature.plain import WIDEST
from fastsharp.errors import EngineError
from fastsharp.ops import mlp
from fastsharp.preflight import preflight

pytestmark = pytest.mark.skipif(not mlp.native(torch.device("cpu")), reason="the kernel is not built")
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
Z = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))


def net(phi: type[nn.Module] = nn.ReLU, width: int = 9) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(4, width), phi(), nn.Dropout(0.5), nn.Sequential(nn.Linear(width, 7), nn.Identity(), phi())]
    return nn.Sequential(*layers, nn.Linear(7, 3)).eval()


TAKEN: dict[str, tuple[Callable[[], nn.Module], Any, torch.Tensor]] = {
    "relu, default loss": (net, None, Y),
    "tanh": (lambda: net(nn.Tanh), nn.CrossEntropyLoss(), Y),
    "gelu": (lambda: net(nn.GELU), nn.MSELoss(), Z),
    "labels of eight bits": (net, None, Y.to(torch.uint8)),
    "function": (net, F.mse_loss, Z),
    "one layer": (lambda: nn.Sequential(*list(net())[:2]).append(nn.Identity()), F.cross_entropy, Y),
    "as wide as may be": (lambda: net(width=WIDEST), None, Y),
}


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("name", TAKEN)
def test_plain_nets_are_taken(name: str, kind: str) -> None:
    make, loss, target = TAKEN[name]
    data = [(X[:25], target[:25]), (X[25:], target[25:])]
    auto, exact = (getattr(fastsharp, kind)(make(), data, loss, backend=b) for b in ("auto", "autograd"))
    V = torch.randn(2, auto.n)
    got, want = auto.apply(V), exact.apply(V)
    assert auto.backend == "mlp" and float((got - want).norm()) <= 1e-5 * float(want.norm())
    assert torch.equal(auto.apply(V), got)
    assert auto.apply(V[:1].expand(3, -1))[2].equal(got[0])


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if float(x.sum()) < 1e9 else self.net(2 * x)


def with_(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net()
        change(model)
        return model

    return make


def own_forward(model: Any) -> None:
    model[1].forward = lambda x: F.linear(x, model[1].weight, model[1].bias)


def tied(model: Any) -> None:
    model[5] = nn.Linear(7, 9)
    model.append(nn.ReLU())
    model.append(nn.Linear(9, 7))
    model[7].weight = model[4][0].weight


def replaced(model: Any) -> None:
    model[1] = OwnLinear(4, 9)


def wrapped_function(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, y)


LEFT: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "compiled in place": (with_(lambda m: m.compile(backend="eager")), None),
    "scripted": (lambda: torch.jit.script(net()), None),
    "forward hook": (with_(lambda m: m[1].register_forward_hook(lambda *a: None)), None),
    "forward pre-hook": (with_(lambda m: m.register_forward_pre_hook(lambda *a: None)), None),
    "backward hook": (with_(lambda m: m[2].register_full_backward_hook(lambda *a: None)), None),
    "gradient hook": (with_(lambda m: m[1].weight.register_hook(lambda g: g)), None),
    "parametrised": (with_(lambda m: parametrizations.weight_norm(m[1])), None),
    "pruned": (with_(lambda m: prune.l1_unstructured(m[1], "weight", 0.3)), None),
    "own forward": (with_(own_forward), None),
    "subclass": (with_(replaced), None),
    "branching": (Branching, None),
    "tied": (with_(tied), None),
    "too wide": (lambda: net(width=WIDEST + 1), None),
    "two activations": (with_(lambda m: m.__setitem__(2, nn.Tanh())), None),
    "other activation": (with_(lambda m: m.__setitem__(2, nn.Softplus())), None),
    "own loss": (net, wrapped_function),
    "partial": (net, functools.partial(F.cross_entropy, reduction="mean")),
    "smoothing": (net, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "batch loss": (net, fastsharp.batch_loss(lambda m, b: F.cross_entropy(m(b[0]), b[1]))),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LEFT)
def test_others_are_not_and_no_note_is_left(name: str) -> None:
    make, loss = LEFT[name]
    model = make()
    auto = fastsharp.Hessian(model, [(X, Y)], loss, reduction="mean")
    v = torch.randn(auto.n, generator=torch.Generator().manual_seed(2))
    got = auto @ v
    assert auto.backend != "mlp"
    assert not any("mlp" in note or "linear layer" in note or "hook" in note for note in auto.notes if "engine cannot" not in note)
    want = fastsharp.Hessian(model, [(X, Y)], loss, reduction="mean", backend="autograd") @ v
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


def test_a_compiled_net_is_the_net_that_was_compiled() -> None:
    auto = fastsharp.Hessian(torch.compile(net(), backend="eager"), [(X, Y)])
    assert auto.backend == "mlp" and any("compile" in note for note in auto.notes)
    v = torch.randn(auto.n, generator=torch.Generator().manual_seed(2))
    assert torch.equal(auto @ v, fastsharp.Hessian(net(), [(X, Y)]) @ v)


def test_a_hook_that_comes_between_construction_and_the_first_product_is_seen() -> None:
    model = net()
    auto = fastsharp.Hessian(model, [(X, Y)])
    assert auto.backend == "mlp"
    model[2].register_full_backward_hook(lambda module, gi, go: (2 * gi[0],))
    auto @ torch.ones(auto.n)
    assert auto.backend != "mlp" and not any("mlp" in note for note in auto.notes)


def test_parts_of_the_parameters_are_left_to_the_engine() -> None:
    auto = fastsharp.Hessian(net(), [(X, Y)], params="5.*")
    auto @ torch.ones(auto.n)
    assert auto.backend == "rop" and not any("products by" in note for note in auto.notes)


def test_without_the_native_module_the_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "native", lambda device: False)
    assert fastsharp.Hessian(net(), [(X, Y)]).backend == "rop"


@pytest.mark.parametrize("samples", [40, 300])
@pytest.mark.parametrize("where", ["float64", "own dtype"])
def test_the_preflight_sees_a_kernel_that_is_wrong(where: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = mlp.Prepared.product

    def spoiled(self: mlp.Prepared, V: torch.Tensor, **options: Any) -> torch.Tensor:
        out = exact(self, V, **options)
        wrong = V.dtype == (torch.float64 if where == "float64" else torch.float32)
        return out.mul_(1.0 + (1e-7 if where == "float64" else 0.02)) if wrong else out

    monkeypatch.setattr(mlp.Prepared, "product", spoiled)
    x = X.repeat(8, 1)[:samples]
    H = fastsharp.Hessian(net(nn.Tanh), [(x, torch.arange(samples) % 3)])
    with pytest.raises(EngineError, match="backend='mlp' misses autograd's"):
        preflight(H)


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_the_preflight_compares_the_kernel_in_float64(kind: str) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.3, 2.0]), ignore_index=2)
    A = getattr(fastsharp, kind)(net(nn.GELU), [(X, Y)], loss)
    assert preflight(A)["engine"] <= 1e-12 and A.backend == "mlp"


def test_a_net_that_is_recognised_wrongly_goes_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature_mlp.Recognised, "agrees", lambda self, own: False)
    H = fastsharp.Hessian(net(), [(X, Y)])
    H @ torch.ones(H.n)
    assert H.backend == "rop" and not any("recognised" in note for note in H.notes)


def test_explain_names_the_kernel_and_why_it_is_left() -> None:
    taken = fastsharp.explain(net(), (X, Y))
    assert taken.backend == "mlp" and taken.declined == {} and "one native call" in str(taken).splitlines()[0]
    wide = fastsharp.explain(net(width=WIDEST + 1), (X, Y))
    assert wide.backend == "rop" and str(WIDEST + 1) in wide.declined["mlp"] and "'auto' leaves it" in str(wide)
