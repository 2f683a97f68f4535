"""A report as rows: value, interval, meaning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

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
    short: str  # the interval for a terminal
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
                        interval(estimate, 3),
                        meaning.formula if meaning else "",
                        meaning.larger if meaning else "",
                    )
                )
    return found


def number(value: float, digits: int = 4) -> str:
    """Four significant digits."""
    return "none" if math.isnan(value) else f"{value:.{digits}g}"


def interval(estimate: Estimate, digits: int = 4) -> str:
    """ "low to high", "± half" where both ends look like the value; "exact" without doubt, "unknown" without an interval."""
    low, high = estimate.interval
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    if low == high:
        return "exact"
    ends = number(low, digits), number(high, digits)
    if ends[0] == ends[1]:
        return f"± {max(high - estimate.value, estimate.value - low):.1g}"
    return f"{ends[0]} to {ends[1]}"


def report_table(report: Report) -> Table:
    """The table for a terminal of 80 columns or more; what has no value stands below its reason, each reason once."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=_not_measured(report))
    for column, style in (("measure", ""), ("value", "bold"), ("interval", ""), ("what", "dim")):
        fixed = column != "what"
        t.add_column(column, style=style, justify="right" if column == "value" else "left", no_wrap=fixed)
    last = ""
    for row in rows(report):
        if row.group != last:
            t.add_row(Text(GROUPS[row.group], style="bold"), "", "", "")
            last = row.group
        t.add_row(*(Text(cell) for cell in (f" {row.name}", row.value, row.short, row.formula)))
    return t


def _not_measured(report: Report) -> Any:
    from rich.text import Text

    lines = [f"not measured: {', '.join(names)}\n  {reason}" for reason, names in by_reason(report).items()]
    return Text("\n".join(lines), style="dim") if lines else None


def by_reason(report: Report) -> dict[str, list[str]]:
    """{reason: the measures that have no value for it}."""
    found: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        found.setdefault(reason, []).append(name)
    return found
