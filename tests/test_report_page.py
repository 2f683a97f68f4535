"""A report as a page, as figures and in a terminal: whole, self-contained, and safe whatever names and notes hold."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.api.measure_job import NAMES
from fastsharp.report.meaning import GROUPS, MEANINGS
from fastsharp.report.page import _formula, page
from fastsharp.report.table import interval
from fastsharp.results import Estimate, Report
from tests.cases import net

HOSTILE = '<script>alert("x")</script>&<img src=http://evil.example/a.png>'


@pytest.fixture(scope="module")
def report() -> Report:
    case = net("mlp_tanh")
    return fastsharp.measure(case.model, case.batches, case.loss_fn, k=2, steps=20, directions=6, grid=3)


@pytest.fixture(scope="module")
def skipping() -> Report:
    case = net("regression")
    return fastsharp.measure(case.model, case.batches, case.loss_fn, k=2, steps=20, parts="function")


class Page(HTMLParser):
    """Tags with their attributes, and the text; every tag that opens must close."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_holds_every_measure_and_every_figure_and_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    path = report.to_html(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [path]
    text = path.read_text(encoding="utf-8")
    parsed = Page(text)
    assert all(name in parsed.text for name in report.measures)
    pictures = [image["src"] or "" for image in parsed.of("img")]
    assert len(pictures) == 5
    for source in pictures:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        shown = pixels(base64.b64decode(data, validate=True))
        assert min(shown.shape[:2]) > 200 and float(shown.std()) > 1.0  # not a blank sheet
    assert (
        not parsed.of("script") and not parsed.of("link") and not re.search(r"https?://|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    )


def pixels(png: bytes) -> Any:
    from matplotlib.image import imread

    return 255 * np.asarray(imread(io.BytesIO(png), format="png"))


def test_figures_are_written_into_a_folder(report: Report, tmp_path: Path) -> None:
    written = report.plot(tmp_path / "new" / "plots")
    assert {p.name for p in written} == {"eigenvalues.png", "density.png", "layers.png", "lines.png", "plane.png"}
    assert all(min(pixels(p.read_bytes()).shape[:2]) > 200 for p in written)
    without = dataclasses.replace(report, layers=None, landscape=None)
    assert len(without.plot(tmp_path / "two")) == 2 and len(Page(page(without)).of("img")) == 2


def test_names_and_notes_cannot_become_markup(report: Report) -> None:
    hostile = dataclasses.replace(
        report,
        measures={**report.measures, HOSTILE: report["trace"]},
        groups={**report.groups, HOSTILE: "curvature"},
        skipped={HOSTILE + "2": HOSTILE},
        notes=(HOSTILE,),
        settings={HOSTILE: HOSTILE},
        provenance={**report.provenance, "model": HOSTILE, "device": HOSTILE},
    )
    parsed = Page(page(hostile))
    assert not parsed.of("script") and len(parsed.of("img")) == 5
    assert parsed.text.count(HOSTILE) >= 7
    from rich.console import Console

    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(dataclasses.replace(hostile, notes=("[bold]x[/] [/nonsense]",), skipped={"[red]a": "[/b] reason"}).table())
    assert "[red]a" in console.export_text()


def test_the_class_name_of_a_model_is_text() -> None:
    made = type(HOSTILE, (nn.Linear,), {})
    report = fastsharp.measure(made(3, 2), (torch.randn(20, 3), torch.arange(20) % 2), parts="curvature", steps=8, k=1)
    parsed = Page(page(report))
    assert not parsed.of("script") and HOSTILE in parsed.text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(report: Report, skipping: Report, width: int) -> None:
    from rich.console import Console

    for shown in (report, skipping):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(shown.table())
        text = console.export_text()
        lines = text.splitlines()
        assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
        for name, estimate in shown.measures.items():
            (line,) = (line for line in lines if line.split()[:1] == [name])
            assert line.split()[1] == f"{estimate.value:.4g}"  # numbers are never broken
        assert all(name in text for name in shown.skipped)
        assert text.count("needs the") <= 1  # a reason stands once


def test_every_measure_has_a_meaning_and_every_part_a_heading() -> None:
    assert {name for part in NAMES.values() for name in part} <= set(MEANINGS)
    assert {part for part in NAMES if NAMES[part]} == set(GROUPS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("(tr H)^2 / ||H||_F^2", "(tr H)<sup>2</sup> / ‖H‖<sub>F</sub><sup>2</sup>"),
        ("tr G (G + cI)^-1", "tr G (G + cI)<sup>−1</sup>"),
        ("sqrt mean <grad l_i, theta>^2", "√mean ⟨∇l<sub>i</sub>, θ⟩<sup>2</sup>"),
    ],
)
def test_formulas_have_exponents_and_indices(text: str, shown: str) -> None:
    assert _formula(text) == shown


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((1.0, 2.5), "1 to 2.5"),
        ((1.5, 1.5), "exact"),
        ((1.4999999, 1.5000002), "± 2e-07"),
        ((float("nan"), 2.0), "unknown"),
        ((1.0, float("inf")), "1 to inf"),
    ],
)
def test_intervals_in_words(ends: tuple[float, float], text: str) -> None:
    assert interval(Estimate(1.5, 0.0, ends, 0.95, 1, 0, True)) == text
