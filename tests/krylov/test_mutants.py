"""Faults planted in density, bracket and ladder, one line each: the check that the module passes fails on every one of them."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from fastsharp.krylov.batch import Batch
from fastsharp.krylov.block import Block
from fastsharp.operator import CountingOperator, DenseOperator, SymmetricOperator
from tests.oracles.matrices import family

Module = Any
F64 = torch.float64


def mutant(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> Module:
    """`fastsharp.krylov.<name>` with one place of its source replaced; a fault whose place is gone is an error."""
    path = Path(importlib.import_module(f"fastsharp.krylov.{name}").__file__ or "")
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} is found {source.count(old)} times in {path.name}"
    module = types.ModuleType(f"mutant_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.replace(old, new), str(path), "exec"), module.__dict__)
    return module


def check_quadrature(q: Module) -> None:
    """Rules of one T against its moments, then outliers, multiplicity, the floor and the sum on a known spectrum."""
    alpha, beta = [0.3, -0.1, 0.2, 0.05, 0.15, -0.2], [0.5, 0.4, 0.45, 0.5, 0.42, 0.4]
    T = np.diag(alpha) + np.diag(beta[:5], 1) + np.diag(beta[:5], -1)
    for m in (2, 4):
        pair = q._gauss(alpha[: m - 1], beta), q._anti(alpha[:m], beta)
        for k in range(2 * m):
            mean = sum(float((w * x**k).sum()) for x, w in pair) / 2
            assert abs(mean - np.linalg.matrix_power(T, k)[0, 0]) < 1e-13
    parts = q.rule(Block(0, alpha=alpha[:4], beta=beta[:4]), 1.0).parts
    assert len(parts) == 5 and float(parts[-1][0].abs().min()) < 1e-13
    n, times = 300, 40
    lam = torch.cat([torch.tensor([90.0, 50.0]), torch.full((times,), 20.0), torch.linspace(-1, 1, n - 2 - times)]).double()
    for p in (1, 3):
        z = torch.randn(p, n, dtype=F64, generator=torch.Generator().manual_seed(0))
        batch = Batch(DenseOperator(torch.diag(lam)), z, 16)
        while batch.size < 16:
            batch.step()
        (nodes, weights), fixed = q.combined([q.rule(b, float(v @ v)) for b, v in zip(batch.blocks, z, strict=True)], n)
        assert fixed >= 2 * p and abs(float(weights.sum()) - 1.0) < 1e-12
        assert torch.allclose(weights[-2 * p :], torch.full((2 * p,), 1 / (n * p), dtype=F64), rtol=1e-12, atol=0)
        assert abs(float(weights[(nodes - 20).abs() < 1e-3].sum()) * n - times) <= 4 * math.sqrt(2 * times / p)
        assert float(weights.min()) >= (1 - 1e-9) / (p * p * n * 5)  # 1/(pn) in each of five rules, of p probes


def check_cdf(c: Module) -> None:
    """An integral by hand and quantiles of SciPy."""
    at_zero = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    bounds = tuple(torch.tensor(v, dtype=F64) for v in ([0.0, 1.0], [0.0, 1.0], [0.5, 1.0]))
    assert c.w1_bound(at_zero, bounds) == 1.0
    assert c.w1_bound((at_zero[0] + 1, at_zero[1]), bounds) == 0.5
    degrees = torch.tensor([1, 7, 500])
    assert np.allclose(c._quantile(degrees, 1e-4, upper=True), scipy.stats.chi2.isf(1e-4, degrees.numpy()), rtol=1e-9)
    assert np.allclose(c._quantile(degrees, 1e-4, upper=False), scipy.stats.chi2.ppf(1e-4, degrees.numpy()), rtol=1e-9)
    _, high, low = c._table(50, 2, 0.04)
    assert float(high[0]) == pytest.approx(scipy.stats.chi2.isf(0.01 / len(high), 2)) and float(low[0]) < float(high[0])


def check_bracket(b: Module) -> None:
    """One interval against NumPy's eigenvectors and SciPy's t, and the rule that doubles the sample."""
    N, m, size, confidence = 400, 4, 128, 0.9
    g = np.random.default_rng(0)
    X = torch.from_numpy(g.standard_normal((N, 6)) * np.arange(1, 7) ** -0.5 * (1 + np.abs(g.standard_t(5, (N, 1)))))

    def mean_of(indices: torch.Tensor) -> DenseOperator:
        return DenseOperator(X[indices].T @ X[indices] / len(indices))

    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    search = b._Search(mean_of, 1e-9, confidence, m, order, 0)
    search.step(size)
    A, B, S = order[: size // 2], order[size // 2 : size], order[:size]
    tops = {name: np.linalg.eigh(mean_of(part)._A.numpy())[1][:, -1] for name, part in (("A", A), ("B", B), ("S", S))}

    def forms(part: torch.Tensor, u: np.ndarray) -> np.ndarray:
        return np.array([u @ mean_of(fold)._A.numpy() @ u for fold in part.tensor_split(m)])

    t, t_upper = (scipy.stats.t.ppf((1 + confidence) / 2, dof) for dof in (m - 1, 2 * m - 1))
    lower = np.mean([q.mean() - t * q.std(ddof=1) / m**0.5 for q in (forms(A, tops["B"]), forms(B, tops["A"]))])
    along = np.r_[forms(A, tops["S"]), forms(B, tops["S"])]
    upper = np.linalg.eigvalsh(mean_of(S)._A.numpy())[-1] + t_upper * along.std(ddof=1) / (2 * m) ** 0.5
    _, found_lower, found_upper = search.history[-1]
    scale = upper - lower
    assert abs(found_lower - lower) < 5e-3 * scale and abs(found_upper - upper) < 5e-3 * scale  # the expansion of t is good to 1 %
    run = b.bracket(mean_of, N, rtol=1e-9, start=64, folds=m)
    assert [s for s, _, _ in run.history] == [64, 128, N]
    exact = float(np.linalg.eigvalsh(mean_of(torch.arange(N))._A.numpy())[-1])
    assert run.lower <= exact <= run.upper and run.upper - run.lower <= 1e-6 * exact


class Noisy(SymmetricOperator):
    """A random vector of relative size 1e-2 is added to each product."""

    noise = 1e-2

    def __init__(self, inner: SymmetricOperator) -> None:
        super().__init__(inner.n, inner.dtype, inner.device)
        self.inner, self.g = inner, torch.Generator().manual_seed(0)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.inner.apply(V, out)
        e = torch.randn(V.shape, generator=self.g, dtype=V.dtype)
        out += e * (self.noise * out.norm(dim=1) / e.norm(dim=1))[:, None]


def check_ladder(module: Module) -> None:
    """Values, bounds, true residuals and counts of a noisy run; a wrong cheap matrix leads to the exact one."""
    case = family("outliers_rotated", 120, F64)
    A = DenseOperator(case.tensor(F64))
    cheap, exact = CountingOperator(Noisy(A)), CountingOperator(A)
    result = module.ladder(cheap, exact, k=3, tol=1e-3, check="off")
    want = torch.from_numpy(np.sort(case.exact)[::-1][:3].copy())
    assert not result.settings["fallback"] and bool(result.converged.all())
    assert (cheap.count, exact.count) == (result.n_matvec, result.n_verify)
    assert bool(((result.eigenvalues - want).abs() <= result.error_bounds).all())
    X = result.eigenvectors
    true = (A.apply(X) - result.eigenvalues[:, None] * X).norm(dim=1)
    assert float((true - result.residuals).abs().max()) <= 1e-10 * case.norm
    assert bool((true <= 1e-3 * want).all())
    other = DenseOperator(0.5 * case.tensor(F64))
    assert module.ladder(other, A, k=3, tol=1e-3, check="off").settings["fallback"]


CHECKS: dict[str, Callable[[Module], None]] = {
    "quadrature": check_quadrature,
    "cdf": check_cdf,
    "bracket": check_bracket,
    "ladder": check_ladder,
}
FAULTS = [
    ("quadrature", "math.sqrt(2.0) * beta[m - 2]", "beta[m - 2]"),
    ("quadrature", "(residuals.square() / nodes)", "(residuals / nodes)"),
    ("quadrature", "new_full((low + high,), 1.0 / n)", "new_full((low + high,), 1.0 / m)"),
    ("quadrature", "& (mass < _largest_simple(len(rules)))", ""),
    ("quadrature", "_floored(w, 1.0 / (p * n))", "_floored(w, 0.0)"),
    ("quadrature", "raised[largest] -= raised.sum() - weights.sum()", "pass"),
    ("quadrature", "weights / weights.sum()), fixed", "weights), fixed"),
    ("quadrature", "left = 1.0 - (low + high) / n", "left = 1.0"),
    ("cdf", "torch.maximum(high - F, F - low)", "(high - F)"),
    ("cdf", "a = degrees.double() / 2", "a = degrees.double()"),
    ("cdf", "tail = allowance / (4 * mesh.numel())", "tail = allowance / 4"),
    ("bracket", "u_B = self._top(B, None)", "u_B = self._top(A, None)"),
    ("bracket", "self._forms(part, u_B, u_S) for part in A", "self._forms(part, u_A, u_S) for part in A"),
    ("bracket", "q[:, 0].std() / math.sqrt(m)", "q[:, 0].std() / m"),
    ("bracket", "along.std()) / math.sqrt(2 * m)", "along.std()) / math.sqrt(m)"),
    ("bracket", "(1 + self.confidence) / 2, m - 1)", "self.confidence, m - 1)"),
    ("bracket", "while 2 * b <= self.order.numel()", "while 4 * b <= self.order.numel()"),
    ("bracket", "value - bound, value + bound", "value, value + 2 * bound + 1"),
    ("ladder", "        Y = self._product(X)\n", "        Y = scale(self._cheap.apply(X), -self._shift)\n"),
    ("ladder", "torch.cat([Y, self._product(D)])", "torch.cat([Y, scale(self._cheap.apply(D), -self._shift)])"),
    ("ladder", "_RESIDUAL_STEPS = 6", "_RESIDUAL_STEPS = 0"),
    ("ladder", "self.exact_products += len(X)", "self.exact_products += 1"),
    ("ladder", "value_bounds(theta, r)[wanted] if", "0 * value_bounds(theta, r)[wanted] if"),
    ("ladder", "wanted = select(values, self.request.which, self.request.k)", "wanted = torch.arange(self.request.k)"),
    ("ladder", "if apart > math.sqrt", "if 0 * apart > math.sqrt"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_module_itself_passes(name: str) -> None:
    CHECKS[name](importlib.import_module(f"fastsharp.krylov.{name}"))


@pytest.mark.filterwarnings("ignore::fastsharp.errors.NotConvergedWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "old", "new"), FAULTS, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(FAULTS)])
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        CHECKS[name](mutant(monkeypatch, name, old, new))
