"""What an invariance report looks like: a table of ratios, and a figure of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastsharp.report.meaning import MEANINGS
from fastsharp.report.table import number

if TYPE_CHECKING:
    from rich.table import Table

    from fastsharp.results import Invariance

_BLUE, _RED, _INK, _SOFT, _FAINT = "#1f5fa8", "#c8421a", "#333333", "#666666", "#8a8a8a"
_MOST = 6  # refused rescalings that the table names


def invariance_table(found: Invariance) -> Table:
    """One row a measure, one column a rescaling: "stays", or the ratio after / before."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("measure")
    t.add_column("value", justify="right", style="bold")
    for name in found.rescalings:
        t.add_column(escape(name), justify="right")
    t.add_column("what", style="dim")
    ratios, moved = found.ratios.tolist(), found.moved.tolist()
    for j, measure in enumerate(found.measures):
        cells = [_cell(ratios[i][j], moved[i][j]) for i in range(len(found.rescalings))]
        what = MEANINGS[measure].formula if measure in MEANINGS else ""
        t.add_row(measure, number(float(found.base[j])), *cells, escape(what))
    blanks = [""] * len(found.rescalings)
    for name, reason in found.skipped.items():
        t.add_row(f"[dim]{name}[/]", "[dim]none[/]", *blanks, escape(f"not measured: {reason.split('.')[0]}"))
    refused = [f"{name}: {reason}" for name, reason in found.refused.items()]
    if refused:
        more = [f"and {len(refused) - _MOST} more"] * (len(refused) > _MOST)
        t.caption = escape("\n".join(["Rescalings that change the outputs, and are left out:", *refused[:_MOST], *more]))
        t.caption_justify = "left"
    return t


def _cell(ratio: float, moved: bool) -> str:
    if ratio != ratio and not moved:
        return "[dim]none[/]"
    return f"x {number(ratio)}" if moved else "[dim]stays[/]"


def plot_invariance(found: Invariance, path: str | os.PathLike[str] | None = None) -> Any:
    """The ratio after / before of each measure under each rescaling, on a logarithmic axis; hollow: within the error. PNG if a path is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    m, r = len(found.measures), len(found.rescalings)
    fig = Figure(figsize=(7.0, 1.6 + 0.34 * m), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.subplots()
    ax.axvline(1.0, color=_FAINT, linewidth=1.0, zorder=1)
    ratios, moved = found.ratios, found.moved
    markers = "osD^v<>ph*"
    for i, (name, kind) in enumerate(zip(found.rescalings, found.kinds, strict=True)):
        colour = _RED if kind == "temperature" else _BLUE
        offset = 0.5 * ((i + 0.5) / r - 0.5)
        for j in range(m):
            ratio = float(ratios[i, j])
            y = j + offset
            if ratio > 0:
                face = colour if bool(moved[i, j]) else "white"
                ax.plot([1.0, ratio], [y, y], color=colour, linewidth=0.8, alpha=0.5, zorder=2)
                ax.plot([ratio], [y], marker=markers[i % len(markers)], markersize=5, color=colour, markerfacecolor=face, zorder=3)
            elif ratio <= 0:
                ax.annotate(f" x {number(ratio)}", (1.0, y), fontsize=7, color=colour, va="center")
        ax.plot([], [], linestyle="none", marker=markers[i % len(markers)], markersize=5, color=colour, label=name)
    ax.plot([], [], linestyle="none", marker="o", markersize=5, color=_SOFT, markerfacecolor="white", label="within its error")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.08)
    ax.set_yticks(range(m), found.measures, fontsize=9)
    ax.set_ylim(m - 0.5, -0.5)
    ax.set_xlabel("value after the rescaling / value before")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=_INK)
    ax.set_title("What moves while the decisions stay", fontsize=13, loc="left")
    fig.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    if path is not None:
        fig.savefig(path, format="png")
    return fig
