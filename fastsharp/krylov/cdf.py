"""Two-sided bounds of F(x) = #{lambda <= x} / n from Lanczos quadratures, at a stated confidence, and the Wasserstein-1 bound they give.

Let F_z be the spectral distribution of a probe z: F_z(x) = sum over lambda_i <= x of (q_i'z)^2 / z'z.
(a) Quadrature, certain: sum_{l<i} w_l <= F_z(x) <= sum_{l<=i+1} w_l for theta_i <= x < theta_{i+1} (Chebyshev, Markov, Stieltjes).
(b) Sampling: for a normal z, z'z times the mass of c eigenvalues is chi^2(c), whatever the eigenvectors; over p probes chi^2(pc).
    The bounds hold for all x at once: a union over a mesh of counts c (1 to 16, then by ratios of 1.1; from below and from above),
    between which F and F_z are monotone.
(c) Counting, certain: at least as many eigenvalues lie beyond x as Ritz values of any run (Cauchy's interlacing).
(d) The ends of the spectrum. sum (q_i'z)^2 (lambda_i - theta_m)_+^2 <= z'z w_m r_m^2, since the m roots of the orthogonal polynomial
    make its last Gauss weight and residual; with |q_1'z| >= a except with probability 0.8 a this bounds lambda_1 - theta_m. Or
    lambda_1 - theta_m <= eps (lambda_1 - lambda_n) with eps = (log(1.648 sqrt(n) / delta) / (2m - 1))^2 (Kuczynski & Wozniakowski 1992).
    The smaller one counts.
Then W1 = int |F_hat - F| dx <= int max(F_upper - F_hat, F_hat - F_lower) dx for any estimate F_hat. Of the allowance 1 - confidence a
fifth goes to (d), the rest to (b). Not covered: rounding of the products beyond 8 eps ||A|| and the betas dropped in breakdowns.

Rademacher probes have no such law: one may be orthogonal to an eigenvector with two equal entries, with probability 1/2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from fastsharp.krylov.quadrature import Measure, Rule

Bounds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # edges (q,); F lies in [lower_i, upper_i] for edges_i <= x < edges_{i+1}

_MESH_ALL, _MESH_RATIO = 16, 1.1
_ENDS = 0.2  # share of the allowance


def cdf_bounds(rules: list[Rule], n: int, confidence: float) -> Bounds:
    """edges (q,) ascending, lower and upper (q,): F = 0 below edges[0], 1 from edges[-1] on; of normal probes alone."""
    allowance = 1.0 - confidence
    low, high = _ends(rules, n, _ENDS * allowance / 4)
    edges = torch.cat([torch.tensor([low]), *(r.nodes for r in rules), torch.tensor([high])]).sort().values
    below = torch.zeros_like(edges), torch.zeros_like(edges)  # of the probes' masses up to x: at least, at most
    counted = torch.zeros_like(edges, dtype=torch.long), torch.zeros_like(edges, dtype=torch.long)
    total = sum(r.square for r in rules)
    for r in rules:
        m, i = r.nodes.numel(), torch.searchsorted(r.nodes, edges, right=True)
        cumulated = torch.cat([torch.zeros(1, dtype=torch.float64), r.weights.cumsum(0)])
        slack = 0 if r.exact else 1
        below[0].add_(r.square * cumulated[(i - slack).clamp(min=0)])
        below[1].add_(r.square * cumulated[(i + slack).clamp(max=m)])
        counted[0].copy_(torch.maximum(counted[0], i))
        counted[1].copy_(torch.maximum(counted[1], m - i))
    table = _table(n, len(rules), (1.0 - _ENDS) * allowance)
    least_below, _ = _counts(below[0], *table)
    _, most_below = _counts(below[1], *table)
    least_above, _ = _counts((total - below[1]).clamp(min=0.0), *table)
    _, most_above = _counts((total - below[0]).clamp(min=0.0), *table)
    lower = torch.maximum(torch.maximum(least_below, n - most_above), counted[0]).clamp(max=n)
    upper = torch.minimum(torch.minimum(most_below, n - least_above), n - counted[1]).clamp(min=0)
    lower, upper = lower.cummax(0).values.double() / n, upper.flip(0).cummin(0).values.flip(0).double() / n
    lower[-1] = upper[-1] = 1.0
    return edges, lower, torch.maximum(lower, upper)


def w1_bound(estimate: Measure, bounds: Bounds) -> float:
    """int max(F_upper - F_hat, F_hat - F_lower) dx, exactly: everything is constant between the edges and nodes."""
    edges, lower, upper = bounds
    nodes, weights = estimate
    x = torch.cat([edges, nodes]).sort().values
    at = torch.searchsorted(edges, x, right=True)
    zero = torch.zeros(1, dtype=torch.float64)
    low, high = torch.cat([zero, lower])[at], torch.cat([zero, upper])[at]
    F = torch.cat([zero, weights.cumsum(0)])[torch.searchsorted(nodes, x, right=True)]
    worst = torch.maximum(high - F, F - low).clamp(min=0.0)
    return float((worst[:-1] * x.diff()).sum())


@lru_cache(maxsize=8)
def _table(n: int, p: int, allowance: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mesh of counts c, and for each the upper and lower quantile of chi^2(pc): four tails a count share the allowance."""
    mesh = _mesh(n)
    tail = allowance / (4 * mesh.numel())
    return mesh, _quantile(p * mesh, tail, upper=True), _quantile(p * mesh, tail, upper=False)


