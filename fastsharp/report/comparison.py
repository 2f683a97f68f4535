"""What a comparison of two checkpoints looks like: a table, and a figure of line, angles, spectra and ratios."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from fastsharp.report.meaning import GROUPS
from fastsharp.report.table import interval, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from fastsharp.results import Comparison

_A, _B, _INK, _SOFT, _FAINT = "#1f5fa8", "#c8421a", "#333333", "#666666", "#8a8a8a"


def comparison_table(found: Comparison) -> Table:
    """Overlap, distance, barrier and disagreement, then one row a measure: a, b, b / a and its interval."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, style in (("measure", ""), ("a", ""), ("b", ""), ("b / a", "bold"), ("interval", "")):
        t.add_column(column, style=style, justify="left" if column in ("measure", "interval") else "right")
    t.add_row("[bold]Between a and b[/]", "", "", "", "")
    for name, value, doubt in _between(found):
        t.add_row(f"  {name}", "", "", value, doubt)
    groups = {**found.b.groups, **found.a.groups}
    last = ""
    for name, ratio in found.measures.items():
        if groups[name] != last:
            last = groups[name]
            t.add_row(f"[bold]{GROUPS[last]}[/]", "", "", "", "")
        values = (number(report.measures[name].value) for report in (found.a, found.b))
        t.add_row(f"  {name}", *values, number(ratio.value), _doubt(ratio.interval) or interval(ratio))
    for name, reason in found.skipped.items():
        t.add_row(f"  [dim]{name}[/]", "", "", "[dim]none[/]", escape(reason.split(". ")[0]))
    return t


def _between(found: Comparison) -> list[tuple[str, str, str]]:
    """(what, value, its doubt) of what belongs to both."""
    k = found.k
    rows = [
        (
            f"overlap of the top {k} eigenvectors",
            number(found.overlap),
            f"+- {number(found.overlap_error)}; random {number(found.random_overlap)}",
        ),
        (
            "largest angle, degrees",
            number(math.degrees(float(found.angles[-1]))),
            f"smallest {number(math.degrees(float(found.angles[0])))}",
        ),
        ("W1 of the spectra", number(found.w1), f"+- {number(found.w1_bound)} at {found.w1_confidence:.0%}"),
        ("barrier of the loss", number(found.barrier), f"at t = {found.barrier_at:.2f}"),
    ]
    if found.disagreement is not None:
        rows.append(("predictions that differ", number(found.disagreement.value), interval(found.disagreement)))
    return rows


def _doubt(ends: tuple[float, float]) -> str:
    return "unbounded: that of a holds 0" if ends == (-math.inf, math.inf) else ""


def plot_comparison(found: Comparison, path: str | os.PathLike[str] | None = None) -> Any:
    """The loss between a and b, principal angles, both distributions of eigenvalues, and the ratios; PNG if a path is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10.0, 7.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    (line, angles), (spectra, ratios) = fig.subplots(2, 2)
    _line(line, found)
    _angles(angles, found)
    _spectra(spectra, found)
    _ratios(ratios, found)
    for ax in (line, angles, spectra, ratios):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9, colors=_INK)
    for ax in (line, angles, spectra):
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    if path is not None:
        fig.savefig(path, format="png")
    return fig


def _title(ax: Axes, text: str, below: str) -> None:
    ax.set_title(text, fontsize=12, loc="left", pad=20)
    ax.annotate(below, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points", fontsize=9, color=_SOFT)


def _line(ax: Axes, found: Comparison) -> None:
    t, height = found.t.tolist(), found.losses.tolist()
    ends = [height[t.index(0.0)], height[t.index(1.0)]]
    ax.plot(t, height, color=_INK, linewidth=1.6, zorder=2)
    ax.plot([0, 1], ends, color=_SOFT, linestyle="--", linewidth=1, zorder=1)
    for x, y, colour, name, aside in ((0.0, ends[0], _A, "a", -14), (1.0, ends[1], _B, "b", 8)):
        ax.plot([x], [y], marker="o", color=colour, markersize=6, zorder=3)
        ax.annotate(name, (x, y), xytext=(aside, 6), textcoords="offset points", color=colour, fontsize=10)
    if 0 < found.barrier < math.inf:
        x = found.barrier_at
        ax.vlines([x], ends[0] + x * (ends[1] - ends[0]), height[t.index(x)], color=_FAINT, linewidth=1)
    ax.set_xlabel("t, from a (0) to b (1)")
    ax.set_ylabel("loss")
    _title(ax, "Loss between the two", f"barrier {number(found.barrier)} at t = {found.barrier_at:.2f}")


def _angles(ax: Axes, found: Comparison) -> None:
    degrees = found.angles.rad2deg().tolist()
    ax.bar(range(1, found.k + 1), degrees, color=_A, width=0.6)
    ax.axhline(90, color=_SOFT, linestyle="--", linewidth=1)
    ax.set_ylim(0, 95)
    ax.set_yticks([0, 30, 60, 90])
    ax.set_xticks([i for i in range(1, found.k + 1) if found.k <= 12 or i == 1 or i % 5 == 0])
    ax.set_xlabel("principal angle")
    ax.set_ylabel("degrees")
    error = "not known" if found.overlap_error >= 1 else f"+- {number(found.overlap_error)}"
    _title(ax, f"Top eigenspaces of dimension {found.k}", f"overlap {number(found.overlap)} {error}, random {number(found.random_overlap)}")


def _spectra(ax: Axes, found: Comparison) -> None:
    for report, colour, name in ((found.a, _A, "a"), (found.b, _B, "b")):
        density = report.spectrum.density
        at = density.nodes.tolist()
        above = [1.0, *(1.0 - density.cdf(density.nodes)).clamp(min=0.0).tolist()]
        ax.step([at[0], *at], above, where="post", color=colour, linewidth=1.3, label=name)
    ax.set_yscale("log")
    ax.set_ylim(0.3 / found.a.spectrum.density.n, 1.5)
    ax.set_xlabel(r"eigenvalue $\lambda$  (loss / parameter²)")
    ax.set_ylabel(r"share $>\lambda$")
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    _title(ax, "Eigenvalues", rf"$W_1$ = {number(found.w1)} $\pm$ {number(found.w1_bound)} ({found.w1_confidence:.0%})")


def _ratios(ax: Axes, found: Comparison) -> None:
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    shown = {name: r for name, r in found.measures.items() if r.value > 0}
    left_out = len(found.measures) - len(shown)
    ax.axvline(1.0, color=_FAINT, linewidth=1.0, zorder=1)
    reach = [r.value for r in shown.values()] or [1.0]
    low, high = min([*reach, 1.0]) / 2, max([*reach, 1.0]) * 2
    for j, r in enumerate(shown.values()):
        lo, hi = r.interval
        if not math.isnan(lo + hi):
            ax.hlines([j], max(lo, low), min(max(hi, low), high), color=_INK, linewidth=1.5, alpha=0.5, zorder=2)
        ax.plot([r.value], [j], marker="o", markersize=4.5, color=_INK, zorder=3)
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(shown)), list(shown))
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    ax.set_xlabel("b / a")
    _title(ax, "Measures", "intervals of both together" + (f"; {left_out} of another sign left out" if left_out else ""))
    ax.tick_params(axis="y", labelsize=7)
