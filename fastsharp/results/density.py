"""Density: the distribution of all eigenvalues, with bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsharp.results.result import Result

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, eq=False)
class Density(Result):
    """The distribution of the n eigenvalues as a discrete measure sum_i w_i delta(theta_i), with what is known of its error.

    All tensors are float64 on the host. `w1_bound` and `lower`, `upper` hold with probability `confidence` over the probes; for
    Rademacher probes there is no such bound: inf, and empty tensors.
    """

    nodes: torch.Tensor  # (q,) ascending
    weights: torch.Tensor  # (q,) >= 0, sum 1
    widths: torch.Tensor  # (q,) half the local spacing of Ritz values, > 0: of the kernels of `pdf`
    probes: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # the plain Gauss rule of each probe: nodes (m,), weights (m,)
    edges: torch.Tensor  # (e,) ascending; the CDF lies in [lower_i, upper_i] on [edges_i, edges_{i+1})
    lower: torch.Tensor  # (e,)
    upper: torch.Tensor  # (e,)
    w1_bound: float  # of the Wasserstein-1 distance to the true distribution, in units of the eigenvalues
    confidence: float
    n: int  # eigenvalues in all
    n_matvec: int
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def cdf(self, x: Any) -> torch.Tensor:
        """F(x), the share of eigenvalues <= x, for numbers x of any shape."""
        return _cdf(self.nodes, self.weights, x)

    def quantile(self, q: Any) -> torch.Tensor:
        """The smallest node with F >= q, for q in [0, 1] of any shape."""
        q = torch.as_tensor(q, dtype=torch.float64)
        if not bool(((q >= 0) & (q <= 1)).all()):
            from fastsharp.errors import InputError

            raise InputError("quantile: q must lie in [0, 1].")
        cumulated = self.weights.cumsum(0)
        at = torch.searchsorted(cumulated, q.contiguous() * cumulated[-1])
        return self.nodes[at.clamp(max=self.nodes.numel() - 1)]

    def moment(self, k: int) -> float:
        """sum_i w_i theta_i^k, an estimate of tr(H^k) / n."""
        return float((self.weights * self.nodes**k).sum())

    @property
    def mean(self) -> float:
        """An estimate of tr(H) / n."""
        return self.moment(1)

    def pdf(self, x: Any, width: float | None = None) -> torch.Tensor:
        """The density at numbers x of any shape: Gaussians at the nodes, of standard deviation `widths`, or `width` for all."""
        return _pdf(self.nodes, self.weights, self.widths if width is None else self._checked_width(width), x)

    def grid(self, width: float | None = None, points: int = 65) -> torch.Tensor:
        """Abscissae that resolve every kernel of `pdf`: `points` on +-6 widths around each node, ascending; for plots and integrals."""
        sigma = self.widths if width is None else self._checked_width(width)
        return (self.nodes[:, None] + sigma[:, None] * torch.linspace(-6, 6, points, dtype=torch.float64)).flatten().sort().values

    def band(self, x: Any, of: str = "cdf", width: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest value over the probes at x of the "cdf" or the "pdf": their spread, no bound. Needs two probes.

        From the plain Gauss rule of each, without variance reduction. For bounds of the CDF from any number of probes: `bounds`.
        """
        from fastsharp.errors import InputError

        if len(self.probes) < 2:
            raise InputError("band: one probe has no spread. Run with probes=2 or more, or use bounds(x), which holds for one probe too.")
        if of not in ("cdf", "pdf"):
            raise InputError(f"band: of is {of!r}, expected 'cdf' or 'pdf'.")
        if of == "cdf":
            curves = [_cdf(nodes, weights, x) for nodes, weights in self.probes]
        else:
            given = None if width is None else float(self._checked_width(width)[0])
            curves = [_pdf(t, w, spacing(t, t) / 2 if given is None else torch.full_like(t, given), x) for t, w in self.probes]
        stacked = torch.stack(curves)
        return stacked.amin(0), stacked.amax(0)

    def bounds(self, x: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bound of the true CDF, for all x at once with probability `confidence`."""
        if not self.edges.numel():
            from fastsharp.errors import InputError

            raise InputError("bounds: Rademacher probes have none. Run with kind='normal'.")
        x = torch.as_tensor(x, dtype=torch.float64).contiguous()
        zero = torch.zeros(1, dtype=torch.float64)
        at = torch.searchsorted(self.edges, x, right=True)
        return torch.cat([zero, self.lower])[at], torch.cat([zero, self.upper])[at]

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the density, linear and logarithmic, and of the CDF; written as PNG if a path is given."""
        from fastsharp.plots import plot_density

        return plot_density(self, path)

    def defect(self) -> str:
        if self.nodes.ndim != 1 or not self.nodes.numel() or not self.nodes.shape == self.weights.shape == self.widths.shape:
            return "nodes, weights and widths differ in length"
        if self.edges.ndim != 1 or not self.edges.shape == self.lower.shape == self.upper.shape:
            return "edges and bounds differ in length"
        return (
            "" if all(x.ndim == 1 and x.shape == w.shape for x, w in self.probes) else "the nodes and weights of a probe differ in length"
        )

    def _checked_width(self, width: float) -> torch.Tensor:
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < float("inf"):
            from fastsharp.errors import InputError

            raise InputError(f"pdf: width is {width!r}, expected a number > 0, or None for the local spacing of Ritz values.")
        return torch.full_like(self.nodes, float(width))


def spacing(nodes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The local distance of neighbouring nodes at x (q,), interpolated between nodes; > 0, and at least 1e-6 of their range.

    A single node has no spacing: 1e-6 of its size then, and 1 where all nodes are zero.
    """
    size = float(nodes[-1] - nodes[0]) or float(nodes[-1].abs()) or 1e6
    if nodes.numel() == 1:
        return torch.full_like(x, 1e-6 * size)
    steps = nodes.diff()
    local = torch.cat([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    right = torch.searchsorted(nodes, x).clamp(1, nodes.numel() - 1)
    share = ((x - nodes[right - 1]) / steps[right - 1].clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return (local[right - 1] * (1 - share) + local[right] * share).clamp(min=1e-6 * size)


def _cdf(nodes: torch.Tensor, weights: torch.Tensor, x: Any) -> torch.Tensor:
    x = torch.as_tensor(x, dtype=torch.float64).contiguous()
    cumulated = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)]).clamp(max=1.0)
    return cumulated[torch.searchsorted(nodes, x, right=True)]


def _pdf(nodes: torch.Tensor, weights: torch.Tensor, sigma: torch.Tensor, x: Any) -> torch.Tensor:
    x = torch.as_tensor(x, dtype=torch.float64)
    height = weights / (sigma * (2 * torch.pi) ** 0.5)
    parts = [((chunk[:, None] - nodes) / sigma).square_().mul_(-0.5).exp_() @ height for chunk in x.reshape(-1).split(4096)]
    return torch.cat(parts).reshape(x.shape)
