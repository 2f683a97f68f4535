"""Measures read off a spectrum: ends, trace, norm, the negative share, outliers and the bulk's edge, each with its error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastsharp.results import Density, Estimate, Spectrum

MEASURES = ("lambda_max", "lambda_min", "trace", "frobenius", "negative_share", "outliers", "bulk_edge", "effective_rank")


def hessian_measures(spectrum: Spectrum) -> dict[str, Estimate]:
    """Numbers that the literature calls sharpness, from one `fastsharp.spectrum`, without a product more. Larger is sharper but where said.

    lambda_max, lambda_min   both ends; the interval is the bound min(r, r^2/gap), which holds for an eigenvalue, without chance
    trace, frobenius         sum of eigenvalues, root of the sum of their squares
    negative_share           share of eigenvalues below -(rounding of a zero one); a saddle where it is large
    outliers                 number of Ritz values above the bulk's edge
    bulk_edge                geometric mean of the two Ritz values around the largest ratio of neighbours, among positive ones above the median
                             Ritz value; the interval is that gap. nan, with outliers 0, where fewer than two are positive
    effective_rank           (tr A)^2 / ||A||_F^2: in [0, n] for A >= 0, meant for the Gauss-Newton matrix
    """
    pairs, density = spectrum.eigenpairs, spectrum.density
    common: dict[str, Any] = {"settings": spectrum.settings, "provenance": spectrum.provenance, "n_matvec": spectrum.n_matvec}
    found: dict[str, Estimate] = {}
    for name, at in (("lambda_max", int(pairs.eigenvalues.argmax())), ("lambda_min", int(pairs.eigenvalues.argmin()))):
        value, bound = float(pairs.eigenvalues[at]), float(pairs.error_bounds[at])
        found[name] = Estimate.certain(value, (value - bound, value + bound), **common, converged=bool(pairs.converged[at]))
    found |= {name: e for name, e in (("trace", spectrum.trace), ("frobenius", spectrum.frobenius)) if e is not None}
    size = float(pairs.eigenvalues.abs().max())
    found["negative_share"] = negative_share(density, size, common)
    found["outliers"], found["bulk_edge"] = outliers(density, common)
    if spectrum.trace is not None and spectrum.frobenius is not None:
        found["effective_rank"] = effective_rank(spectrum.trace, spectrum.frobenius, common)
    return found


def negative_share(density: Density, size: float, common: Mapping[str, Any]) -> Estimate:
    """F(-eps): zero eigenvalues, of which a network has many, come out as rounding of either sign and do not count."""
    zero = -32 * torch.finfo(torch.float32).eps * size
    value = float(density.cdf(zero))
    if density.edges.numel():
        low, high = (float(b) for b in density.bounds(zero))
        return _chance(value, (min(low, value), max(high, value)), density.confidence, common)
    return _chance(value, (float("nan"), float("nan")), density.confidence, common, ("Rademacher probes give no bounds",))


def outliers(density: Density, common: Mapping[str, Any]) -> tuple[Estimate, Estimate]:
    """(number, edge): the largest ratio of neighbours among positive Ritz values above the median."""
    ritz = density.probes[0][0]
    upper = ritz[(ritz > 0) & (ritz >= ritz.median())]
    if len(upper) < 2:
        nothing = float("nan")
        note = ("fewer than two positive Ritz values above the median: no bulk to tell from",)
        return Estimate.certain(0.0, **common, notes=note), Estimate.certain(nothing, **common, notes=note)
    ratio = upper[1:] / upper[:-1]
    at = int(ratio.argmax())
    low, high = float(upper[at]), float(upper[at + 1])
    count = float(len(upper) - at - 1)
    note = (f"the gap is a factor of {float(ratio[at]):.2g}",)
    weak = (*note, "under a factor of 1.5: the edge is not distinct") if float(ratio[at]) < 1.5 else note
    return Estimate.certain(count, **common, notes=weak), Estimate.certain((low * high) ** 0.5, (low, high), **common, notes=weak)


def effective_rank(trace: Estimate, frobenius: Estimate, common: Mapping[str, Any]) -> Estimate:
    """(tr A)^2 / ||A||_F^2 from two intervals that each hold with their confidence: the product's holds with the sum of what they miss."""
    (a, b), (c, d) = trace.interval, frobenius.interval
    value = float(trace) ** 2 / float(frobenius) ** 2 if float(frobenius) else float("nan")
    squares = sorted((a * a, b * b))
    low = 0.0 if a <= 0.0 <= b else squares[0]
    interval = (low / d**2, squares[1] / c**2) if c > 0 else (0.0, float("inf"))
    confidence = max(0.0, trace.confidence + frobenius.confidence - 1.0)
    return _chance(value, interval, confidence, common)


def _chance(
    value: float, interval: tuple[float, float], confidence: float, common: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> Estimate:
    half = (interval[1] - interval[0]) / 2
    z = float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))
    stderr = half / z if z > 0 else float("nan")
    return Estimate(value=value, stderr=stderr, interval=interval, confidence=confidence, samples=1, converged=True, notes=notes, **common)
