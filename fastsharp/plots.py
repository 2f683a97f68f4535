"""Figures of results; no pyplot, so that nothing global changes and no display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastsharp.results import Density, Eigenpairs, Landscape2D, LayerSpectra
    from fastsharp.training import Record

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


def plot_density(result: Density, path: str | Path | None = None) -> Figure:
    """The density on a logarithmic and on a linear axis, and the CDF with its bounds; written as PNG if a path is given.

    Shaded: above, the spread over the probes where there are two or more; below, the certain bounds of the CDF where there are some.
    """
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.0, 7.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    log, linear, bottom = fig.subplots(3, 1, sharex=True, height_ratios=[1.6, 1, 1.2])
    x = result.grid()
    y = result.pdf(x)
    for ax in (log, linear):
        if len(result.probes) > 1:
            low, high = result.band(x, of="pdf")
            ax.fill_between(x.tolist(), low.clamp(min=1e-300).tolist(), high.tolist(), color=_GOOD, alpha=0.2, linewidth=0, label="probes")
        ax.plot(x.tolist(), y.tolist(), color=_GOOD, linewidth=1.2)
        ax.set_ylabel("density")
    log.set_yscale("log")
    peak = float(y.max())
    log.set_ylim(min(float(result.weights[result.weights > 0].min()), 1 / result.n) * peak * 1e-2, 3 * peak)
    linear.set_ylim(0, 1.05 * peak)
    linear.margins(x=0)

    steps = torch.cat([x, result.nodes, result.edges]).sort().values
    if result.edges.numel():
        low, high = result.bounds(steps)
        label = f"bounds at {result.confidence:.0%}"
        bottom.fill_between(steps.tolist(), low.tolist(), high.tolist(), step="post", color=_FAINT, alpha=0.35, linewidth=0, label=label)
        bottom.legend(frameon=False, fontsize=9, loc="lower right")
    bottom.step(steps.tolist(), result.cdf(steps).tolist(), where="post", color=_GOOD, linewidth=1.2)
    bottom.set_ylim(-0.03, 1.03)
    bottom.set_ylabel(r"share $\leq\lambda$")
    bottom.set_xlabel(r"eigenvalue $\lambda$  (loss / parameter²)")
    span = float(result.nodes[-1] - result.nodes[0]) or float(result.widths.max()) * 12
    bottom.set_xlim(float(result.nodes[0]) - 0.04 * span, float(result.nodes[-1]) + 0.04 * span)
    for ax in (log, linear, bottom):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    log.set_title("Spectral density of the loss Hessian", fontsize=13, loc="left", pad=24)
    parts = [f"n = {result.n:,}", f"{result.n_matvec} products", f"{len(result.probes)} probe" + "s" * (len(result.probes) > 1)]
    if result.edges.numel():
        parts.append(rf"$W_1$ at most {result.w1_bound:.2g} ({result.confidence:.0%})")
    line = " · ".join(parts)
    log.annotate(line, (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", fontsize=9, color=_SOFT)
    if path is not None:
        fig.savefig(path, format="png")
    return fig


def plot_history(records: Sequence[Record], path: str | Path | None = None) -> Figure:
    """Tracked eigenvalues over steps with their error bounds, 2 / lr dashed where known; hollow points: not converged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.0, 4.0), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.subplots()
    steps = [r.step for r in records]
    for i in range(len(records[0].eigenvalues)):
        values, bounds = [r.eigenvalues[i] for r in records], [r.error_bounds[i] for r in records]
        ax.errorbar(steps, values, yerr=bounds, color=_GOOD, ecolor=_INK, alpha=1.0 if i == 0 else 0.5, linewidth=1.2, label=f"λ{i + 1}")
    missed = [(r.step, r.eigenvalues[0]) for r in records if not r.converged]
    if missed:
        ax.plot(*zip(*missed, strict=True), linestyle="none", marker="D", color=_BAD, markerfacecolor="white", label="not converged")
    rated = [(r.step, 2 / r.lr) for r in records if r.lr]
    if rated:
        ax.plot(*zip(*rated, strict=True), color=_SOFT, linestyle="--", linewidth=1, label="2 / learning rate")
    ax.set_xlabel("step")
    ax.set_ylabel(r"eigenvalue $\lambda$  (loss / parameter²)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    ax.legend(frameon=False, fontsize=9)
    ax.set_title("Sharpness through training", fontsize=13, loc="left")
    if path is not None:
        fig.savefig(path, format="png")
    return fig


def plot_layers(result: LayerSpectra, path: str | Path | None = None) -> Figure:
    """Leading eigenvalues, traces and coupling by layer, on logarithmic axes; written as PNG if a path is given.

    Dark bars are the top eigenvalues, ticks the others of the list where they are positive; hollow diamonds mark layers whose pairs did not all
    converge. The third panel is there where the coupling was measured: the norm of each block beside that of the rest of its rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    coupled = result.coupling is not None
    panels, n = 2 + coupled, len(result)
    fig = Figure(figsize=(max(7.0, 1.6 + 0.36 * n), 2.6 * panels), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(panels, 1, sharex=True)
    index = list(range(n))
    tops = [float(layer.eigenvalues[0]) for layer in result]
    axes[0].bar(index, [max(v, 0.0) for v in tops], width=0.62, color=_GOOD, label="largest")
    others = [(i, v) for i, layer in enumerate(result) for v in layer.eigenvalues[1:].tolist() if v > 0.0]
    if others:
        axes[0].plot(*zip(*others, strict=True), linestyle="none", marker="_", markersize=9, color=_INK, label="further ones")
    missed = [(i, v) for i, (v, layer) in enumerate(zip(tops, result, strict=True)) if not bool(layer.converged.all()) and v > 0.0]
    if missed:
        style: dict[str, Any] = {"marker": "D", "color": _BAD, "markerfacecolor": "white", "label": "not converged"}
        axes[0].plot(*zip(*missed, strict=True), linestyle="none", zorder=4, **style)
    axes[0].set_ylabel("eigenvalue")
    traces = [layer.trace for layer in result]
    axes[1].bar(index, [max(t.value, 0.0) for t in traces], width=0.62, color=_SOFT)
    spread = [(i, t.value, t.stderr) for i, t in enumerate(traces) if t.stderr > 0.0 and t.value > 0.0]
    if spread:
        at, centres, widths = zip(*spread, strict=True)
        axes[1].errorbar(at, centres, yerr=widths, fmt="none", ecolor=_INK, elinewidth=1.5)
    axes[1].set_ylabel("trace")
    if coupled:
        for shift, label, color in ((-0.19, "block", _GOOD), (0.19, "rest of its rows", _BAD)):
            pairs = [(layer.norm if label == "block" else layer.coupling) or (0.0, 0.0) for layer in result]
            heights, errors = [v for v, _ in pairs], [e for _, e in pairs]
            axes[2].bar([i + shift for i in index], heights, yerr=errors, width=0.38, color=color, ecolor=_INK, label=label)
        axes[2].set_ylabel("Frobenius norm")
    for ax in axes:
        if any(p.get_height() > 0.0 for p in ax.patches):
            ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    axes[-1].set_xticks(index, [layer.name for layer in result], rotation=60, ha="right")
    axes[-1].set_xlim(-0.7, n - 0.3)
    matrix = "Gauss-Newton matrix" if result.settings.get("operator") == "ggn" else "loss Hessian"
    axes[0].set_title(f"Layers of the {matrix}", fontsize=13, loc="left", pad=24)
    line = f"{n} layers, {sum(layer.n for layer in result):,} parameters"
    if result.coupling is not None:
        share, error = result.coupling.share
        line += rf" · {share:.1%} $\pm$ {error:.1%} of $\Vert H\Vert_F^2$ between layers"
    axes[0].annotate(line, (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", fontsize=9, color=_SOFT)
    if path is not None:
        fig.savefig(path, format="png")
    return fig


def plot_landscape(drawn: Landscape2D, path: str | Path | None = None) -> Figure:
    """The loss along eigenvectors, and beside it the parabola of slope and eigenvalue; written as PNG if a path is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    k = len(drawn.lines)
    fig = Figure(figsize=(7.0, 3.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, k, sharey=True, squeeze=False)[0]
    s = drawn.steps
    for i, ax in enumerate(axes):
        parabola = drawn.loss + drawn.slopes[i] * s + drawn.curvatures[i] * s.square() / 2
        ax.plot(s.tolist(), parabola.tolist(), color=_SOFT, linestyle="--", linewidth=1, label="second order")
        ax.plot(s.tolist(), (drawn.loss + drawn.lines[i]).tolist(), color=_GOOD, linewidth=1.6, label="loss")
        ax.plot([0.0], [drawn.loss], marker="o", color=_INK, markersize=4)
        ax.set_xlabel(f"step along eigenvector {i + 1}")
        ax.annotate(
            rf"$\lambda_{{{i + 1}}}$ = {float(drawn.curvatures[i]):.4g}",
            (0.5, 0.97),
            xycoords="axes fraction",
            ha="center",
            va="top",
            fontsize=9,
        )
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        ax.tick_params(labelsize=9)
    axes[0].set_ylabel("loss")
    axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    fig.suptitle("The loss along the top eigenvectors", fontsize=13, x=0.01, ha="left")
    if path is not None:
        fig.savefig(path, format="png")
    return fig


def plot_plane(drawn: Landscape2D, path: str | Path | None = None) -> Figure:
    """Contours of the loss on a plane of two filter-normalised directions; written as PNG if a path is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.6, 4.8), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.subplots()
    axis, height = drawn.axis.tolist(), (drawn.loss + drawn.plane).T.tolist()
    filled = ax.contourf(axis, axis, height, levels=24, cmap="viridis")
    ax.contour(axis, axis, height, levels=24, colors="white", linewidths=0.4, alpha=0.5)
    ax.plot([0.0], [0.0], marker="o", color="white", markeredgecolor=_INK, markersize=6)
    ax.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    ax.set_yticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    ax.set_xlabel("first direction, in norms of the filters")
    ax.set_ylabel("second direction")
    ax.set_title("The loss around the weights", fontsize=13, loc="left")
    fig.colorbar(filled, ax=ax, label="loss")
    if path is not None:
        fig.savefig(path, format="png")
    return fig
