"""A report as rows: value, interval, meaning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from fastsharp.report.meaning import GROUPS, MEANINGS

if TYPE_CHECKING:
    from rich.table import Table

    from fastsharp.results import Estimate, Report


class Row(NamedTuple):
    """A measure as text."""

    group: str
    name: str
    value: str
    interval: str
    formula: str
    larger: str


def rows(report: Report) -> list[Row]:
    """One row a measure, in the order of their groups."""
    found = []
    for group in GROUPS:
        for name, estimate in report.measures.items():
            if report.groups[name] == group:
                meaning = MEANINGS.get(name)
                found.append(
                    Row(
                        group,
                        name,
                        number(estimate.value),
                        interval(estimate),
                        meaning.formula if meaning else "",
                        meaning.larger if meaning else "",
                    )
                )
    return found


def number(value: float) -> str:
    """Four significant digits."""
    return "none" if math.isnan(value) else f"{value:.4g}"


def interval(estimate: Estimate) -> str:
    """ "low to high", "exact" where nothing was left to chance or tolerance, "unknown" where there is no interval."""
    low, high = estimate.interval
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    if low == high:
        return "exact"
    return f"{number(low)} to {number(high)}"


def report_table(report: Report) -> Table:
    """The table for a terminal of 100 columns."""
    from rich import box
    from rich.table import Table

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, style in (("measure", ""), ("value", "bold"), ("interval", ""), ("what", "dim"), ("larger is", "dim")):
        t.add_column(column, style=style, justify="right" if column == "value" else "left")
    last = ""
    for row in rows(report):
        if row.group != last:
            t.add_row(f"[bold]{GROUPS[row.group]}[/]", "", "", "", "", end_section=False)
            last = row.group
        t.add_row(f"  {row.name}", row.value, row.interval, row.formula.replace("[", r"\["), row.larger)
    for name, reason in report.skipped.items():
        t.add_row(f"  [dim]{name}[/]", "[dim]none[/]", "", f"not measured: {reason.split('.')[0]}", "")
    return t
