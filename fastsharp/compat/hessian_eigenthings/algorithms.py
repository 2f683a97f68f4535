"""Eigenpairs, trace and density with the arguments and results of hessian-eigenthings; computed by fastsharp's solvers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastsharp
from fastsharp import ops
from fastsharp.compat._shared import present, probe_forms, refuse, verified
from fastsharp.compat.hessian_eigenthings.loss_fns import SupervisedLoss
from fastsharp.compat.hessian_eigenthings.operators import HessianOperator, symmetric_of
from fastsharp.errors import DeviceError, InputError
from fastsharp.krylov.aware import KrylovSpace
from fastsharp.krylov.products import Products
from fastsharp.krylov.rows import dot
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

_REASONS = {
    "backend": "vectors are handled by fastsharp's own kernels",
    "momentum": "the pairs come from Lanczos, which has none",
    "reorthogonalize": "the basis is always kept orthogonal; without that, eigenvalues appear twice",
    "fp16": "products are those of the parameters' dtype",
    "full_dataset": "a product with the next batch each time is no fixed matrix",
    "max_possible_gpu_samples": "memory is planned by fastsharp",
    "num_lanczos_vectors": "memory is planned by fastsharp",
}
_KINDS = {"rademacher": "rademacher", "gaussian": "normal"}


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs; tensors in the operator's dtype and on its device."""

    eigenvalues: torch.Tensor  # (k,)
    eigenvectors: torch.Tensor  # (k, n)
    residuals: torch.Tensor  # (k,) true ones, by a product each
    iterations: int  # products
    converged: torch.Tensor  # (k,) bool


@dataclass(frozen=True)
class TraceResult:
    """A trace by random probes."""

    estimate: float
    stderr: float  # nan for one sample
    samples: torch.Tensor  # (m,)


@dataclass(frozen=True)
class SpectralDensityResult:
    """A smoothed density, and the quadrature behind it; float64 on the host."""

    grid: torch.Tensor  # (G,)
    density: torch.Tensor  # (G,)
    raw_eigenvalues: torch.Tensor  # (runs, m), nan beyond the end of a run
    raw_weights: torch.Tensor  # (runs, m), 0 there
    sigma: float


def lanczos(
    operator: Any,
    *,
    k: int = 10,
    max_iter: int | None = None,
    tol: float = 1e-4,
    reorthogonalize: bool | None = None,
    which: str = "LM",
    seed: int | None = None,
    backend: Any = None,
) -> EigenResult:
    """k eigenpairs, "LM" by modulus, "LA" descending, "SA" ascending, with ||Av - lambda v|| <= tol |lambda|.

    max_iter  products at most; None: as many as `fastsharp.lanczos` allows (2 k in hessian-eigenthings, converged or not)
    NotConvergedWarning where max_iter did not do. reorthogonalize=False and backend raise InputError.
    """
    refuse("lanczos", _REASONS, reorthogonalize=(reorthogonalize is not False, True), backend=(backend, None))
    if which not in ("LM", "LA", "SA"):
        raise InputError(f"lanczos: which={which!r} is none of 'LM', 'LA', 'SA'.")
    matrix = _present(operator)
    pairs = fastsharp.lanczos(matrix, k=k, which=which, tol=tol, max_iter=max_iter, seed=seed or 0, progress=False)
    return _result(pairs, matrix, flip=which == "SA")


def deflated_power_iteration(
    operator: Any,
    *,
    k: int = 10,
    max_iter: int = 100,
    tol: float = 1e-4,
    momentum: float = 0.0,
    seed: int | None = None,
    backend: Any = None,
) -> EigenResult:
    """The k eigenpairs of largest modulus, by Lanczos, from at most k max_iter products. momentum and backend raise InputError."""
    refuse("deflated_power_iteration", _REASONS, momentum=(momentum, 0.0), backend=(backend, None))
    matrix = _present(operator)
    pairs = fastsharp.lanczos(matrix, k=k, which="LM", tol=tol, max_iter=k * max_iter, seed=seed or 0, progress=False)
    return _result(pairs, matrix)


