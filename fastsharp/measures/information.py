"""Measures of the Gauss-Newton matrix G against a damping c: soft rank, and the Takeuchi information criterion.

    soft rank    tr G (G + cI)^-1    directions of G above c, in [0, n]
    TIC          tr (G + cI)^-1 C    C = mean_i g_i g_i': gradient noise in units of curvature; C = G gives the soft rank

Both need c > 0, since G of a network has a null space. Neither survives a rescaling of the layers, with c tied to lambda_max or not.
Source: Thomas et al. 2020, "On the interplay between noise and curvature and its effect on optimization and generalization"; MacKay 1992.
"""

from __future__ import annotations

import torch

from fastsharp.errors import InputError
from fastsharp.krylov.solve import solve
from fastsharp.operator import SymmetricOperator
from fastsharp.quantiles import student
from fastsharp.results import Estimate
from fastsharp.rng import generator, normal

_TOGETHER = 8


def check_damping(name: str, damping: float) -> None:
    """InputError where c is no positive number."""
    if not (isinstance(damping, (int, float)) and not isinstance(damping, bool) and 0.0 < damping < float("inf")):
        raise InputError(f"{name}: damping={damping!r}, expected a positive number: c in units of the largest eigenvalue.")


def tic(
    G: SymmetricOperator, C: SymmetricOperator, c: float, *, probes: int, rtol: float, confidence: float, seed: int, max_iter: int = 500
) -> Estimate:
    """tr (G + cI)^-1 C by probes z: the mean of z'(G + cI)^-1 C z, z normal; the solves by conjugate gradients to `rtol`.

    The interval is Student's over the probes; what the solves miss, r'(G + cI)^-1 C z, is of the order of rtol of a sample and not in it.
    """
    random = generator(seed)
    samples: list[float] = []
    spent = 0
    converged = True
    while len(samples) < probes:
        Z = torch.stack([normal(G.n, random, G.dtype, G.device) for _ in range(min(_TOGETHER, probes - len(samples)))])
        CZ = C.apply(Z)
        found = solve(G, Z, c, rtol=rtol, max_iter=max_iter)
        spent += found.n_matvec + len(Z)
        converged &= bool((found.residuals <= 2 * rtol).all())
        samples += (found.X.double() * CZ.double()).sum(1).tolist()
    values = torch.tensor(samples, dtype=torch.float64)
    value, stderr = float(values.mean()), float(values.std()) / len(values) ** 0.5
    half = student((1 + confidence) / 2, len(values) - 1) * stderr
    notes = () if converged else (f"conjugate gradients did not reach {rtol:g} in {max_iter} steps: a larger damping needs fewer",)
    return Estimate(value, stderr, (value - half, value + half), confidence, len(values), spent, converged, notes)
