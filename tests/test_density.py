"""`fastsharp.density` and its result: arguments, records, interrupts, and what the methods of Density promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, NotSymmetricError
from fastsharp.krylov import density as krylov_density
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator
from tests.oracles.dense import dense_hessian, eigenvalues
from tests.oracles.matrices import Case, families, family, scaled_families

F64 = torch.float64
CASE = family("outliers_rotated", 90, F64)


def of(case: Case, dtype: torch.dtype = F64, **arguments: Any) -> fastsharp.Density:
    return fastsharp.density(case.tensor(dtype), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 3, 20, 105])
def test_P11_weights_sum_to_one_and_the_density_integrates_to_one(n: int, dtype: torch.dtype) -> None:
    for case in families(n, dtype):
        for probes in (1, 3):
            d = of(case, dtype, steps=15, probes=probes)
            assert abs(float(d.weights.sum()) - 1) <= 1e-6 and bool((d.nodes.diff() >= 0).all())
            widths = [None, 0.1 * max(case.norm, 1.0)] if n == 20 else [None]
            for width in widths:
                x = d.grid(width)
                assert abs(float(torch.trapezoid(d.pdf(x, width), x)) - 1) <= 1e-3, (case.name, probes, width)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_near_the_ends_of_the_range_are_as_good(dtype: torch.dtype) -> None:
    for case in scaled_families(40, dtype):
        d = of(case, dtype, steps=40)
        distance = np.abs(d.nodes.numpy()[:, None] / case.norm - case.exact / case.norm).min(1)
        assert distance.max() <= 10 * 40 * torch.finfo(dtype).eps, case.name  # the space is exhausted: every node is an eigenvalue
        assert bool(torch.isfinite(d.nodes).all()) and np.isfinite(d.w1_bound)


@pytest.mark.parametrize("p", [-60, 60])
def test_powers_of_two_scale_the_result_bitwise(p: int) -> None:
    A = CASE.tensor(torch.float32)
    a, b = fastsharp.density(A, steps=20), fastsharp.density(A * 2.0**p, steps=20)
    assert torch.equal(a.nodes * 2.0**p, b.nodes) and torch.equal(a.weights, b.weights)
    assert a.w1_bound * 2.0**p == b.w1_bound and torch.equal(a.lower, b.lower)


def test_a_models_density_is_that_of_its_dense_hessian() -> None:
    """All n = 27 eigenvalues are found, each with the weight 1/n: the CDF is that of LAPACK."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(24, 4, dtype=F64), torch.randint(3, (24,))
    H = dense_hessian(model, lambda call, b: nn.functional.cross_entropy(call(b[0]), b[1]), (x, y))
    exact = eigenvalues(H).flip(0)
    d = fastsharp.density(model, [(x[:10], y[:10]), (x[10:], y[10:])], probes=2)
    from scipy.stats import wasserstein_distance

    assert wasserstein_distance(exact, d.nodes, None, d.weights) <= d.w1_bound
    assert d.moment(1) == pytest.approx(float(exact.mean()), abs=d.w1_bound)
    assert d.provenance and d.settings["probes"] == 2


def test_cdf_quantile_and_moments_are_those_of_the_nodes() -> None:
    d = of(CASE, steps=12)
    between = (d.nodes[1:] + d.nodes[:-1]) / 2
    assert torch.allclose(d.cdf(between), d.weights.cumsum(0)[:-1], rtol=1e-14)
    assert d.cdf(-1e9) == 0 and d.cdf(1e9) == pytest.approx(1.0) and d.cdf(between.view(1, -1)).shape == (1, len(between))
    assert torch.equal(d.quantile(torch.tensor([0.0, 1.0])), d.nodes[[0, -1]])
    assert d.mean == d.moment(1) and d.moment(0) == pytest.approx(1.0)
    assert d.moment(2) == pytest.approx(float((CASE.exact**2).mean()), rel=0.05)  # the outliers carry it, and they are exact
    with pytest.raises(InputError, match="quantile"):
        d.quantile(1.5)


def test_band_is_the_spread_over_the_probes_and_bounds_hold_it_apart() -> None:
    d = of(CASE, steps=12, probes=3)
    x = torch.linspace(-1, 101, 50, dtype=F64)
    low, high = d.band(x)
    assert bool((low <= high).all()) and float((high - low).max()) > 0
    low, high = d.band(x, of="pdf", width=2.0)
    assert bool((low <= high).all()) and bool((low >= 0).all())
    low, high = d.bounds(x)
    assert bool((low <= high).all()) and bool((low[1:] >= low[:-1]).all()) and float(d.bounds(1e9)[0]) == 1.0
    with pytest.raises(InputError, match="one probe has no spread"):
        of(CASE, steps=5).band(x)
    with pytest.raises(InputError, match="'cdf' or 'pdf'"):
        d.band(x, of="both")


