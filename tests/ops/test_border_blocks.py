"""What the border refuses of members, several vectors, half storage, rows, combinations and probes; and sizes beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsharp.errors import ArgumentTypeError, DtypeError, FastsharpError, InputError, ShapeError
from fastsharp.ops import combine, dots, probes, update
from tests.ops.blocks import Block, block, check_combine, check_dots, check_update

D = torch.float64


def k(form: str = "single", storage: torch.dtype = torch.float32) -> Block:
    return block(form, 2, 3, 4, 10, storage)


def zeros(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def call_dots(form: str, storage: torch.dtype = torch.float32, **changed: Any) -> None:
    p = k(form, storage)
    last = (p.seen(p.last[0], False), p.seen(p.last[1], False))
    a = {"V": p.seen(p.V, False), "w": p.seen(p.w, True), "ab": p.seen(p.ab, False), "out": p.seen(p.fresh(5), True), "last": last}
    a.update(changed)
    dots(a["V"], a["w"], a["ab"], out=a["out"], last=a["last"])


def call_update(form: str, storage: torch.dtype = torch.float32, **changed: Any) -> None:
    p = k(form, storage)
    out = p.seen(p.fresh(), True) if form != "single" else zeros(1)
    a = {"V": p.seen(p.V, False), "w": p.seen(p.w, True), "c": p.seen(p.c, True), "out": out, "row": None, "factor": None}
    a.update(changed)
    update(a["V"], a["w"], a["c"], out=a["out"], row=a["row"], factor=a["factor"])


F32, F16 = torch.float32, torch.float16
DOTS: list[tuple[str, dict[str, Any], type[FastsharpError], str]] = [
    ("members", {"w": zeros(3, 10, dtype=F32)}, ShapeError, r"w has shape \(3, 10\), expected \(2, 10\) or \(2, b, 10\)"),
    ("vectors", {"w": zeros(3, 11, dtype=F32)}, ShapeError, r"w has shape \(3, 11\), expected \(10,\) or \(b, 10\)"),
    ("vectors", {"w": zeros(0, 10, dtype=F32)}, ShapeError, "at least one entry"),
    ("members", {"w": zeros(1, 10, dtype=F32).expand(2, 10)}, ShapeError, "its members overlap"),
    ("vectors", {"w": zeros(1, 10, dtype=F32).expand(3, 10), "ab": None, "last": None}, ShapeError, "its rows overlap"),
    ("members", {"V": zeros(4, 10, dtype=F32).expand(2, 4, 10)}, ShapeError, "its members overlap"),
    ("vectors", {}, InputError, "w holds 3. Pass ab=None"),
    ("single", {"ab": None}, InputError, "last was given without ab"),
    ("single", {"last": [zeros(10)]}, ArgumentTypeError, "last is a list, expected a tuple"),
    ("single", {"last": (None, zeros(10, dtype=F32))}, InputError, r"last\[0\] is None"),
    ("single", {"last": (zeros(10, dtype=F16), None)}, DtypeError, r"last\[0\] is torch.float16, expected torch.float32"),
    ("members", {"last": (zeros(10, dtype=F32), None)}, ShapeError, r"last\[0\] has shape \(10,\), expected 2 dimensions"),
    ("members", {"ab": zeros(2)}, ShapeError, r"ab has shape \(2,\), expected 2 dimensions"),
    ("members", {"out": zeros(1, 5).expand(2, 5)}, ShapeError, "out has row stride 0"),
    ("members", {"out": zeros(2, 4)}, ShapeError, r"out has shape \(2, 4\), expected \(2, 5\)"),
]


@pytest.mark.parametrize(("form", "changed", "error", "text"), DOTS, ids=[text[:30] for *_, text in DOTS])
def test_dots_refuses(form: str, changed: dict[str, Any], error: type[FastsharpError], text: str) -> None:
    with pytest.raises(error, match=text):
        call_dots(form, **changed)


def test_dots_on_half_rows_asks_for_the_vectors_to_remove() -> None:
    with pytest.raises(InputError, match=r"V is stored as torch.float16, too coarse .* Pass last="):
        call_dots("single", F16, last=None)
    call_dots("single", F16, last=None, ab=None)


UPDATE: list[tuple[str, dict[str, Any], type[FastsharpError], str]] = [
    ("members", {"c": zeros(2, 3)}, ShapeError, r"c has shape \(2, 3\), expected \(2, 4\)"),
    ("both", {"out": zeros(1, 1).expand(2, 3)}, ShapeError, "its rows overlap"),
    ("members", {"out": zeros(1).expand(2)}, ShapeError, "its rows overlap"),
    ("vectors", {"row": zeros(10, dtype=F32), "factor": zeros(1)}, InputError, "w holds 3. Leave row out"),
    ("single", {"row": zeros(10, dtype=F32)}, InputError, "row was given without factor"),
    ("single", {"factor": zeros(1)}, InputError, "factor was given without row"),
    ("single", {"row": zeros(10, dtype=F16), "factor": zeros(1)}, DtypeError, "row is torch.float16, expected torch.float32"),
    ("single", {"row": zeros(11, dtype=F32), "factor": zeros(1)}, ShapeError, r"row has shape \(11,\), expected \(10,\)"),
    ("single", {"row": zeros(10, dtype=F32), "factor": 2.0}, ArgumentTypeError, "factor is a float"),
    ("single", {"row": zeros(10, dtype=F32), "factor": zeros(2)}, ShapeError, r"factor has shape \(2,\), expected \(1,\)"),
]


@pytest.mark.parametrize(("form", "changed", "error", "text"), UPDATE, ids=[text[:30] for *_, text in UPDATE])
def test_update_refuses(form: str, changed: dict[str, Any], error: type[FastsharpError], text: str) -> None:
    with pytest.raises(error, match=text):
        call_update(form, **changed)


def test_update_refuses_what_it_would_overwrite_while_reading() -> None:
    basis, one = zeros(2, 6, 10), zeros(2)
    V, w = basis[:, :4], basis[:, 4]
    c = zeros(2, 4)
    for changed, text in (
        ({"row": basis[:, 3], "factor": one}, "row overlaps a row of V"),
        ({"row": basis[:, 4], "factor": one}, "row overlaps w"),
        ({"c": basis[:, 4, :4]}, "w overlaps c"),
        ({"c": c, "row": basis[:, 5], "factor": basis[:, 5, 0]}, "row overlaps factor"),
        ({"c": basis[:, 5, :4], "row": basis[:, 5], "factor": one}, "row overlaps c"),
        ({"out": basis[:, 5, 0], "row": basis[:, 5], "factor": one}, "row overlaps out"),
        ({"row": basis[:, 5], "factor": basis[:, 4, 0]}, "w overlaps factor"),
        ({"out": basis[:, 4, 0]}, "out overlaps w"),
        ({"w": basis[:, 3]}, "w overlaps a row of V"),
    ):
        with pytest.raises(InputError, match=text):
            call_update("members", D, **{"V": V, "w": w, "c": c, **changed})
    with pytest.raises(InputError, match="w overlaps ab"):
        call_dots("members", D, V=V, w=w, ab=basis[:, 4, :2], last=None)
    call_update("members", D, V=V, w=w, c=c, row=basis[:, 5], factor=one)


V45 = zeros(4, 5, dtype=F32)
COMBINE: list[tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], type[FastsharpError], str]] = [
    (lambda: (zeros(2, 3), V45, zeros(2, 5, dtype=F32)), ShapeError, r"S has shape \(2, 3\), expected \(k, 4\)"),
    (lambda: (zeros(2, 4, dtype=F32), V45, zeros(2, 5, dtype=F32)), DtypeError, "S is torch.float32, expected torch.float64"),
    (lambda: (zeros(2, 4), V45, zeros(2, 5)), DtypeError, "out is torch.float64, expected torch.float32"),
    (lambda: (zeros(2, 4), V45.half(), zeros(2, 5, dtype=F16)), DtypeError, "out is torch.float16, expected torch.float32"),
    (lambda: (zeros(2, 4), V45, zeros(3, 5, dtype=F32)), ShapeError, r"out has shape \(3, 5\), expected \(2, 5\)"),
    (lambda: (zeros(2, 4), V45, zeros(5, 2, dtype=F32).T), ShapeError, "last dimension contiguous"),
    (lambda: (zeros(2, 4), V45, zeros(1, 5, dtype=F32).expand(2, 5)), ShapeError, "its rows overlap"),
    (lambda: (zeros(2, 4), V45, V45[:2]), InputError, "out overlaps V"),
    (lambda: (zeros(2, 0), zeros(0, 5), zeros(2, 5)), ShapeError, "at least one entry"),
    (lambda: (zeros(2, 4), zeros(4, 0), zeros(2, 0)), ShapeError, "at least one entry"),
    (lambda: ((x := zeros(4, 4))[:2], zeros(4, 4), x[1:3]), InputError, "out overlaps S"),
    (lambda: (zeros(2, 4).requires_grad_(), V45, zeros(2, 5, dtype=F32)), InputError, "S requires grad"),
]


@pytest.mark.parametrize(("make", "error", "text"), COMBINE, ids=[text[:30] for *_, text in COMBINE])
def test_combine_refuses(make: Callable[[], tuple[Tensor, Tensor, Tensor]], error: type[FastsharpError], text: str) -> None:
    S, V, out = make()
    with pytest.raises(error, match=f"combine: {text}" if not text.startswith(("last", "its", "at")) else text):
        combine(S, V, out=out)


PROBES: list[tuple[dict[str, Any], type[FastsharpError], str]] = [
    ({"kind": "gaussian"}, InputError, "kind is 'gaussian', expected 'rademacher' or 'normal'"),
    ({"out": zeros(5)}, ShapeError, "expected 2 dimensions"),
    ({"out": zeros(2, 5, dtype=F16)}, DtypeError, "out is torch.float16"),
    ({"out": zeros(1, 5).expand(2, 5)}, ShapeError, "its rows overlap"),
    ({"out": torch.zeros(2, 5, device="meta")}, ArgumentTypeError, "'meta'"),
    ({"out": zeros(2, 5).requires_grad_()}, InputError, "requires grad"),
    ({"seed": 1.0}, ArgumentTypeError, "seed is 1.0, a float"),
    ({"seed": True}, ArgumentTypeError, "seed is True"),
    ({"seed": 2**64}, InputError, "expected a 64-bit integer"),
    ({"seed": -(2**63) - 1}, InputError, "expected a 64-bit integer"),
    ({"first": -1}, InputError, "expected an index from 0"),
    ({"first": 2**62}, InputError, "expected an index from 0"),
]


@pytest.mark.parametrize(("changed", "error", "text"), PROBES, ids=[text[:30] for *_, text in PROBES])
def test_probes_refuses(changed: dict[str, Any], error: type[FastsharpError], text: str) -> None:
    a: dict[str, Any] = {"kind": "normal", "out": zeros(2, 5), "seed": 0, "first": 0, **changed}
    with pytest.raises(error, match=text):
        probes(a["kind"], out=a["out"], seed=a["seed"], first=a["first"])


def test_new_ops_refuse_tensors_inside_torch_func_transforms() -> None:
    for f in (lambda x: combine(zeros(1, 1), x[None], out=zeros(1, 5)), lambda x: probes("normal", out=x[None], seed=0)):
        with pytest.raises(ArgumentTypeError, match=r"wrapped by torch\.func"):
            torch.func.vmap(f)(zeros(3, 5))


FAR = 2**31 + 9  # elements between two rows: beyond what 32 bits count


def apart(t: Tensor, folder: Path) -> Tensor:
    """t (2, ...) with its two halves FAR elements apart, in a sparse file of which only their pages exist."""
    storage = torch.from_file(str(folder / f"{len(list(folder.iterdir()))}"), shared=True, size=FAR + t[0].numel(), dtype=t.dtype)
    return storage.as_strided(t.shape, (FAR, *t[0].contiguous().stride())).copy_(t)


@pytest.mark.parametrize("storage", [torch.float16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(storage: torch.dtype, tmp_path: Path) -> None:
    n = 3000
    p = block("single", 1, 1, 2, n, storage)
    far = Block("single", apart(p.V[0], tmp_path)[None], p.w, p.last, p.ab, p.c, p.factor)
    check_dots(far)
    check_update(far, with_row=True)
    check_combine(torch.ones(3, 2, dtype=D), far.V[0])
    p = block("members", 2, 1, 3, n, storage)
    members = Block("members", apart(p.V, tmp_path), p.w, p.last, p.ab, p.c, p.factor)
    check_dots(members)
    check_update(members, with_row=True)
    p = block("vectors", 1, 2, 3, n, storage)
    vectors = Block("vectors", p.V, apart(p.w[0], tmp_path)[None], p.last, p.ab, p.c, p.factor)
    check_dots(vectors, removal=False)
    rows = probes("normal", out=apart(torch.zeros(2, n), tmp_path), seed=4)
    assert torch.equal(rows, probes("normal", out=torch.empty(2, n), seed=4))
    out = apart(torch.zeros(2, n), tmp_path)
    combine(torch.eye(2, dtype=D), p.w[0].to(storage), out=out)
    assert torch.equal(out, p.w[0].to(storage).float())
