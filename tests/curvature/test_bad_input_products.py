"""Inputs and models that a recorder may trip over, by each backend: the products of an explicit double backward, or an error that says why."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsharp
from fastsharp.errors import EngineError, InputError, NondeterministicOperatorError, StaleOperatorError
from tests.unchanged import check_message, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"hessian": fastsharp.Hessian, "ggn": fastsharp.GGN}
Batches = list[tuple[Tensor, Tensor]]
GATE = 1e-11  # two exact algorithms in float64: rounding, and what a product loses where terms cancel

backends = pytest.mark.parametrize("backend", ["auto", "rop", "autograd"])
kinds = pytest.mark.parametrize("kind", KINDS)


def explicit(kind: str, model: Callable[[Tensor], Tensor], params: Iterable[Tensor], batches: Batches, V: Tensor) -> Tensor:
    """Rows V times the matrix of the mean cross-entropy over all samples, in plain torch: H v = d (g'v), or J' H_L J in full."""
    params, total = list(params), torch.zeros_like(V)
    samples = sum(len(y) for _, y in batches)
    for x, y in (batch for batch in batches if len(batch[1])):
        z = model(x)
        loss = F.cross_entropy(z, y, reduction="sum") / samples
        if kind == "hessian":
            flat = _flat(torch.autograd.grad(loss, params, create_graph=True))
            total += torch.stack([_flat(torch.autograd.grad(flat @ v, params, retain_graph=True)) for v in V])
        else:
            (slope,) = torch.autograd.grad(loss, z, create_graph=True)
            J = torch.stack([_flat(torch.autograd.grad(e, params, retain_graph=True)) for e in z.flatten()])
            L = torch.stack([torch.autograd.grad(g, z, retain_graph=True)[0].flatten() for g in slope.flatten()])
            total += V @ J.T @ L @ J
    return total.detach()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def error(operator: fastsharp.Hessian | fastsharp.GGN, want: Callable[[Tensor], Tensor]) -> float:
    """||AV - want|| / ||want|| for three rows, over two products: of fresh parts, and of kept ones."""
    V = torch.randn(3, operator.n, dtype=operator.dtype, generator=torch.Generator().manual_seed(1))
    exact = want(V)
    return max(float((operator.apply(V) - exact).norm() / exact.norm()) for _ in range(2))


def check(kind: str, backend: str, model: nn.Module, batches: Batches, loss: Any = None, gate: float = GATE) -> Any:
    operator = KINDS[kind](model, batches, loss or nn.CrossEntropyLoss(), backend=backend)
    with unchanged(model, *(t for batch in batches for t in batch)):
        assert error(operator, lambda V: explicit(kind, model, model.parameters(), batches, V)) <= gate
    return operator


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU(), *pooled, nn.Linear(12, 3)).double().eval()
    net[1].running_mean += 0.1
    return net


def images(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, height, width, dtype=torch.float64), torch.arange(n) % 3


def small() -> tuple[nn.Sequential, Batches]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3
    return model, list(zip(x.split(4), y.split(4), strict=True))


# --- data -------------------------------------------------------------------------------------------------------------


@kinds
@backends
def test_shapes_that_change_between_batches(backend, kind):
    check(kind, backend, conv_net(), [images(3, 6, 6), images(2, 9, 5), images(1, 4, 7), images(3, 6, 6)])


@kinds
@backends
def test_an_empty_batch_adds_nothing(backend, kind):
    model, batches = small()
    check(kind, backend, model, [batches[0], (batches[0][0][:0], batches[0][1][:0]), *batches[1:]])


def _strided(x: Tensor) -> Tensor:
    """The same numbers, every second element of memory, from an offset on."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., 1::2] = x
    return wide[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": _strided,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:, :1, :1].expand(-1, 2, 6, -1),
    "a view of one buffer": lambda x: torch.cat([x, x])[len(x) :],
}


@kinds
@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout, backend, kind):
    batches = [(LAYOUTS[layout](x), y) for x, y in (images(3, 6, 6), images(2, 6, 6))]
    check(kind, backend, conv_net(), batches)


@kinds
@backends
def test_a_model_in_channels_last(backend, kind):
    batches = [(LAYOUTS["channels_last"](x), y) for x, y in (images(3, 6, 6), images(2, 6, 6))]
    check(kind, backend, conv_net().to(memory_format=torch.channels_last), batches)


@kinds
@backends
def test_weights_that_are_strided(backend, kind):
    model, batches = small()
    model[0].weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64).T)
    check(kind, backend, model, batches)


