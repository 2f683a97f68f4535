"""Figures of results; no pyplot, so that nothing global changes and no display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastsharp.results import Eigenpairs

_GOOD, _BAD, _INK, _SOFT, _FAINT = "#1f5fa8", "#c8421a", "#333333", "#666666", "#8a8a8a"
_FLOOR = 1e-16  # a residual of exactly zero has no place on a log axis
_NAMES = {"LA": "Largest", "SA": "Smallest", "LM": "Largest in modulus", "BE": "Outermost"}


def plot_eigenpairs(result: Eigenpairs, path: str | Path | None = None) -> Figure:
    """Eigenvalues above, their relative residuals against the tolerance below; written as PNG if a path is given.

    Bars are the error bounds: the interval in which an eigenvalue is certain to lie. Pairs that missed the tolerance
    are hollow diamonds in another colour. The line under the title states n, the products and the tolerance.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.0, 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=[2.3, 1])
    k = len(result)
    index = list(range(1, k + 1))
    values = result.eigenvalues.tolist()
    bounds = result.error_bounds.tolist()
    relative = [max(r / abs(v), _FLOOR) if v else 1.0 for r, v in zip(result.residuals.tolist(), values, strict=True)]
    good = [bool(c) for c in result.converged.tolist()]

    top.axhline(0, color=_FAINT, linewidth=0.8, zorder=1)
    top.vlines(index, 0, values, color=_FAINT, linewidth=0.8, alpha=0.6, zorder=1)
    top.errorbar(index, values, yerr=bounds, fmt="none", ecolor=_INK, elinewidth=2, capsize=0, zorder=3)
    _points(top, index, values, good)
    if all(v >= 0 for v in values):
        top.set_ylim(bottom=0)
    top.set_ylabel(r"eigenvalue $\lambda$  (loss / parameter²)")

    tol = result.settings.get("tol")
    if isinstance(tol, int | float):
        bottom.axhline(tol, color=_INK, linewidth=1, linestyle="--", zorder=1)
        bottom.annotate(f"tol {tol:g}", (1.0, tol), xycoords=("axes fraction", "data"), xytext=(-4, 3), **_LABEL)
    _points(bottom, index, relative, good)
    bottom.set_yscale("log")
    bottom.margins(y=0.25)
    bottom.set_ylabel(r"$\|Hv-\lambda v\|\;/\;|\lambda|$")
    order = ", largest modulus first" if result.settings.get("which") == "LM" else ""
    bottom.set_xlabel(f"index of the eigenvalue{order}")
    bottom.set_xticks(index if k <= 20 else [i for i in index if i == 1 or i % 5 == 0])
    bottom.set_xlim(0.4, k + 0.6)

    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    if not all(good):
        top.legend(frameon=False, fontsize=9, loc="upper right")
    which = _NAMES.get(str(result.settings.get("which", "LA")), "Largest")
    title = f"{which} {k} eigenvalues of the loss Hessian" if k > 1 else f"{which} eigenvalue of the loss Hessian"
    top.set_title(title, fontsize=13, loc="left", pad=24)
    top.annotate(conditions(result), (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", fontsize=9, color=_SOFT)
    if path is not None:
        fig.savefig(path, format="png")
    return fig


_LABEL: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 8, "color": _INK}


def conditions(result: Eigenpairs) -> str:
    """One line: n, products, tolerance, how many pairs met it, and whether the residuals are only estimates."""
    parts = [f"n = {result.eigenvectors.shape[1]:,}", f"{result.n_matvec} products + {result.n_verify} to verify"]
    if "tol" in result.settings:
        parts.append(f"tol {result.settings['tol']:g} ({result.settings.get('criterion', 'residual')})")
    parts.append(f"{int(result.converged.sum())} of {len(result)} converged")
    if not result.verified:
        parts.append("residuals estimated")
    return " · ".join(parts)


def _points(ax: Axes, index: list[int], values: list[float], good: list[bool]) -> None:
    for wanted, style in (
        (True, {"marker": "o", "color": _GOOD, "label": "converged"}),
        (False, {"marker": "D", "color": _BAD, "markerfacecolor": "white", "markeredgewidth": 1.5, "label": "not converged"}),
    ):
        chosen = [(i, v) for i, v, g in zip(index, values, good, strict=True) if g is wanted]
        if chosen:
            ax.plot(*zip(*chosen, strict=True), linestyle="none", markersize=6, zorder=4, clip_on=False, **style)
