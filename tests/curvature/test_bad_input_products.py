"""Data, contexts and forms of a model that a recorder may trip over, by each backend: the products of a double backward, or a clear error."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastsharp.errors import EngineError, StaleOperatorError
from tests.curvature.explicit import GATE, KINDS, backends, check, conv_net, error, explicit, images, kinds, small
from tests.unchanged import check_message

pytestmark = pytest.mark.usefixtures("one_thread")


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
    if backend == "auto" and operator.backend == "autograd":
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