def test_rademacher_probes_are_exact_on_diagonal_matrices_and_have_no_bounds() -> None:
    d = fastsharp.density(torch.diag(torch.arange(1.0, 31.0, dtype=F64)), steps=6, kind="rademacher")
    nodes, weights = d.probes[0]
    assert float((weights * nodes**2).sum()) == pytest.approx(sum(i * i for i in range(1, 31)) / 30, rel=1e-12)
    assert d.w1_bound == float("inf") and any("no bounds" in note for note in d.notes)
    with pytest.raises(InputError, match="kind='normal'"):
        d.bounds(0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"probes": 0}, InputError, "probes is 0"),
        ({"probes": True}, ArgumentTypeError, "probes is True"),
        ({"steps": 0}, InputError, "steps is 0"),
        ({"steps": -3}, InputError, "steps is -3"),
        ({"steps": 8.0}, ArgumentTypeError, "steps is 8.0"),
        ({"seed": 0.5}, ArgumentTypeError, "seed is 0.5"),
        ({"seed": 2**63}, InputError, "64-bit"),
        ({"kind": "gaussian"}, InputError, "kind is 'gaussian'"),
        ({"preflight": "some"}, InputError, "preflight"),
        ({"loader": [1]}, InputError, "only for a torch.nn.Module"),
    ],
)
def test_a_bad_argument_is_named_before_any_product(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    counted = CountingOperator(DenseOperator(CASE.tensor(F64)))
    with pytest.raises(error, match=match):
        fastsharp.density(counted, **arguments)
    assert counted.count == 0


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_width_that_is_no_positive_number_raises(width: Any) -> None:
    with pytest.raises(InputError, match="width is"):
        of(CASE, steps=5).pdf(0.0, width)


def test_every_product_is_accounted_for() -> None:
    A = CASE.tensor(F64)
    counted = CountingOperator(CallableOperator(lambda v: A @ v, 90, F64))
    seen: list[tuple[int, float]] = []
    d = krylov_density(counted, probes=3, steps=7, on_step=lambda step, _, expected: seen.append((step, expected)))
    assert d.n_matvec == 21 and d.settings["probe_products"] == 4 and counted.count == 25
    assert seen == [(3 * j, 21) for j in range(1, 8)]


def test_two_runs_are_bitwise_equal_and_seeds_differ() -> None:
    a, b, c = (of(CASE, steps=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.nodes, b.nodes) and torch.equal(a.weights, b.weights) and not torch.equal(a.nodes, c.nodes)


def raising(at: int, error: BaseException) -> CallableOperator:
    A, calls = CASE.tensor(F64), 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return A @ v

    return CallableOperator(product, 90, F64)


@pytest.mark.parametrize(("at", "steps"), [(1, 0), (2, 0), (3, 1), (11, 5), (12, 5)])
def test_ctrl_c_leaves_the_density_so_far(at: int, steps: int) -> None:
    with pytest.raises(Interrupted) as caught:
        fastsharp.density(raising(at, KeyboardInterrupt()), probes=2, steps=8, preflight="off")
    partial = caught.value.partial
    if steps == 0:
        assert partial is None
    else:
        whole = fastsharp.density(raising(0, KeyboardInterrupt()), probes=2, steps=steps, preflight="off")
        assert torch.equal(partial.nodes, whole.nodes) and torch.equal(partial.weights, whole.weights)


def test_any_exception_is_the_same_object_with_partial_and_an_asymmetric_matrix_gives_none() -> None:
    error = MemoryError("out of memory")
    with pytest.raises(MemoryError) as caught:
        fastsharp.density(raising(6, error), steps=8, preflight="off")
    assert caught.value is error and isinstance(error.partial, fastsharp.Density)  # type: ignore[attr-defined]
    with pytest.raises(NotSymmetricError) as asymmetric:
        fastsharp.density(raising(6, NotSymmetricError("moved")), steps=8, preflight="off")
    assert not hasattr(asymmetric.value, "partial")


@pytest.mark.parametrize("A", [torch.zeros(30, 30), torch.eye(30), CASE.tensor(F64)])
@pytest.mark.parametrize("arguments", [{}, {"probes": 3}, {"kind": "rademacher"}])
def test_densities_can_be_drawn(A: torch.Tensor, arguments: dict[str, Any], tmp_path: Any) -> None:
    fig = fastsharp.density(A, steps=12, **arguments).plot(tmp_path / "density.png")
    assert len(fig.axes) == 3 and fig.axes[0].get_yscale() == "log"
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
