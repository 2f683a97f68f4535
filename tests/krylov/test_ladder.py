"""Eigenpairs by noisy products: exact ones decide what is reported, and no noise, asymmetry or wrong matrix gets past them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastsharp
from fastsharp.errors import InputError, Interrupted, NotConvergedError, NotConvergedWarning
from fastsharp.krylov.ladder import ladder
from fastsharp.krylov.projection import complement, gram, rayleigh_ritz
from fastsharp.operator import CallableOperator, CountingOperator, DenseOperator, SymmetricOperator
from tests.krylov.checks import assert_sound, wanted
from tests.oracles.matrices import DctSpectrum, families, family, outlier_spectrum, power_law_spectrum
from tests.unchanged import refuses

N = 4096
SPECTRA = {"outlier": outlier_spectrum, "power_law": power_law_spectrum}
CONVERGED = {"k": 12, "check": "off"}


class Noisy(SymmetricOperator):
    """A random vector of relative size `noise` is added to each product."""

    noise = 0.0

    def __init__(self, inner: SymmetricOperator, noise: float, seed: int = 0) -> None:
        super().__init__(inner.n, inner.dtype, inner.device)
        self.inner, self.noise = inner, noise
        self.g = torch.Generator().manual_seed(seed)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.inner.apply(V, out)
        e = torch.randn(V.shape, generator=self.g, dtype=V.dtype)
        out += e * (self.noise * out.norm(dim=1) / e.norm(dim=1))[:, None]


def errors(result: fastsharp.Eigenpairs, truth: np.ndarray) -> float:
    return float(np.abs(result.eigenvalues.numpy() / truth[: len(result)] - 1).max())


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
@pytest.mark.parametrize("name", SPECTRA)
def test_residual_steps_repair_the_noise(name, noise):
    """Residuals of 2e-4 theta and neighbours at least 6 % away: errors of at most (2e-4)^2 / 0.06 = 7e-7."""
    matrix = DctSpectrum(SPECTRA[name](N), torch.float64)
    exact, cheap = CountingOperator(matrix.operator), CountingOperator(Noisy(matrix.operator, noise))
    result = ladder(cheap, exact, tol=2e-4, **CONVERGED)
    assert bool(result.converged.all()) and result.verified and not result.settings["fallback"]
    assert errors(result, matrix.eigenvalues) <= 7e-7
    assert (cheap.count, exact.count) == (result.n_matvec, result.n_verify)
    assert (cheap.count, exact.count) == (result.settings["cheap_products"], result.settings["exact_products"])
    assert exact.count <= 14 + 12 * result.settings["residual_steps"]
    X = result.eigenvectors
    true = (matrix.operator.apply(X) - result.eigenvalues[:, None] * X).norm(dim=1)
    assert float((true - result.residuals).abs().max()) <= 1e-12 * 60
    assert float((X @ X.T - torch.eye(12, dtype=torch.float64)).abs().max()) <= 1e-12


def test_rayleigh_ritz_alone_does_not_repair_bf16_noise():
    """Why there are residual steps: without one the error stays two orders above, and inside its bound."""
    matrix = DctSpectrum(outlier_spectrum(N), torch.float64)
    loose = ladder(Noisy(matrix.operator, 1e-2), matrix.operator, tol=0.3, **CONVERGED)
    assert loose.settings["residual_steps"] == 0 and loose.n_verify == 14
    assert 5e-5 <= errors(loose, matrix.eigenvalues) <= 1e-2
    assert bool((torch.from_numpy(matrix.eigenvalues[:12]) - loose.eigenvalues <= loose.error_bounds).all())


@pytest.mark.parametrize("name", SPECTRA)
def test_without_noise_no_step_is_needed(name):
    matrix = DctSpectrum(SPECTRA[name](N), torch.float64)
    result = ladder(matrix.operator, matrix.operator, tol=1e-3, **CONVERGED)
    plain = fastsharp.lanczos(matrix.operator, k=12, preflight="off")
    assert result.settings["residual_steps"] == 0 and result.n_matvec == plain.n_matvec
    assert errors(result, matrix.eigenvalues) <= 1e-6


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_either_end(which):
    case = family("even_rotated", 200, torch.float64)
    A = DenseOperator(case.tensor(torch.float64))
    result = ladder(A.cheap("bf16"), A, k=5, which=which, tol=1e-4, check="off")
    want = wanted(case.exact, which, 5)
    assert float(np.abs(result.eigenvalues.numpy() - want).max()) <= float(result.error_bounds.max()) and bool(result.converged.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore::fastsharp.errors.NotConvergedWarning")
def test_bf16_rounding_of_every_family(dtype):
    """The same theorems as for the plain solver hold, whatever rounding does to the matrix that the run sees."""
    for case in families(100, dtype):
        A = DenseOperator(case.tensor(dtype))
        result = ladder(A.cheap("bf16"), A, k=4, tol=1e-3, method="lanczos")
        assert_sound(result, case, dtype, 1e-3)
        assert bool(result.converged.all()), case.name


def test_a_cheap_operator_of_another_matrix_is_found_out():
    case = family("outliers_rotated", 100, torch.float64)
    A = DenseOperator(case.tensor(torch.float64))
    other = DenseOperator(family("even_rotated", 100, torch.float64).tensor(torch.float64))
    result = ladder(other, A, k=3, method="lanczos")
    assert result.settings["fallback"] and any("differ: a value moved" in note for note in result.notes)
    assert float(np.abs(result.eigenvalues.numpy() - wanted(case.exact, "LA", 3)).max()) <= 1e-6 * case.norm


def test_cheap_products_that_are_no_symmetric_matrix_or_not_finite():
    case = family("outliers_rotated", 100, torch.float64)
    A = DenseOperator(case.tensor(torch.float64))
    shear = A._A + 40 * torch.triu(torch.randn(100, 100, dtype=torch.float64))
    for matvec, words in ((lambda v: shear @ v, "v_1'A v_3"), (lambda v: v * float("nan"), "NaN or Inf")):
        exact = CountingOperator(A)
        result = ladder(CallableOperator(matvec, 100, torch.float64), exact, k=3, method="lanczos", check="off")
        assert result.settings["fallback"] and any(words in note for note in result.notes)
        assert bool(result.converged.all()) and exact.count == result.settings["exact_products"]
        assert float(np.abs(result.eigenvalues.numpy() - wanted(case.exact, "LA", 3)).max()) <= 1e-6 * case.norm


def test_a_tolerance_out_of_reach_of_residual_steps_ends_in_an_exact_run():
    matrix = DctSpectrum(power_law_spectrum(N), torch.float64)
    exact, cheap = CountingOperator(matrix.operator), CountingOperator(Noisy(matrix.operator, 3e-2))
    result = ladder(cheap, exact, tol=1e-9, **CONVERGED)
    assert result.settings["fallback"] and bool(result.converged.all()) and any("residual steps" in note for note in result.notes)
    assert errors(result, matrix.eigenvalues) <= 1e-12
    assert cheap.count == result.settings["cheap_products"] and exact.count == result.settings["exact_products"]
    assert cheap.count + exact.count == result.n_matvec + result.n_verify


def test_a_list_that_did_not_settle_is_said_and_warned_of():
    matrix = DctSpectrum(power_law_spectrum(N), torch.float64)
    cheap = Noisy(matrix.operator, 1e-3)
    with pytest.warns(NotConvergedWarning, match="list had not settled") as seen:
        result = ladder(cheap, matrix.operator, tol=0.5, max_iter=20, **CONVERGED)
    assert any("may be missing" in note for note in result.notes)
    assert torch.equal(seen[0].message.partial.eigenvalues, result.eigenvalues)
    assert torch.equal(result.error_bounds, result.residuals)  # no gap is known
    with pytest.raises(NotConvergedError, match="precision='auto'"):
        ladder(cheap, matrix.operator, tol=0.5, max_iter=20, strict=True, **CONVERGED)


@pytest.mark.parametrize("where", ["cheap", "exact", "fallback"])
def test_ctrl_c_and_other_errors_carry_the_pairs_so_far(where):
    A = family("outliers_rotated", 150, torch.float64).tensor(torch.float64)
    calls = [0]

    def breaking(error: type[BaseException], at: int) -> CallableOperator:
        calls[0] = 0

        def matvec(v: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == at:
                raise error
            return A @ v

        return CallableOperator(matvec, 150, torch.float64)

    for error, caught in ((KeyboardInterrupt, Interrupted), (OSError, OSError)):
        broken = breaking(error, {"cheap": 7, "exact": 3, "fallback": 9}[where])
        sound = DenseOperator(A)
        pair = {
            "cheap": (broken, sound),
            "exact": (sound, broken),
            "fallback": (CallableOperator(lambda v: v * float("nan"), 150, torch.float64), broken),
        }
        with pytest.raises(caught) as seen:
            ladder(*pair[where], k=3, check="off")
        partial = seen.value.partial
        assert len(partial) == 3 and not partial.verified


def test_arguments():
    A = DenseOperator(torch.eye(100, dtype=torch.float64))
    with refuses(InputError, "two operators of one matrix"):
        ladder(DenseOperator(torch.eye(99, dtype=torch.float64)), A)
    with refuses(InputError, "k is 0"):
        ladder(A, A, k=0)
    with refuses(InputError, "zero vector"):
        ladder(A, A, v0=torch.zeros(100, dtype=torch.float64))
    with refuses(InputError, "CallableOperator", "'bf16'", "'auto'"):
        fastsharp.lanczos((lambda v: v, 100), precision="bf16")
    with refuses(InputError, "'fp8'", "'tf32'"):
        fastsharp.lanczos(torch.eye(100), precision="fp8")
    with refuses(InputError, "verify=False"):
        fastsharp.lanczos(torch.eye(100), precision="bf16", verify=False)
    with refuses(InputError, "DenseOperator", "'tf32'"):
        fastsharp.lanczos(torch.eye(100), precision="tf32")


def test_small_matrices_are_decomposed_from_exact_products():
    A = CountingOperator(DenseOperator(family("random", 20, torch.float64).tensor(torch.float64)))
    result = fastsharp.lanczos(A, k=3, precision="bf16", preflight="off")
    assert result.settings["cheap_products"] == 0 and result.settings["exact_products"] == A.count == 20


def test_start_vector_and_seed():
    matrix = DctSpectrum(outlier_spectrum(N), torch.float64)
    first, again = (ladder(Noisy(matrix.operator, 1e-3), matrix.operator, seed=4, **CONVERGED) for _ in range(2))
    assert torch.equal(first.eigenvalues, again.eigenvalues) and torch.equal(first.eigenvectors, again.eigenvectors)
    start = sum(matrix.eigenvector(i) for i in range(3))
    warm = ladder(Noisy(matrix.operator, 1e-3), matrix.operator, k=3, v0=start, check="off")
    assert bool(warm.converged.all()) and errors(warm, matrix.eigenvalues) <= 1e-5


def test_rayleigh_ritz_takes_rows_that_are_not_orthonormal():
    A = family("random", 50, torch.float64).tensor(torch.float64)
    theta, Q = torch.linalg.eigh(A)
    mixed = torch.randn(4, 4, dtype=torch.float64) @ Q.T[-4:]
    values, X, Y = rayleigh_ritz(mixed, mixed @ A)
    assert float((values - theta[-4:]).abs().max()) <= 1e-10
    assert float((gram(X, X) - torch.eye(4, dtype=torch.float64)).abs().max()) <= 1e-10
    assert float((Y - X @ A).abs().max()) <= 1e-9


def test_complement_is_orthonormal_and_drops_what_is_dependent():
    X = torch.linalg.qr(torch.randn(300, 5, dtype=torch.float64)).Q.T.float().contiguous()
    fresh = torch.randn(3, 300) * torch.tensor([1.0, 1e-6, 1e6])[:, None]
    R = torch.cat([fresh, fresh[:1] - 2 * fresh[:1], 3 * X[:1], torch.zeros(1, 300)])
    D = complement(R, X)
    assert D.shape == (3, 300)
    assert float(gram(D, X).abs().max()) <= 10 * torch.finfo(torch.float32).eps
    assert float((gram(D, D) - torch.eye(3, dtype=torch.float64)).abs().max()) <= 10 * torch.finfo(torch.float32).eps
    assert len(complement(X[:2], X)) == 0
