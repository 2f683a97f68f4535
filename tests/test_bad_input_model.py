"""Rows B1-B27 of the catalogue of bad input: models and parameters that other tools trip over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import fastsharp
from fastsharp.errors import (
    DeviceError,
    DoubleBackwardError,
    DtypeError,
    InferenceTensorError,
    NonFiniteError,
    NoParametersError,
    ParamError,
    PrecisionError,
    UnusedParamWarning,
)
from tests.cases import net
from tests.curvature.checks import spectrum
from tests.oracles.dense import dense_hessian, eigenvalues
from tests.unchanged import refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread", "row")
LOSS = nn.CrossEntropyLoss()


def top(model: nn.Module, data: Any, loss_fn: Any = LOSS, **options: Any) -> fastsharp.Eigenpairs:
    return fastsharp.lanczos(model, data, loss_fn, **({"method": "lanczos", "tol": 1e-9} | options))


def error(result: fastsharp.Eigenpairs, values: torch.Tensor) -> float:
    return float((result.eigenvalues - values[: len(result)]).abs().max() / values.abs().max())


class OnceSquare(torch.autograd.Function):
    """x^2 whose backward is marked as not differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class ConstantSquare(torch.autograd.Function):
    """x^2 whose backward is a constant as far as autograd can see."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad


class With(nn.Module):
    """Two linear layers with a custom function between them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 5), nn.Linear(5, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(torch.tanh(self.first(x))))


def test_B1_one_frozen_parameter():
    n = net("frozen")
    with unchanged(n.model):
        result = top(n.model, n.batches)
    assert error(result, spectrum("frozen")) <= 1e-10
    assert result.eigenvectors.shape[1] == 80
    assert result.provenance["frozen"] == ("2.weight", "4.bias")
    assert any("frozen parameters left out: 2.weight, 4.bias" in note for note in result.notes)


def test_B2_frozen_parameter_named():
    n = net("frozen")
    with refuses(ParamError, "'2.weight'", "frozen", "requires_grad_(True)", model=n.model):
        top(n.model, n.batches, params=["0.*", "2.weight"])


def test_B3_all_parameters_frozen():
    n = net("mlp_tanh")
    n.model.requires_grad_(False)
    with refuses(NoParametersError, "Sequential", "requires_grad_(True)", model=n.model):
        top(n.model, n.batches)
    with refuses(NoParametersError, "no parameters", model=nn.Tanh()):
        top(nn.Tanh(), n.batches)


def test_B4_integer_parameter_is_left_out():
    n = net("mlp_tanh")
    n.model.register_parameter("steps", nn.Parameter(torch.tensor([3]), requires_grad=False))
    with unchanged(n.model):
        result = top(n.model, n.batches)
    assert error(result, spectrum("mlp_tanh")) <= 1e-10
    assert any("steps" in note for note in result.notes)


def test_B5_tied_parameters_are_counted_once():
    n = net("tied_language_model")
    with unchanged(n.model):
        result = top(n.model, n.batches, n.loss_fn)
    assert error(result, spectrum("tied_language_model")) <= 1e-10
    assert result.eigenvectors.shape[1] == 9 * 4 + 4 * 4 + 4
    assert any("head.weight = embed.weight" in note for note in result.notes)


def test_B6_parameter_named_twice():
    n = net("mlp_tanh")
    with refuses(ParamError, "'0.weight'", "listed twice", model=n.model):
        top(n.model, n.batches, params=["0.weight", "2.*", "0.weight"])
    twice = top(n.model, n.batches, params=["0.weight", "0.*"])
    once = top(n.model, n.batches, params=["0.*"])
    assert torch.equal(twice.eigenvalues, once.eigenvalues)


def test_B7_parameter_that_is_not_there():
    n = net("mlp_tanh")
    with refuses(ParamError, "'5.weight'", "0.weight", model=n.model):
        top(n.model, n.batches, params=["0.weight", "5.weight"])


def test_B8_complex_parameters():
    model = nn.Linear(6, 3, dtype=torch.complex64)
    with refuses(DtypeError, "'weight'", "complex64", "view_as_real", model=model):
        top(model, net("mlp_tanh").batches)


def test_B10_meta_parameters():
    model = nn.Linear(6, 3, device="meta")
    with refuses(DeviceError, "'weight'", "meta", model=model):
        top(model, net("mlp_tanh").batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_B11_B12_half_precision_parameters(dtype):
    model = nn.Linear(6, 3).to(dtype)
    with refuses(PrecisionError, "'weight'", str(dtype), "model.float()", model=model):
        top(model, net("mlp_tanh").batches)


def test_B13_mixed_precision_parameters():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3).double())
    with refuses(DtypeError, "'0.weight'", "'1.weight'", "float32", "float64", model=model):
        top(model, net("mlp_tanh").batches)


