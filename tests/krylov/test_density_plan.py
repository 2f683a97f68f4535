"""The memory plan of a density: what is taken where, that a run keeps to it, and that its numbers are those of an unbounded run."""

from __future__ import annotations

import json
import math

import pytest
import torch

import fastsharp
from bench.memory import Peak
from fastsharp.errors import BasisMemoryError
from fastsharp.krylov import density_plan
from fastsharp.krylov.basis import HalfRows, HostRows
from fastsharp.krylov.density_plan import DensityPlan, make_density_plan
from fastsharp.krylov.slq import density
from fastsharp.operator import SymmetricOperator

N, PROBES, STEPS = 60_000, 4, 40
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROW = 4 * N
EACH, SCRATCH = (STEPS + 2) * ROW, 2 * ROW


@pytest.fixture(autouse=True)
def _rationed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density_plan, "UNRATIONED", 0)


class Diagonal(SymmetricOperator):
    """Five outliers above [0, 1]; a product takes no memory of its own."""

    def __init__(self) -> None:
        super().__init__(N, torch.float32, CPU)
        self._d = torch.rand(N, generator=torch.Generator().manual_seed(3))
        self._d[:5] = torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(V, self._d, out=out)


def planned(memory: int | None, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32, host: int | None = None) -> DensityPlan:
    return make_density_plan(N, dtype, device, PROBES, STEPS, memory, host)


@pytest.mark.parametrize(
    ("memory", "want"),
    [
        (None, ("float32", "device", 4)),
        (4 * EACH + SCRATCH, ("float32", "device", 4)),
        (4 * EACH + SCRATCH - 1, ("float32", "device", 3)),
        (EACH + SCRATCH, ("float32", "device", 1)),
        (EACH + SCRATCH - 1, ("float16", "device", 1)),
    ],
)
def test_the_first_that_fits_is_taken(memory: int | None, want: tuple[object, ...]) -> None:
    p = planned(memory)
    assert (p.storage, p.place, p.at_once) == want and p.rows == STEPS and p.expected_products == PROBES * STEPS
    assert memory is None or p.bytes <= memory
    assert json.loads(json.dumps(p.record())) == p.record()


def test_a_gpu_turns_to_the_host_before_it_gives_up() -> None:
    p = planned(14 * ROW, device=CUDA, host=60 * ROW)
    assert (p.storage, p.place, p.at_once, p.host_bytes) == ("float32", "host", 1, (STEPS + 8) * ROW) and p.bytes <= 14 * ROW
    assert type(p.basis(100, torch.float32, CPU)) is HostRows and type(planned(EACH).basis(100, torch.float32, CPU)) is HalfRows
    with pytest.raises(BasisMemoryError):
        planned(14 * ROW, device=CUDA, host=40 * ROW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_does_not_fit_names_what_would(dtype: torch.dtype) -> None:
    with pytest.raises(BasisMemoryError, match=r"(?s)40 steps on n = 60,000 .* one probe at least, .*\((\d+) would fit\)") as caught:
        planned(10 * ROW, dtype=dtype)
    fitting = int(str(caught.value).split(" would fit")[0].split("(")[-1])
    if fitting:
        make_density_plan(N, dtype, CPU, PROBES, fitting, 10 * ROW)
    with pytest.raises(BasisMemoryError):
        make_density_plan(N, dtype, CPU, PROBES, fitting + 1, 10 * ROW)


@pytest.mark.parametrize("memory", [4 * EACH + SCRATCH, 2 * EACH + SCRATCH, EACH + SCRATCH, EACH])
def test_a_run_keeps_to_its_budget_and_says_how(memory: int) -> None:
    """Peak of all tensors of the run; beside rows of n there are chunks of 2^15 float64 columns and small matrices."""
    A, heard = Diagonal(), []
    with Peak() as seen:
        result = density(A, probes=PROBES, steps=STEPS, check="off", memory=memory, on_plan=heard.append)
    plan = result.settings["plan"]
    assert heard[0].record() == plan and plan["budget"] == memory and plan["bytes"] <= memory
    small = 2 * 2**15 * 8 + 2**16
    assert seen.peak <= plan["bytes"] + small, f"{seen.peak / ROW:.1f} rows, planned {plan['bytes'] / ROW:.1f}"
    assert seen.peak >= plan["bytes"] / 2, "the budget is not used"
    free = density(A, probes=PROBES, steps=STEPS, check="off")
    assert result.n_matvec == free.n_matvec == PROBES * STEPS and len(result.probes) == PROBES
    if plan["storage"] == "float32":
        assert torch.equal(result.nodes, free.nodes) and torch.equal(result.weights, free.weights) and result.w1_bound == free.w1_bound
    else:  # Ritz values move by the square of a row's rounding, 2^-11 a row, times the norm
        off = STEPS * 2.0**-22 * 9 + 1e3 * torch.finfo(torch.float32).eps * 9
        assert any("float16" in note for note in result.notes)
        for x in torch.linspace(0.02, 0.98, 25, dtype=torch.float64):
            assert float(free.cdf(x - off)) - 2e-3 <= float(result.cdf(x)) <= float(free.cdf(x + off)) + 2e-3
        assert math.isclose(result.mean, free.mean, rel_tol=1e-3)


def test_the_call_for_models_plans_within_half_of_the_budget(tmp_path: object) -> None:
    """One Hessian, its budget cut: the same numbers from fewer probes at once, or an error before a product."""
    d = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    A = (lambda v: d * v, 2000)
    free = fastsharp.density(A, probes=3, steps=10, preflight="off")
    less = fastsharp.density(A, probes=3, steps=10, preflight="off", memory=2 * (12 * 8000 + 2 * 8000))
    assert (free.settings["plan"]["at_once"], less.settings["plan"]["at_once"]) == (3, 1)
    assert torch.equal(less.nodes, free.nodes) and torch.equal(less.weights, free.weights)
    with pytest.raises(BasisMemoryError, match="density: 10 steps on n = 2,000"):
        fastsharp.density(A, probes=3, steps=10, preflight="off", memory=20_000)
