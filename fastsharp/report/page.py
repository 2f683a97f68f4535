"""A report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import html
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastsharp.report.figures import figures, png
from fastsharp.report.meaning import GROUPS, MEANINGS
from fastsharp.report.table import by_reason, interval, number, rows

if TYPE_CHECKING:
    from fastsharp.results import Report

_CARDS = ("lambda_max", "trace", "negative_share", "sam", "relative_flatness", "fisher_rao")
_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --paper: #ffffff; --card: #f5f7fa; --blue: #1f5fa8; --amber: #b4690e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
.lead { color: var(--soft); margin: 0 0 28px; }
.cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 26px; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.card span { color: var(--soft); font-size: 13px; }
.card i { display: block; font-style: normal; color: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: 13px; color: var(--soft); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.v { font-weight: 600; }
sub, sup { font-size: 0.75em; line-height: 0; }
tr.group td { padding-top: 18px; font-weight: 600; color: var(--blue); border-bottom: 2px solid var(--line); }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.soft { color: var(--soft); }
.mark { display: inline-block; font-size: 11px; border: 1px solid var(--line); border-radius: 6px; padding: 0 6px; margin: 0 4px 0 0; color: var(--soft); white-space: nowrap; }
.warn { color: var(--amber); }
figure { margin: 0 0 28px; }
figure img { max-width: 100%; width: 760px; display: block; border: 1px solid var(--line); border-radius: 10px; background: #fff; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; max-width: 760px; }
.facts td { overflow-wrap: anywhere; } .facts td:first-child { overflow-wrap: normal; white-space: nowrap; }
@media (max-width: 720px) {
  main { padding: 24px 14px 48px; } .cards { grid-template-columns: repeat(2, 1fr); gap: 8px; } .card { padding: 10px 12px; }
  .card b { font-size: 20px; } th, td { padding: 6px; } .larger { display: none; } td { font-size: 13px; } code { font-size: 12px; }
}
@media print { .card, figure, tr { break-inside: avoid; } details { display: none; } }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7ebf0; --soft: #9aa6b5; --line: #2c3541; --paper: #12161c; --card: #1a2029; --blue: #7fb2ef; --amber: #e2a04a; }
  figure img { filter: brightness(0.92); }
}
"""


def write_html(report: Report, path: str | os.PathLike[str]) -> Path:
    """The page, written whole or not at all; -> path."""
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    partial.write_text(page(report), encoding="utf-8")
    partial.replace(target)
    return target


def page(report: Report) -> str:
    """The page's text."""
    facts = report.provenance
    model, n, samples = facts.get("model", "model"), facts.get("n"), facts.get("samples")
    size = f"{n:,} parameters" if isinstance(n, int) else ""
    on = f"{samples:,} examples" if isinstance(samples, int) else ""
    lead = " · ".join(part for part in (size, on, str(facts.get("dtype", "")), str(facts.get("device", ""))) if part)
    pictures = "".join(_figure(name, caption, png(draw())) for name, (caption, draw) in figures(report).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sharpness of {_text(model)}</title><style>{_STYLE}</style></head><body><main>
<h1>Sharpness of {_text(model)}</h1><p class="lead">{_text(lead)}</p>
<div class="cards">{"".join(_card(report, name) for name in _CARDS if name in report.measures)}</div>
<h2>Measures</h2>{_table(report)}{_skipped(report)}
<h2>Figures</h2>{pictures}
<h2>Notes</h2>{_notes(report)}
<details><summary>Settings, provenance and cost</summary>{_facts(report)}</details>
</main></body></html>
"""


def _text(value: object) -> str:
    return html.escape(str(value))


_SIGNS = (
    (r"\|\|", "‖"),
    (r"\btheta\b", "θ"),
    (r"\brho\b", "ρ"),
    (r"\blambda\b", "λ"),
    (r"\bsqrt ", "√"),
    (r"&lt;(.*?)&gt;", r"⟨\1⟩"),
    (r"&#x27;", "′"),
    (r"\bgrad ", "∇"),
    (r"\^(-?\w+)", r"<sup>\1</sup>"),
    (r"_(\w+)", r"<sub>\1</sub>"),
    (r" - ", " − "),
    (r"<sup>-", "<sup>−"),
)


def _formula(text: str) -> str:
    """A formula of `meaning` with its signs, exponents and indices."""
    found = _text(text)
    for pattern, sign in _SIGNS:
        found = re.sub(pattern, sign, found)
    return found


def _card(report: Report, name: str) -> str:
    estimate = report.measures[name]
    formula = _formula(MEANINGS[name].formula)
    return f'<div class="card"><span><code>{name}</code></span><b>{number(estimate.value)}</b><i>{_text(interval(estimate, 3))}</i><i>{formula}</i></div>'


def _table(report: Report) -> str:
    lines, last = [], ""
    for row in rows(report):
        if row.group != last:
            lines.append(f'<tr class="group"><td colspan="5">{_text(GROUPS[row.group])}</td></tr>')
            last = row.group
        lines.append(
            f'<tr><td><code>{_text(row.name)}</code></td><td class="n v">{row.value}</td><td class="n soft">{_text(row.interval)}</td>'
            f'<td>{_formula(row.formula)}{_marks(row.name)}</td><td class="soft larger">{_text(row.larger)}</td></tr>'
        )
    head = (
        '<tr><th>measure</th><th class="n">value</th><th class="n">interval</th><th>what it is</th><th class="larger">larger is</th></tr>'
    )
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _marks(name: str) -> str:
    meaning = MEANINGS.get(name)
    if meaning is None:
        return ""
    survived = [text for text, holds in (("rescaled layers", meaning.rescaling), ("temperature", meaning.temperature)) if holds]
    return "<br>" + "".join(f'<span class="mark">survives {text}</span>' for text in survived) if survived else ""


def _skipped(report: Report) -> str:
    if not report.skipped:
        return ""
    items = "".join(
        f"<li>{', '.join(f'<code>{_text(name)}</code>' for name in names)}: {_text(reason)}</li>"
        for reason, names in by_reason(report).items()
    )
    return f'<p class="warn">Not measured:</p><ul class="soft">{items}</ul>'


def _figure(name: str, caption: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode("ascii")
    return f'<figure><img alt="{_text(name)}" src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'


def _notes(report: Report) -> str:
    notes = list(report.notes) + [f"{name}: {note}" for name, estimate in report.measures.items() for note in _own(report, estimate.notes)]
    if not notes:
        return '<p class="soft">None.</p>'
    return "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in dict.fromkeys(notes)) + "</ul>"


def _own(report: Report, notes: tuple[str, ...]) -> list[str]:
    """Notes of one measure that the report does not say of all."""
    return [note for note in notes if note not in report.notes]


def _facts(report: Report) -> str:
    pairs = [*report.settings.items(), *report.provenance.items(), *report.cost.items()]
    lines = "".join(f"<tr><td><code>{_text(k)}</code></td><td>{_text(_short(v))}</td></tr>" for k, v in pairs)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 300 else text[:300] + " ..."