def power_iteration_one(
    operator: Any,
    *,
    max_iter: int = 100,
    tol: float = 1e-4,
    momentum: float = 0.0,
    init: torch.Tensor | None = None,
    seed: int | None = None,
    backend: Any = None,
) -> tuple[float, torch.Tensor, float, int, bool]:
    """(eigenvalue, eigenvector, residual, products, converged) of largest modulus, by Lanczos from `init`."""
    refuse("power_iteration_one", _REASONS, momentum=(momentum, 0.0), backend=(backend, None))
    pairs = fastsharp.lanczos(_present(operator), k=1, which="LM", tol=tol, max_iter=max_iter, v0=init, seed=seed or 0, progress=False)
    value, residual, converged = float(pairs.eigenvalues[0]), float(pairs.residuals[0]), bool(pairs.converged[0])
    return value, pairs.eigenvectors[0], residual, pairs.n_matvec, converged


def trace(
    operator: Any,
    *,
    num_matvecs: int = 100,
    method: str = "hutch++",
    distribution: str = "rademacher",
    seed: int | None = None,
    backend: Any = None,
) -> TraceResult:
    """tr A from num_matvecs products, by "hutch++" or "hutchinson". `fastsharp.trace` gives an interval to a tolerance."""
    if method == "hutchinson":
        return hutchinson(operator, num_samples=num_matvecs, distribution=distribution, seed=seed, backend=backend)
    if method != "hutch++":
        raise InputError(f"trace: method={method!r} is neither 'hutch++' nor 'hutchinson'.")
    if distribution != "rademacher":
        raise InputError(
            f"trace: distribution={distribution!r} has no meaning for method='hutch++', whose probes are Rademacher. Leave it out."
        )
    return hutch_plus_plus(operator, num_matvecs=num_matvecs, seed=seed, backend=backend)


def hutchinson(
    operator: Any, *, num_samples: int = 100, distribution: str = "rademacher", seed: int | None = None, backend: Any = None
) -> TraceResult:
    """The mean of z'Az over num_samples probes, "rademacher" or "gaussian"."""
    refuse("hutchinson", _REASONS, backend=(backend, None))
    if distribution not in _KINDS:
        raise InputError(f"hutchinson: distribution={distribution!r} is neither 'rademacher' nor 'gaussian'.")
    _count("hutchinson", num_samples=num_samples)
    matrix = _present(operator)
    with torch.inference_mode(False), torch.no_grad():
        samples = torch.tensor(list(probe_forms(matrix, _KINDS[distribution], num_samples, seed or 0, "hutchinson")), dtype=torch.float64)
    return _trace_result(0.0, samples, matrix)