@kinds
@backends
def test_an_input_that_the_model_writes_into_is_refused(backend, kind):
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()[0]

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return self.net(x)

    model, batches = Centred(), small()[1]
    with pytest.raises(StaleOperatorError, match="data tensor was changed in place") as caught:
        KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend=backend) @ torch.ones(39, dtype=torch.float64)
    check_message(caught.value)


# --- models that change -------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Counts its calls in `calls`: a buffer written in place, a buffer replaced, or a number; output x (1 + share * calls)."""

    def __init__(self, how: str, share: float = 0.0) -> None:
        super().__init__()
        self.net, self.how, self.share = small()[0], how, share
        if how == "number":
            self.calls: Any = 0
        else:
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.net(x) * (1.0 + self.share * self.calls)


@kinds
@backends
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_model_that_writes_its_buffers_is_refused_by_name(how, backend, kind):
    with pytest.raises(InputError, match="calls") as caught:
        KINDS[kind](Counts(how), small()[1], backend=backend)
    check_message(caught.value)


@kinds
@backends
def test_a_counter_that_changes_nothing_is_let_be(backend, kind):
    model = Counts("number")
    operator = KINDS[kind](model, small()[1], nn.CrossEntropyLoss(), backend=backend)
    assert error(operator, lambda V: explicit(kind, model, model.parameters(), small()[1], V)) <= GATE


@backends
def test_a_model_that_drifts_from_call_to_call_is_refused(backend):
    with pytest.raises(NondeterministicOperatorError) as caught:
        fastsharp.lanczos(Counts("number", 0.01), small()[1], k=1, backend=backend)
    check_message(caught.value)


class Edits(nn.Module):
    """Writes its own weights in the forward pass: seen by autograd's counters, past them, or as another module."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = small()[0], how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            with torch.no_grad():
                self.net[0].weight.mul_(0.99)
        elif self.how == "through .data":
            self.net[0].weight.data.mul_(0.99)
        else:
            self.net[2] = nn.Linear(4, 3).double()
        return self.net(x)


@pytest.mark.parametrize("preflight", ["fast", "off"])
@backends
@pytest.mark.parametrize("how", ["in place", "through .data", "another module"])
def test_a_model_that_edits_its_weights_is_refused(how, backend, preflight):
    with pytest.raises((StaleOperatorError, NondeterministicOperatorError, EngineError)) as caught:
        fastsharp.lanczos(Edits(how), small()[1], nn.CrossEntropyLoss(), k=1, backend=backend, preflight=preflight)
    check_message(caught.value)


class Remembers(nn.Module):
    """Keeps what it saw, with its graph; `share` of the last output is added to the next one."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.net, self.share, self.seen = small()[0], share, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if self.share and self.seen:
            z = z + self.share * self.seen[-1].mean(0)
        self.seen.append(z)
        return z


@kinds
@backends
def test_a_model_that_keeps_its_activations(backend, kind):
    model = Remembers(0.0)
    operator = KINDS[kind](model, small()[1], nn.CrossEntropyLoss(), backend=backend)
    assert error(operator, lambda V: explicit(kind, model, model.parameters(), small()[1], V)) <= GATE


@backends
def test_a_model_that_adds_its_last_output_is_refused(backend):
    with pytest.raises((NondeterministicOperatorError, EngineError), match=r"differ|before this evaluation") as caught:
        fastsharp.lanczos(Remembers(0.5), small()[1], nn.CrossEntropyLoss(), k=1, backend=backend)
    check_message(caught.value)


# --- hooks --------------------------------------------------------------------------------------------------------------


def _doubles_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output + output.sin()


def _in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2.0)


def _before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].square(),)


@kinds
@backends
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("hook", [_doubles_output, _before], ids=lambda h: h.__name__)
def test_a_hook_that_changes_values_belongs_to_the_model(hook, layer, backend, kind):
    model, batches = small()
    register = model[layer].register_forward_pre_hook if hook is _before else model[layer].register_forward_hook
    register(hook)
    plain = KINDS[kind](small()[0], batches, nn.CrossEntropyLoss())
    assert error(plain, lambda V: explicit(kind, model, model.parameters(), batches, V)) > 1e-3  # the hook matters
    check(kind, backend, model, batches)


@kinds
@backends
def test_a_hook_that_writes_into_the_output(backend, kind):
    model, batches = small()
    model[0].register_forward_hook(_in_place)
    check(kind, backend, model, batches)


