"""Every Krylov op as a share of what this machine reads from memory, and a whole Lanczos step against torch's.

    pytest bench/bench_krylov.py -s                           a table per case, and rows in bench/results/krylov.jsonl
    pytest bench/bench_krylov.py -s -k "float16-b1 and j100"  some cases; one takes less than two minutes at n = 1e7, j = 100
    FASTSHARP_BENCH_N=1e6 pytest ...                          other sizes, comma-separated; FASTSHARP_BENCH_REPS: rounds (9)

Bars. alpha, dots, update, combine and probes reach 80 % of the read stream on a CPU (one vector, float32 and float16 rows), 85 % of the
better of copy and cuBLAS mv on a GPU. A reorthogonalised step costs at most 0.55 of torch's Gram-Schmidt twice (CGS2), no more than torch's
single pass with alpha removed first, and with float16 rows at most 0.6 of itself with float32 rows. What arithmetic limits (normal
probes, several vectors or combinations) has no bar; its share is shown all the same.
Bytes are those an op cannot avoid: each row of V once, each vector once per reading or writing, in the size of its dtype.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import harness, roofline
from bench.harness import Timing, Variant
from fastsharp.krylov.basis import Basis, HalfRows, Rows
from fastsharp.ops import _registry, alpha, combine, dots, probes, update
from tests.ops.blocks import block, check_combine, check_dots, check_update
from tests.ops.cases import case, check_alpha

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
SIZES = [int(float(n)) for n in os.environ.get("FASTSHARP_BENCH_N", "1e6,1e7").split(",")]
REPS = int(os.environ.get("FASTSHARP_BENCH_REPS", "9"))
BAR_PCT = {"cpu": 80.0, "cuda": 85.0}
MOST_BYTES = 4.5e9  # of a basis
STEP_BARS = {"step / torch CGS2": 0.55, "step / torch one pass": 1.0, "float16 step / step": 0.6}


@dataclass(frozen=True)
class Case:
    """Rows of `storage`, b vectors at once, E members that share the n entries among them; `ops` have a bar."""

    storage: torch.dtype
    b: int = 1
    E: int = 1
    barred: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.storage == torch.float64 else torch.float32


BARRED = ("alpha", "dots", "dots, second pass", "update", "combine k=1")
CASES = {
    "float32-b1": Case(torch.float32, barred=BARRED),
    "float16-b1": Case(torch.float16, barred=BARRED),
    "bf16-b1": Case(torch.bfloat16),
    "float64-b1": Case(torch.float64),
    **{f"{name}-b{b}": Case(getattr(torch, name), b=b) for name in ("float32", "float16") for b in (2, 4, 8)},
    **{f"{name}-members": Case(getattr(torch, name), E=8) for name in ("float32", "float16")},
}


def each(name: str, values: list[Any]) -> Any:
    return pytest.mark.parametrize(name, values, ids=lambda x: f"{name}{x}" if isinstance(x, int) else str(x))


@each("device", DEVICES)
@pytest.mark.parametrize("kind", CASES.values(), ids=CASES.keys())
@each("j", [20, 100])
@each("n", SIZES)
def test_share_of_the_read_stream(benchmark: Any, n: int, j: int, kind: Case, device: torch.device) -> None:
    V = torch.empty(kind.E, j, n // kind.E, dtype=kind.storage, device="meta")
    if device.type == "cpu" and V.nbytes > MOST_BYTES:
        pytest.skip(f"a basis of {V.nbytes / 1e9:.0f} GB, more than {MOST_BYTES / 1e9:g}")
    _verify(kind, device)
    V = _normal(V.shape, kind.storage, device)
    variants = [*roofline.read_variants(V.view(-1)), *_ops(kind, V)]
    timings = harness.interleaved(variants, REPS, device)
    _report(benchmark, timings, kind.barred, device, n=n, j=j, b=kind.b, members=kind.E, storage=str(kind.storage), dtype=str(kind.dtype))


@each("device", DEVICES)
@each("n", SIZES)
def test_probes(benchmark: Any, n: int, device: torch.device) -> None:
    x, stream = torch.empty(1, n, device=device), _normal((20 * n,), torch.float32, device)
    variants = [
        *roofline.read_variants(stream),
        Variant("torch.fill_", lambda: x.fill_(1), x.nbytes),
        *(Variant(f"probes {k}", lambda k=k: probes(k, out=x, seed=1), x.nbytes) for k in ("rademacher", "normal")),
    ]
    _report(
        benchmark,
        harness.interleaved(variants, REPS, device),
        ("probes rademacher",),
        device,
        n=n,
        j=0,
        b=1,
        members=1,
        dtype="torch.float32",
    )


@each("device", DEVICES)
@each("j", [20, 100])
@each("n", SIZES)
def test_step(benchmark: Any, n: int, j: int, device: torch.device) -> None:
    """w <- (I - V'V)(w - alpha v_j - beta v_{j-1}), its norm and all coefficients, as the solver does it and as torch would."""
    _verify(CASES["float32-b1"], device)
    _verify(CASES["float16-b1"], device)
    full, half = Rows(n, torch.float32, device, j + 1, upfront=True), HalfRows(n, device, j + 1, upfront=True)
    for i in range(j):
        row = _normal((n,), torch.float32, device, first=i).div_(n**0.5)
        full.place(i, row)
        half.place(i, row)
    V, w = full.rows(j), _normal((n,), torch.float32, device, first=j)
    ab = torch.tensor([0.0, 1e-3], dtype=torch.float64, device=device)
    c, after = torch.empty(j + 1, dtype=torch.float64, device=device), torch.empty(1, dtype=torch.float64, device=device)

    def step(basis: Basis) -> None:
        alpha(basis.vector(j - 1), basis.vector(j), out=ab[:1])
        basis.project(j, ab, c, after)

    def torch_pass() -> None:
        torch.addmv(w, V.T, torch.mv(V, w), out=w, alpha=-1)

    def twice() -> Tensor:
        torch_pass()
        torch_pass()
        return torch.linalg.vector_norm(w)

    def once() -> Tensor:
        w.addcmul_(V[-1], torch.dot(V[-1], w), value=-1).add_(V[-2], alpha=-1e-3)
        torch_pass()
        return torch.linalg.vector_norm(w)

    for basis in (full, half):
        basis.vector(j).copy_(w)
    v, rows = w.nbytes, V.nbytes
    # alpha reads 2 vectors; dots and update read and write w; with float16 rows dots reads v_j and v_{j-1} beside them, update writes one
    variants = [
        *roofline.read_variants(V.reshape(-1) if V.is_contiguous() else V[0].contiguous()),
        Variant("step", lambda: step(full), 2 * rows + 6 * v, {"storage": "torch.float32"}),
        Variant("float16 step", lambda: step(half), rows + 8 * v + v // 2, {"storage": "torch.float16"}),
        Variant("torch CGS2", twice, 4 * rows + 7 * v),
        Variant("torch one pass", once, 2 * rows + 12 * v),
    ]
    timings = harness.interleaved(variants, REPS, device)
    for ratio, bar in STEP_BARS.items():
        ours, theirs = (timings[name] for name in ratio.split(" / "))
        value = ours.median / theirs.median
        ours.variant.fields[ratio] = round(value, 3)
        print(f"\n  {ratio}: {value:.3f}, bar {bar:g}{'' if value <= bar else '  <- ABOVE'}", end="")
    _report(benchmark, timings, (), device, n=n, j=j, b=1, members=1, dtype="torch.float32")


def _verify(kind: Case, device: torch.device) -> None:
    """The checkers of the tests on this device and storage."""
    form = "members" if kind.E > 1 else "vectors" if kind.b > 1 else "single"
    check_alpha(case(7, 10007, kind.dtype, pad=5, device=device))
    for single in (True, False) if kind.b == 1 else (False,):
        k = block(form, kind.E, kind.b, 7, 10007, kind.storage, device=device)
        check_dots(k, removal=single)
        check_update(k, with_row=single)
    check_combine(torch.ones(3, 7, dtype=torch.float64, device=device), block("single", 1, 1, 7, 10007, kind.storage, device=device).V[0])


def _normal(shape: tuple[int, ...], storage: torch.dtype, device: torch.device, first: int = 0) -> Tensor:
    """Normals; read as pairs, half-precision ones are finite floats, so that the read stream may sum them."""
    x = torch.empty(shape, dtype=storage, device=device)
    rows = x.view(-1, shape[-1])
    row = torch.empty(1, shape[-1], device=device)
    for i in range(rows.shape[0]):
        rows[i] = probes("normal", out=row, seed=0, first=first + i)[0]
    return x


def _ops(kind: Case, V: Tensor) -> list[Variant]:
    """What there is for this case. Coefficients are small, so that nothing grows over the rounds."""
    (E, j, n), device, b = V.shape, V.device, kind.b
    lead = (*((E,) if E > 1 else ()), *((b,) if b > 1 else ()))
    basis = V if E > 1 else V[0]
    ones = torch.ones(*lead or (1,), dtype=torch.float64, device=device)
    w = _normal((*lead, n), kind.dtype, device)
    c = torch.full((*lead, j), 1e-6, dtype=torch.float64, device=device)
    sums, squares = torch.empty(*lead, j + 1, dtype=torch.float64, device=device), torch.empty_like(ones)
    rows, vectors, vector = V.nbytes, w.nbytes, w.nbytes // b
    if b > 1:
        found = [
            Variant("dots", lambda: dots(basis, w, out=sums), rows + vectors),
            Variant("update", lambda: update(basis, w, c, out=squares), rows + 2 * vectors),
        ]
    else:
        last, row = (torch.zeros_like(w), torch.zeros_like(w)), torch.empty(*lead, n, dtype=kind.storage, device=device)
        ab = 1e-3 * torch.ones(*lead, 2, dtype=torch.float64, device=device)
        half = kind.storage != kind.dtype
        written = {"row": row, "factor": ones} if half else {}
        found = [
            Variant("alpha", lambda: alpha(last[0], w, out=squares), 2 * vector),
            Variant("dots", lambda: dots(basis, w, ab, out=sums, last=last), rows + 4 * vector),
            Variant("dots, second pass", lambda: dots(basis, w, out=sums), rows + vector),
            Variant("update", lambda: update(basis, w, c, out=squares, **written), rows + 2 * vector + half * row.nbytes),
        ]
    if E > 1:
        return found
    if b == 1:
        for k in (1, 10):
            S, out = torch.full((k, j), 0.1, dtype=torch.float64, device=device), torch.empty(k, n, dtype=kind.dtype, device=device)
            found.append(Variant(f"combine k={k}", lambda S=S, out=out: combine(S, basis, out=out), rows + out.nbytes, {"k": k}))
    if kind.storage == kind.dtype:
        few = c.to(kind.dtype)
        if b == 1:
            found.append(Variant("torch.mv", lambda: torch.mv(basis, w), rows + vector))
            found.append(Variant("torch.addmv", lambda: torch.addmv(w, basis.T, few, out=w, alpha=-1), rows + 2 * vector))
        else:
            found.append(Variant("torch.mm", lambda: torch.mm(basis, w.T), rows + vectors))
            found.append(Variant("torch.addmm", lambda: torch.addmm(w, few, basis, out=w, alpha=-1), rows + 2 * vectors))
    return found


def _report(benchmark: Any, timings: dict[str, Timing], barred: tuple[str, ...], device: torch.device, **fields: Any) -> None:
    """The table, the rows, and the numbers for pytest-benchmark."""
    roof, by = roofline.ceiling(timings, *(("torch.mv",) if device.type == "cuda" else ()))
    backend, bar = _registry.choose(device).name, BAR_PCT[device.type]
    what = ", ".join(f"{key} = {value}" for key, value in fields.items())
    print(f"\n{backend} on {device}, {what}, {torch.get_num_threads()} threads; ceiling {roof:.2f} GB/s ({by})")
    for name, t in timings.items():
        share = 100 * t.gbps / roof
        below = f"  <- BELOW {bar:g} %" if name in barred and share < bar else ""
        print(f"  {name:18s} {1e3 * t.median:9.3f} ms  [{1e3 * t.q20:.3f}, {1e3 * t.q80:.3f}]  {t.gbps:8.2f} GB/s  {share:5.1f} %{below}")
        if name in barred:
            t.variant.fields["bar_pct"] = bar
        if name not in roofline.READS:
            benchmark.extra_info[name] = {"gbps": t.gbps, "roofline_pct": share}
    harness.write_rows(harness.RESULTS / "krylov.jsonl", timings, roof, backend=backend, device=str(device), ceiling=by, **fields)
    benchmark.pedantic(list(timings.values())[-1].variant.run, rounds=1)
