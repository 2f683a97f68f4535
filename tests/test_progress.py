"""The progress bar: shown when asked, never into a pipe by itself, gone at the end."""

from __future__ import annotations

import io
import sys

import pytest

import fastsharp
from fastsharp import progress
from fastsharp.progress import Progress
from tests.cases import net

pytestmark = pytest.mark.usefixtures("one_thread")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, asked: bool | None, seconds: float) -> str:
    """What a run of 10 of 20 expected steps, each `seconds` long, writes to the error stream."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(asked) as bar:
        bar.on_plan("basis: 94 rows of float16")
        for step in range(1, 11):
            clock[0] += seconds
            bar.on_step(step, (2.5, 1.0), 20.0)
        if bar._bar is not None:
            bar._bar.refresh()
    return stream.getvalue()


def test_a_long_run_on_a_terminal_shows_products_value_and_time(monkeypatch):
    text = shown(monkeypatch, Terminal(), None, 3.0)
    assert "basis: 94 rows of float16" in text
    assert "Lanczos" in text and "10/20" in text and "top 2.5" in text and "about 30 s left" in text


@pytest.mark.parametrize(
    ("stream", "asked", "seconds"),
    [(Terminal, None, 0.01), (io.StringIO, None, 3.0), (Terminal, False, 3.0), (io.StringIO, False, 3.0)],
    ids=["short run", "pipe", "switched off", "pipe, switched off"],
)
def test_nothing_is_written_otherwise(monkeypatch, stream, asked, seconds):
    assert shown(monkeypatch, stream(), asked, seconds) == ""


def test_asked_for_it_is_shown_from_the_first_step(monkeypatch):
    assert "Lanczos" in shown(monkeypatch, Terminal(), True, 0.001)


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")])
def test_time_as_one_says_it(seconds, words):
    assert progress._spoken(seconds) == words


def test_the_bar_is_closed_when_the_run_breaks_off(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt), Progress(True) as bar:
        bar.on_step(1, (), 5.0)
        raise KeyboardInterrupt
    assert bar._bar is not None and not bar._bar.live.is_started


def test_results_do_not_depend_on_it(monkeypatch):
    n = net("mlp_tanh")
    quiet = fastsharp.lanczos(n.model, n.batches, n.loss_fn, method="lanczos", progress=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    watched = fastsharp.lanczos(n.model, n.batches, n.loss_fn, method="lanczos", progress=True)
    assert (quiet.eigenvalues == watched.eigenvalues).all() and quiet.n_matvec == watched.n_matvec