def hutch_plus_plus(operator: Any, *, num_matvecs: int = 99, seed: int | None = None, backend: Any = None) -> TraceResult:
    """tr A = tr Q'AQ + tr (I - QQ')A(I - QQ'): the first exactly, Q from a third of the products, the second by probes.

    Memory: num_matvecs vectors. Source: Meyer, Musco, Musco and Woodruff 2021.
    """
    refuse("hutch_plus_plus", _REASONS, backend=(backend, None))
    _count("hutch_plus_plus", num_matvecs=num_matvecs)
    matrix = _present(operator)
    m = max(1, num_matvecs // 3)
    with torch.inference_mode(False), torch.no_grad():
        products = Products(verified(matrix, seed or 0, "hutch_plus_plus"), "hutch_plus_plus")
        z = torch.empty((m, matrix.n), dtype=matrix.dtype, device=matrix.device)
        ops.probes("rademacher", out=z, seed=seed or 0)
        space = KrylovSpace.empty(matrix).grown(products(z), products)
        ops.probes("rademacher", out=z, seed=seed or 0, first=m)
        space.project(z)
        samples = torch.tensor([dot(a, b) for a, b in zip(z, products(z), strict=True)], dtype=torch.float64)
    scale = math.ldexp(1.0, products.unit)
    return _trace_result(space.trace * scale, samples * scale, matrix)


def spectral_density(
    operator: Any,
    *,
    num_runs: int = 10,
    lanczos_steps: int = 80,
    num_grid_points: int = 10000,
    sigma: float | None = None,
    grid_padding: float = 0.1,
    seed: int | None = None,
    backend: Any = None,
) -> SpectralDensityResult:
    """Gaussians of width sigma at the Ritz values of num_runs Lanczos runs from Rademacher probes, on a regular grid.

    sigma         None: range of the Ritz values / lanczos_steps
    grid_padding  of that range on both sides, and at least 6 sigma, so that the integral is one
    `fastsharp.density` gives the distribution without a width, and bounds.
    """
    refuse("spectral_density", _REASONS, backend=(backend, None))
    _count("spectral_density", num_grid_points=num_grid_points)
    if sigma is not None and not 0 < sigma < math.inf:
        raise InputError(f"spectral_density: sigma is {sigma!r}, expected a number > 0, or None.")
    found = fastsharp.density(
        _present(operator), probes=num_runs, steps=lanczos_steps, kind="rademacher", seed=seed or 0, progress=False
    ).probes
    longest = max(x.numel() for x, _ in found)
    nodes = torch.stack([nn.functional.pad(x, (0, longest - x.numel()), value=math.nan) for x, _ in found])
    weights = torch.stack([nn.functional.pad(w, (0, longest - w.numel())) for _, w in found])
    low, high = (min(float(x[0]) for x, _ in found), max(float(x[-1]) for x, _ in found))
    spread = max(high - low, 1e-6 * max(abs(low), abs(high))) or 1.0
    width = spread / lanczos_steps if sigma is None else float(sigma)
    padding = max(grid_padding * spread, 6 * width)
    grid = torch.linspace(low - padding, high + padding, num_grid_points, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for x, w in found:
        density += torch.exp(-((grid[:, None] - x) / width).square() / 2) @ w
    return SpectralDensityResult(grid, density / (len(found) * width * math.sqrt(2 * math.pi)), nodes, weights, width)


def compute_hessian_eigenthings(
    model: nn.Module,
    dataloader: Iterable[Any],
    loss: Any,
    num_eigenthings: int = 10,
    full_dataset: bool = True,
    mode: str = "power_iter",
    use_gpu: bool = True,
    fp16: bool = False,
    max_possible_gpu_samples: int = 2**16,
    *,
    power_iter_steps: int = 20,
    power_iter_err_threshold: float = 1e-4,
    momentum: float = 0.0,
    which: str = "LM",
    max_steps: int = 20,
    tol: float = 1e-6,
    num_lanczos_vectors: int | None = None,
) -> tuple[Any, Any]:
    """(eigenvalues (k,), eigenvectors (k, n)) as numpy arrays: the call of hessian-eigenthings 0.x, by Lanczos in both modes.

    mode     "power_iter", with the tolerance power_iter_err_threshold and k power_iter_steps products at most, or "lanczos", with tol,
             k max_steps products, and which
    use_gpu  True asks for a model on a GPU, False for one on the host
    """
    refuse(
        "compute_hessian_eigenthings",
        _REASONS,
        full_dataset=(full_dataset, True),
        fp16=(fp16, False),
        max_possible_gpu_samples=(max_possible_gpu_samples, 2**16),
        momentum=(momentum, 0.0),
        num_lanczos_vectors=(num_lanczos_vectors, None),
    )
    if mode not in ("power_iter", "lanczos"):
        raise InputError(f"compute_hessian_eigenthings: mode={mode!r} is neither 'power_iter' nor 'lanczos'.")
    operator = HessianOperator(model, dataloader, SupervisedLoss(loss))
    if (operator.device.type == "cuda") != bool(use_gpu):
        raise DeviceError(
            f"compute_hessian_eigenthings: use_gpu={use_gpu}, but the model is on {operator.device}. Pass use_gpu={not use_gpu}, or move it."
        )
    steps, accuracy = (power_iter_steps, power_iter_err_threshold) if mode == "power_iter" else (max_steps, tol)
    found = lanczos(
        operator, k=num_eigenthings, which="LM" if mode == "power_iter" else which, tol=accuracy, max_iter=num_eigenthings * steps
    )
    return found.eigenvalues.cpu().numpy(), found.eigenvectors.cpu().numpy()


def _present(operator: Any) -> SymmetricOperator:
    return present(symmetric_of(operator))


def _result(pairs: Eigenpairs, matrix: SymmetricOperator, flip: bool = False) -> EigenResult:
    parts = [pairs.eigenvalues, pairs.eigenvectors, pairs.residuals, pairs.converged]
    values, vectors, residuals, converged = (p.flip(0) if flip else p for p in parts)
    kind: dict[str, Any] = {"dtype": matrix.dtype, "device": matrix.device}
    return EigenResult(values.to(**kind), vectors, residuals.to(**kind), pairs.n_matvec, converged.to(matrix.device))


def _trace_result(known: float, samples: torch.Tensor, matrix: SymmetricOperator) -> TraceResult:
    m = samples.numel()
    stderr = float(samples.std()) / math.sqrt(m) if m > 1 else math.nan
    return TraceResult(known + float(samples.mean()), stderr, samples.to(dtype=matrix.dtype, device=matrix.device))


def _count(call: str, **counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{call}: {name} is {count!r}, expected an int of at least 1.")