def test_B15_parameter_without_a_gradient_path():
    n = net("unused")
    with unchanged(n.model), pytest.warns(UnusedParamWarning, match=r"spare.weight, spare.bias.*params="):
        result = top(n.model, n.batches)
    assert error(result, spectrum("unused")) <= 1e-10
    assert float(result.as_dict(0)["spare.weight"].norm()) <= 1e-9  # r / lambda bounds the part in the null space


def test_B16_parameters_made_under_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(6, 3)
    with refuses(InferenceTensorError, "'weight'", "inference_mode", "clone", model=model):
        top(model, net("mlp_tanh", torch.float32).batches)


def test_parameters_that_are_not_finite():
    n = net("mlp_tanh")
    n.model[2].bias.data[1] = float("nan")
    with refuses(NonFiniteError, "'2.bias'", "checkpoint", model=n.model):
        top(n.model, n.batches)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["B17_no_grad", "B18_inference_mode"])
@pytest.mark.parametrize("memory", ["auto", 64], ids=["frozen", "streamed"])
def test_B17_B18_called_without_gradients(context, memory):
    n = net("mlp_tanh")
    with context(), unchanged(n.model, *n.whole):
        result = top(n.model, n.batches, memory=memory, preflight="full")
    assert error(result, spectrum("mlp_tanh")) <= 1e-10
    assert not result.eigenvectors.is_inference()
    with context():
        made_inside = [(x.clone(), y.clone()) for x, y in n.batches]
        inside = top(n.model, made_inside, memory=memory)
        operator = fastsharp.Hessian(n.model, made_inside, LOSS)
        v = torch.randn(operator.n, dtype=torch.float64)
        product = operator @ v
    assert torch.equal(inside.eigenvalues, result.eigenvalues)
    assert torch.equal(product, fastsharp.Hessian(n.model, n.batches, LOSS) @ v.clone())


def test_B19_compiled_model():
    n = net("mlp_tanh")
    compiled = torch.compile(n.model, backend="eager")
    with unchanged(n.model):
        result = top(compiled, n.batches)
    assert error(result, spectrum("mlp_tanh")) <= 1e-10


def test_B20_data_parallel():
    n = net("mlp_tanh")
    with unchanged(n.model):
        result = top(nn.DataParallel(n.model), n.batches)
    assert error(result, spectrum("mlp_tanh")) <= 1e-10


@pytest.mark.parametrize("name", ["vit_block", "transformer_encoder"])
def test_B23_attention_kernels_without_second_derivative(name):
    n = net(name, torch.float32)
    with unchanged(n.model):
        result = top(n.model, n.batches, tol=1e-5)
        by_autograd = top(n.model, n.batches, tol=1e-5, backend="autograd")
    assert error(result, spectrum(name)) <= 1e-5
    assert error(by_autograd, spectrum(name)) <= 1e-5
    assert any("MATH kernel" in note for note in by_autograd.notes)
    assert not any("MATH kernel" in note for note in result.notes)  # the engine has a rule for the fused one


def test_B24_once_differentiable_function():
    model = With(OnceSquare.apply)
    with refuses(DoubleBackwardError, "OnceSquare", "@once_differentiable", "torch operations", model=model):
        top(model, net("mlp_tanh", torch.float32).batches)


def test_B25_backward_taken_as_constant():
    model = With(ConstantSquare.apply)
    with refuses(DoubleBackwardError, "finite difference", "custom backward", "gradgradcheck", model=model):
        top(model, net("mlp_tanh", torch.float32).batches)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_B26_recurrent_layers(name):
    n = net(name, torch.float32)
    with unchanged(n.model):
        result = top(n.model, n.batches, tol=1e-5)
    assert error(result, spectrum(name)) <= 1e-5


def test_B27_relu_and_max_pool():
    n = net("cnn_batchnorm_eval", torch.float32)
    with unchanged(n.model):
        result = top(n.model, n.batches, tol=1e-5)
    assert error(result, spectrum("cnn_batchnorm_eval")) <= 1e-5
    (note,) = [note for note in result.notes if "a.e. Hessian" in note]
    assert "relu" in note and "max_pool" in note and "operator='ggn'" in note
    for smooth in (top(n.model, n.batches, operator="ggn", tol=1e-5), top(net("mlp_tanh").model, net("mlp_tanh").batches)):
        assert not any("a.e." in note for note in smooth.notes)


def test_autocast_around_the_call_is_left_outside():
    n = net("mlp_tanh", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), unchanged(n.model):
        result = top(n.model, n.batches, tol=1e-5)
    assert error(result, spectrum("mlp_tanh")) <= 1e-5


def test_shared_module_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    model, n = Twice().double(), net("mlp_tanh")
    H = dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), n.whole)
    assert error(top(model, n.batches), eigenvalues(H)) <= 1e-10
