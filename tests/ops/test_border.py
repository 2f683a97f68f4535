"""What the border refuses, one refusal per test, with the message that the user reads; the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, FastsharpError, InputError, ShapeError
from fastsharp.ops import alpha, dots, force, update
from tests.ops.cases import case, poisoned

J, N = 3, 10


def arguments() -> dict[str, Any]:
    k = case(J, N, torch.float32, pad=2)
    return {"V": k.V, "w": k.w, "ab": k.ab, "c": k.c, "out": poisoned(J + 1, k.w.device), "out1": poisoned(1, k.w.device)}


def call(op: str, **changed: Any) -> None:
    a = {**arguments(), **changed}
    if op == "dots":
        dots(a["V"], a["w"], a["ab"], out=a["out"])
    elif op == "update":
        update(a["V"], a["w"], a["c"], out=a["out1"])
    else:
        alpha(a["V"][0] if changed.get("v") is None else changed["v"], a["w"], out=a["out1"])


def refuses(error: type[FastsharpError], text: str, op: str, **changed: Any) -> None:
    """Refused, by the same words, whichever backend would run; and before anything was written."""
    messages = set()
    w = changed.get("w")
    before = w.detach().clone() if type(w) is Tensor and w.device.type == "cpu" and w.layout == torch.strided else None
    for backend in ("reference", None):
        with pytest.raises(error, match=text) as caught:
            if backend is None:
                call(op, **changed)
            else:
                with force(backend):
                    call(op, **changed)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert messages.pop().startswith(f"{op}: ")
    if before is not None:
        assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("op", ["alpha", "dots", "update"])
@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: [1.0] * N, ArgumentTypeError, "w is a list, expected a plain torch.Tensor; pass a torch.Tensor"),
        (lambda: torch.zeros(N, dtype=torch.float64), DtypeError, "w is torch.float64, expected torch.float32"),
        (lambda: torch.zeros(N, device="meta"), ArgumentTypeError, "on 'meta'"),
        (lambda: torch.zeros(N).to_sparse(), ArgumentTypeError, "w is sparse"),
        (lambda: torch.zeros(N + 1), ShapeError, rf"w has shape \({N + 1},\), expected \({N},\)"),
        (lambda: torch.zeros(1, 1, 1, N), ShapeError, rf"w has shape \(1, 1, 1, {N}\), expected 1 dimension"),
        (lambda: torch.zeros(2 * N)[::2], ShapeError, r"w has strides \(2,\), expected the last dimension contiguous"),
        (lambda: torch.zeros(N, requires_grad=True), InputError, "w requires grad, but the kernels record no graph"),
        (lambda: torch.conj(torch.zeros(N, dtype=torch.complex64)).imag, ArgumentTypeError, "lazy negation"),
    ],
    ids=["type", "dtype", "meta", "sparse", "length", "ndim", "stride", "grad", "negation"],
)
def test_refuses_a_vector_that_is(op: str, make: Callable[[], Any], error: type[FastsharpError], text: str) -> None:
    refuses(error, text, op, w=make())


@pytest.mark.parametrize("op", ["dots", "update"])
@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: torch.zeros(J, N, dtype=torch.int32),
            DtypeError,
            "V is torch.int32, expected torch.float32 or torch.float64 or torch.float16",
        ),
        (lambda: torch.zeros(0, N), ShapeError, "at least one entry"),
        (lambda: torch.zeros(J, 0), ShapeError, "at least one entry"),
        (lambda: torch.zeros(N), ShapeError, "expected 2 dimensions"),
        (lambda: torch.zeros(N, J).T, ShapeError, "expected the last dimension contiguous"),
        (
            lambda: torch.zeros(J * N).as_strided((J, N), (N - 1, 1)),
            ShapeError,
            rf"row stride {N - 1}, expected at least n = {N}: its rows overlap",
        ),
        (lambda: torch.zeros(N).expand(J, N), ShapeError, "row stride 0"),
    ],
    ids=["dtype", "no-rows", "no-columns", "ndim", "columns", "overlapping", "expanded"],
)
def test_refuses_a_basis_with(op: str, make: Callable[[], Tensor], error: type[FastsharpError], text: str) -> None:
    refuses(error, text, op, V=make())


def test_refuses_w_inside_the_rows_of_V() -> None:
    basis = torch.zeros(J + 1, N + 2)
    for op in ("dots", "update"):
        refuses(InputError, "w overlaps a row of V", op, V=basis[:, :N], w=basis[1, :N])
        refuses(InputError, "w overlaps a row of V", op, V=basis[:J, :N], w=basis.flatten()[N + 1 : 2 * N + 1])


def test_allows_w_beside_or_between_the_rows_of_V() -> None:
    storage = torch.randn(J, 2 * N)
    for op in ("dots", "update"):
        call(op, V=storage[:, :N], w=storage[1, N:])
        call(op, V=storage[1:, :N], w=storage[0, :N], out=poisoned(J, storage.device), c=torch.zeros(J - 1, dtype=torch.float64))


def test_refuses_scalars_of_another_dtype_or_length() -> None:
    refuses(DtypeError, "ab is torch.float32, expected torch.float64", "dots", ab=torch.zeros(2))
    refuses(ShapeError, r"ab has shape \(3,\), expected \(2,\)", "dots", ab=torch.zeros(3, dtype=torch.float64))
    refuses(ShapeError, rf"c has shape \(2,\), expected \({J},\)", "update", c=torch.zeros(2, dtype=torch.float64))


def test_refuses_an_out_of_another_dtype_or_length_or_over_the_vectors() -> None:
    refuses(DtypeError, "out is torch.float32, expected torch.float64", "dots", out=torch.zeros(J + 1))
    refuses(ShapeError, rf"out has shape \({J},\), expected \({J + 1},\)", "dots", out=torch.zeros(J, dtype=torch.float64))
    basis = torch.zeros(J + 1, N, dtype=torch.float64)
    refuses(InputError, "out overlaps V", "dots", V=basis[:J], w=basis[J], out=basis[0, : J + 1])
    refuses(InputError, "out overlaps w", "update", V=basis[:J], w=basis[J], out1=basis[J, 3:4])


def test_refuses_fake_tensors_and_subclasses() -> None:
    class Tagged(Tensor):
        pass

    refuses(
        ArgumentTypeError, "w is a Tagged, expected a plain torch.Tensor; fake and subclassed", "dots", w=torch.zeros(N).as_subclass(Tagged)
    )
    with FakeTensorMode():
        fake = torch.zeros(N)
    refuses(ArgumentTypeError, "w is a FakeTensor", "dots", w=fake)


def test_refuses_tensors_inside_torch_func_transforms() -> None:
    a = arguments()

    def inside(w: Tensor) -> Tensor:
        dots(a["V"], w, a["ab"], out=a["out"])
        return w.sum()

    with pytest.raises(ArgumentTypeError, match=r"wrapped by torch.func"):
        torch.func.vmap(inside)(torch.zeros(2, N))
    with pytest.raises(ArgumentTypeError, match=r"wrapped by torch.func"):
        torch.func.grad(inside)(torch.zeros(N))


def test_allows_parameters_under_no_grad() -> None:
    with torch.no_grad():
        call("dots", w=torch.nn.Parameter(torch.ones(N)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_refuses_tensors_on_two_devices() -> None:
    refuses(DeviceError, r"w is on cuda:0, the other arguments on cpu", "dots", w=torch.zeros(N, device="cuda"))