def _counts(mass: torch.Tensor, mesh: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and most eigenvalues that a mass sum (q_i'z)^2 over the probes can come from."""
    n = int(mesh[-1])
    first = torch.searchsorted(high, mass)  # the first mesh point that could have this mass or more
    least = torch.where(first > 0, mesh[(first - 1).clamp(min=0)] + 1, 0)
    last = torch.searchsorted(low, mass, right=True)  # the first mesh point that would have had more
    most = torch.where(last < mesh.numel(), mesh[last.clamp(max=mesh.numel() - 1)] - 1, n)
    return least.clamp(max=n), most


def _mesh(n: int) -> torch.Tensor:
    """1 to 16, then by ratios of 1.1, and n."""
    points, c = [], 1
    while c < n:
        points.append(c)
        c = max(c + 1, int(c * _MESH_RATIO)) if c >= _MESH_ALL else c + 1
    return torch.tensor([*points, n])


def _quantile(degrees: torch.Tensor, tail: float, *, upper: bool) -> torch.Tensor:
    """x with P(chi^2(d) > x) = tail (upper) or P(chi^2(d) < x) = tail, by bisection; rounded outwards."""
    a = degrees.double() / 2
    t = -math.log(tail)
    lo = torch.zeros_like(a)
    hi = 2 * a + 2 * (2 * a * t).sqrt() + 2 * t  # Laurent & Massart 2000, lemma 1: beyond the upper quantile
    for _ in range(80):
        mid = (lo + hi) / 2
        too_far = torch.special.gammaincc(a, mid / 2) < tail if upper else torch.special.gammainc(a, mid / 2) > tail
        lo, hi = torch.where(too_far, lo, mid), torch.where(too_far, mid, hi)
    return hi if upper else lo


def _ends(rules: list[Rule], n: int, delta: float) -> tuple[float, float]:
    """An interval that holds the whole spectrum, each end and each of two arguments with probability delta of failing."""
    p = len(rules)
    a = delta / p * math.sqrt(math.pi / 2)
    reach = [r.residuals * (r.square * r.weights).sqrt() / a for r in rules]
    low = max(float(r.nodes[0] - s[0]) for r, s in zip(rules, reach, strict=True))
    high = min(float(r.nodes[-1] + s[-1]) for r, s in zip(rules, reach, strict=True))
    first, last = min(float(r.nodes[0]) for r in rules), max(float(r.nodes[-1]) for r in rules)
    m = min(r.nodes.numel() for r in rules)
    eps = (math.log(1.648 * math.sqrt(n) / delta ** (1 / p)) / (2 * m - 1)) ** 2  # for all probes at once to fall short
    if eps < 0.5:
        beyond = eps * (last - first) / (1 - 2 * eps)
        low, high = max(low, first - beyond), min(high, last + beyond)
    return min(low, first), max(high, last)
