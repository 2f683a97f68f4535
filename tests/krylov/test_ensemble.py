"""Lockstep Lanczos over the members of an ensemble gives each the pairs, the doubts and the errors of a run of its own."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fastsharp.errors import (
    Interrupted,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    NotSymmetricError,
    ShapeError,
    StaleOperatorError,
)
from fastsharp.krylov.block import Block
from fastsharp.krylov.ensemble import lanczos_ensemble
from fastsharp.krylov.lanczos import lanczos
from fastsharp.krylov.request import check_arguments
from fastsharp.krylov.stopping import StopRule, StopRules, Targets
from fastsharp.operator import CallableOperator, EnsembleOperator, SymmetricOperator
from tests.krylov.checks import eps_of

F64 = torch.float64
N = 120


class Stack(EnsembleOperator):
    """E full matrices; the products taken, by member, and the rows of each call."""

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__(A.shape[0], A.shape[1], A.dtype, A.device)
        self.A, self.taken, self.calls = A, [0] * A.shape[0], []
        self.stale = False

    def member(self, e: int) -> SymmetricOperator:
        return CallableOperator(lambda v: self.apply(v[None], torch.tensor([e]))[0], self.n, self.dtype)

    def check_unchanged(self) -> None:
        if self.stale:
            raise StaleOperatorError("changed")

    def _apply(self, V: torch.Tensor, member: torch.Tensor, out: torch.Tensor) -> None:
        self.calls.append(len(V))
        for r, e in enumerate(member.tolist()):
            self.taken[e] += 1
            out[r] = self.A[e] @ V[r]


def alone(A: torch.Tensor) -> SymmetricOperator:
    return CallableOperator(lambda v: A @ v, A.shape[0], A.dtype)


def stack(*spectra: torch.Tensor, dtype: torch.dtype = F64) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    found = []
    for values in spectra:
        Q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=F64))[0]
        A = (Q * values) @ Q.T
        found.append((A + A.T) / 2)
    return torch.stack(found).to(dtype)


def spectrum(top: float, ratio: float) -> torch.Tensor:
    return torch.cat([top * ratio ** torch.arange(N - 40, dtype=F64), -0.3 * ratio ** torch.arange(40, dtype=F64)])


def ensemble(S: Stack, **options: Any) -> list[Any]:
    asked = {name: options.pop(name) for name in ("v0", "memory", "on_step") if name in options}
    given = {"k": 5, "which": "LA", "tol": 1e-3, "criterion": "residual", "max_iter": None, "method": "auto"} | options
    return lanczos_ensemble(S, check_arguments(S.n, **given), **asked)


def both(A: torch.Tensor, **options: Any) -> tuple[list[Any], list[Any], Stack]:
    """Together, one by one, and the ensemble that counted."""
    options = {"method": "lanczos", "check": "off"} | options
    S = Stack(A)
    return ensemble(S, **options), [lanczos(alone(a), **options) for a in A], S


def assert_same(together: Any, single: Any, scale: float) -> None:
    """All fields: the recurrences differ by rounding in dots and in T, a few eps ||A||; vectors by that over the smallest gap."""
    eps = eps_of(together.eigenvectors.dtype)
    torch.testing.assert_close(together.eigenvalues, single.eigenvalues, rtol=0, atol=50 * eps * scale)
    assert torch.equal(together.converged, single.converged) and together.verified == single.verified
    assert (together.n_matvec, together.n_verify, together.notes) == (single.n_matvec, single.n_verify, single.notes)
    assert set(together.settings) == set(single.settings)
    for name, value in single.settings.items():
        if name != "norm":
            assert together.settings[name] == value, name
    assert together.settings["norm"] == pytest.approx(single.settings["norm"], rel=1e-5)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("criterion", ["residual", "value"])
def test_each_member_gets_the_result_of_its_own_run(which: str, criterion: str) -> None:
    A = stack(spectrum(9.0, 0.5), spectrum(4.0, 0.9), spectrum(100.0, 0.7))
    together, single, _ = both(A, k=3, which=which, criterion=criterion)
    for a, t, s in zip(A, together, single, strict=True):
        scale = float(torch.linalg.eigvalsh(a).abs().max())
        assert_same(t, s, scale)
        exact = torch.linalg.eigvalsh(a)
        error = (exact - t.eigenvalues[:, None]).abs().amin(1)
        assert bool((error <= t.error_bounds + 50 * eps_of(F64) * scale).all())
        true = (t.eigenvectors @ a - t.eigenvalues[:, None] * t.eigenvectors).norm(dim=1)
        torch.testing.assert_close(t.residuals, true, rtol=1e-6, atol=1e3 * eps_of(F64) * scale)


def test_float32_members() -> None:
    A = stack(spectrum(9.0, 0.5), spectrum(4.0, 0.8), dtype=torch.float32)
    together, single, _ = both(A, k=2)
    for t, s, scale in zip(together, single, (9.0, 4.0), strict=True):
        assert_same(t, s, scale)


def test_finished_members_take_no_products() -> None:
    A = stack(spectrum(9.0, 0.3), spectrum(4.0, 0.97), spectrum(5.0, 0.3))
    together, single, S = both(A, k=1)
    assert S.taken == [r.n_matvec + r.n_verify for r in single] and single[1].n_matvec > single[0].n_matvec + 5
    steps = max(r.n_matvec for r in together)
    assert len(S.calls) == steps + 1  # a block product a step and one that verifies all


def test_one_member() -> None:
    A = stack(spectrum(9.0, 0.6))
    together, single, _ = both(A, k=4)
    assert_same(together[0], single[0], 9.0)


def test_given_start_vectors_and_other_seeds() -> None:
    A = stack(spectrum(9.0, 0.6), spectrum(3.0, 0.8))
    v0 = torch.linalg.eigh(A[0])[1][:, 3].contiguous()
    for options in ({"v0": v0}, {"seed": 7}):
        together, single, _ = both(A, k=2, **options)
        for t, s in zip(together, single, strict=True):
            assert_same(t, s, 9.0)


def test_an_invariant_space_is_restarted_as_in_a_run_of_its_own() -> None:
    low = torch.zeros(N, dtype=F64)
    low[:3] = torch.tensor([5.0, 5.0, 2.0])  # the space of one vector holds 5, 2, 0; a second copy of 5 takes a restart
    A = stack(spectrum(9.0, 0.6), low, torch.zeros(N, dtype=F64))
    together, single, _ = both(A, k=3)
    for t, s in zip(together, single, strict=True):
        assert_same(t, s, 9.0)
    assert together[1].settings["breakdowns"] >= 1 and any("became invariant" in note for note in together[1].notes)
    torch.testing.assert_close(together[1].eigenvalues, torch.tensor([5.0, 5.0, 2.0], dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", [-90, 90])
def test_products_far_from_one(p: int) -> None:
    A = stack(spectrum(4.0, 0.7), spectrum(4.0, 0.7), dtype=torch.float32)
    A[1] *= 2.0**p
    together, single, S = both(A, k=2)
    for t, s, scale in zip(together, single, (4.0, math.ldexp(4.0, p)), strict=True):
        assert_same(t, s, scale)
    own = [r.n_matvec + r.n_verify for r in together]
    assert S.taken == [own[0], 1 + own[1]]  # the second goes on by itself, where products are scaled


def test_dense_and_probed() -> None:
    A = stack(spectrum(9.0, 0.5), spectrum(4.0, 0.9))
    for options in ({"method": "dense"}, {"check": "on"}):
        together, single, _ = both(A, k=2, **options)
        for t, s in zip(together, single, strict=True):
            assert_same(t, s, 9.0)
    assert together[0].settings["probe_products"] == 4


def test_max_iter_warns_for_the_member_and_strict_raises() -> None:
    A = stack(spectrum(9.0, 0.3), spectrum(4.0, 0.97))
    options = {"k": 1, "max_iter": 16, "method": "lanczos", "check": "off"}
    with pytest.warns(NotConvergedWarning) as single:
        lanczos(alone(A[1]), **options)
    with pytest.warns(NotConvergedWarning) as caught:
        first, second = ensemble(Stack(A), **options)
    numbers = re.compile(r"residual \S+ at")
    assert [numbers.sub("", str(w.message)) for w in caught] == [numbers.sub("", f"member 1: {single[0].message}")]
    assert bool(first.converged.all()) and not bool(second.converged.all()) and second.n_matvec == 16
    with pytest.raises(NotConvergedError, match=r"^member 1: lanczos: 0 of 1") as error:
        ensemble(Stack(A), strict=True, **options)
    assert error.value.partial.n_matvec == 16


def test_without_verification() -> None:
    A = stack(spectrum(9.0, 0.5), spectrum(4.0, 0.9))
    together, single, S = both(A, k=2, verify=False)
    for t, s in zip(together, single, strict=True):
        assert_same(t, s, 9.0)
    assert S.taken == [r.n_matvec for r in together]


def test_a_short_memory_runs_groups_and_single_runs() -> None:
    A = stack(*(spectrum(9.0, 0.4 + 0.1 * e) for e in range(4)))
    row = 128 * 8
    _, single, _ = both(A, k=1)
    for memory in ((44 + 2) * 2 * row, 20 * row):  # two members at once; not even one
        together, _, S = both(A, k=1, memory=memory)
        assert max(S.calls) == (2 if memory > 40 * row else 1)
        for t, s in zip(together, single, strict=True):
            torch.testing.assert_close(t.eigenvalues, s.eigenvalues, rtol=1e-12, atol=0)


def test_errors_are_those_of_the_member() -> None:
    A = stack(spectrum(9.0, 0.5), spectrum(4.0, 0.9), spectrum(4.0, 0.9))
    A[2] += 0.1 * torch.triu(torch.ones(N, N, dtype=F64), 1)
    with pytest.raises(NotSymmetricError, match=r"^member 2: lanczos: v_1'A v_"):
        ensemble(Stack(A), check="off")
    with pytest.raises(NotSymmetricError, match=r"^member 2: lanczos: .* for random u and v"):
        ensemble(Stack(A))
    A[1, 3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"^member 1: lanczos: product 1 of the operator contains NaN"):
        ensemble(Stack(A), check="off")
    with pytest.raises(ShapeError, match="v0 has shape"):
        ensemble(Stack(A), v0=torch.ones(3, dtype=F64))
    S = Stack(A)
    S.stale = True
    with pytest.raises(StaleOperatorError):
        ensemble(S)


def test_ctrl_c_leaves_the_pairs_so_far() -> None:
    A = stack(spectrum(9.0, 0.3), spectrum(4.0, 0.97), spectrum(5.0, 0.3))
    done = lanczos(alone(A[0]), k=1, method="lanczos", check="off")

    def stop(step: int, values: tuple[float, ...], expected: float) -> None:
        if step > 3 * done.n_matvec + 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="of 3 members") as caught:
        ensemble(Stack(A), k=1, method="lanczos", check="off", on_step=stop)
    first, second, third = caught.value.partial
    assert not first.verified and first.n_matvec == done.n_matvec and second.n_matvec > first.n_matvec
    assert float(third.eigenvalues[0]) == pytest.approx(5.0, rel=1e-3) and float(first.eigenvalues[0]) == pytest.approx(9.0, rel=1e-3)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_the_rule_of_many_runs_is_the_rule_of_one(which: str) -> None:
    """Step by step on tridiagonal matrices of real runs, up to the step where the single rule stops."""
    g = torch.Generator().manual_seed(3)
    targets = Targets(1e-3, "residual", eps_of(F64))
    steps, p, k = 40, 6, 3
    spectra = [spectrum(5.0 + e, 0.3 + 0.1 * e) for e in range(p)]
    blocks = []
    for values in spectra:  # the recurrence in full, on a diagonal matrix
        V, block = [torch.randn(N, generator=g, dtype=F64)], Block(0)
        V[0] /= V[0].norm()
        for _ in range(steps):
            w = values * V[-1]
            block.alpha.append(float(w @ V[-1]))
            for _ in range(2):
                w -= torch.stack(V).T @ (torch.stack(V) @ w)
            block.beta.append(float(w.norm()))
            V.append(w / w.norm())
        blocks.append(block)
    single = [StopRule(k, which, targets, N) for _ in range(p)]
    together = StopRules(p, k, which, targets, N)
    live, stopped = list(range(p)), {}
    for m in range(1, steps + 1):
        if not live:
            break
        parts = [Block(0, b.alpha[:m], b.beta[:m]) for b in (blocks[e] for e in live)]
        theta, residuals = torch.stack([b.solve()[0] for b in parts]), torch.stack([b.residuals() for b in parts])
        norms = torch.tensor([float(spectra[e].abs().max()) for e in live], dtype=F64)
        log_beta = torch.tensor([b.beta for b in parts], dtype=F64).log().sum(1)
        wants = [single[e](theta[i], residuals[i], [parts[i]], float(norms[i])) for i, e in enumerate(live)]
        assert together(torch.tensor(live), theta, residuals, log_beta, norms).tolist() == wants, m
        stopped |= {e: m for e, w in zip(live, wants, strict=True) if w}
        live = [e for e, w in zip(live, wants, strict=True) if not w]
    assert len(stopped) == p and len(set(stopped.values())) > 2