@kinds
def test_the_native_kernel_does_not_miss_a_hook(kind):
    model, batches = small()
    model[1].register_forward_hook(_doubles_output)
    with pytest.raises(EngineError, match=r"no part of a chain|is no linear layer") as caught:
        KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend="mlp") @ torch.ones(39, dtype=torch.float64)
    check_message(caught.value)


@kinds
@backends
def test_a_hook_on_gradients_is_autograds(backend, kind):
    """It changes what backward returns, so that the products of torch are those of no function: only autograd can follow it."""
    model, batches = small()
    model[1].register_full_backward_hook(lambda module, into, out: None)
    operator = KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend=backend)
    if backend == "rop":
        with pytest.raises(EngineError, match="hook"):
            operator @ torch.ones(operator.n, dtype=torch.float64)
    else:
        assert error(operator, lambda V: explicit(kind, model, model.parameters(), batches, V)) <= GATE
        assert operator.backend == "autograd"


# --- where the call is made ---------------------------------------------------------------------------------------------


@kinds
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_the_call_changes_nothing(dtype, backend, kind):
    model, batches = small()
    model, batches = model.float(), [(x.float(), y) for x, y in batches]
    V = torch.randn(3, 39)
    plain = KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend=backend).apply(V)
    with torch.autocast("cpu", dtype):
        operator = KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend=backend)
        assert torch.equal(operator.apply(V), plain) and torch.equal(operator.apply(V), plain)
    assert operator.settings["products"] == "float32"


@kinds
@backends
def test_autocast_inside_the_model_is_part_of_it(backend, kind):
    """Products through bfloat16 casts: those of the same casts, to their rounding of 2^-8, or a refusal that says why."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()[0].float()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return self.net(x).float()

    model, batches = Inside(), [(x.float(), y) for x, y in small()[1]]
    check(kind, backend, model, batches, gate=16 * 2.0**-8)


@kinds
@backends
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_the_callers_grad_mode_does_not_matter(context, backend, kind):
    model, batches = small()
    operator = KINDS[kind](model, batches, nn.CrossEntropyLoss(), backend=backend)
    V = torch.randn(3, operator.n, dtype=torch.float64)
    with context():
        got = [operator.apply(V).clone() for _ in range(2)]
    want = explicit(kind, model, model.parameters(), batches, V)
    assert all(float((g - want).norm() / want.norm()) <= GATE for g in got)


# --- models in another form ---------------------------------------------------------------------------------------------


def _compiled(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    model.compile(backend="eager")
    return model


def _with_a_compiled_function(model: nn.Module, x: Tensor) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.function = model, torch.compile(lambda t: model[2](model[1](t)), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.net[0](x))

    return Wrapped()


def _scripted(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.script(model)


def _traced(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.trace(model, x)


def _compiled_inside(model: nn.Module, x: Tensor) -> nn.Module:
    return nn.Sequential(torch.compile(model[:2], backend="eager"), model[2])


def _scripted_inside(model: nn.Module, x: Tensor) -> nn.Module:
    return nn.Sequential(torch.jit.script(model[:2]), model[2])


FORMS = [_compiled, _compiled_inside, _compiled_in_place, _with_a_compiled_function, _scripted, _scripted_inside, _traced]


@kinds
@backends
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__[1:])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_and_scripted_models(form, backend, kind):
    """The products of the model as written, where need be by autograd with a note; a backend that was named says no."""
    model, batches = small()
    other = form(model, batches[0][0])
    operator = KINDS[kind](other, batches, nn.CrossEntropyLoss(), backend=backend)
    try:
        assert error(operator, lambda V: explicit(kind, model, model.parameters(), batches, V)) <= GATE
    except EngineError as e:
        assert backend == "rop" and "script" in str(e) + form.__name__
        check_message(e)
    if backend == "auto" and operator.backend != "rop":
        assert any(note.startswith("products by autograd: ") for note in operator.notes)


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "backend", "times"),
    [("hessian", "auto", 1000), *((kind, backend, 50) for kind in KINDS for backend in ("rop", "autograd", "mlp"))],
)
def test_operators_in_a_loop_leave_no_tensor_behind(kind, backend, times):
    model, batches = small()
    v = torch.randn(39, dtype=torch.float64)

    def used(times: int) -> None:
        for _ in range(times):
            KINDS[kind](model, batches[:1], nn.CrossEntropyLoss(), backend=backend) @ v

    used(3)  # caches of the process are no operator's
    before = _tensors()
    used(times)
    assert _tensors() == before


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())
