"""A progress bar for one Krylov run: products so far, the current top value, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_QUIET_SECONDS = 1.0  # a run shorter than this shows nothing unless asked to


class Progress:
    """Context manager around a run; `on_step` is the solver's callback.

    shown   True: from the first step; False: never; None: after a second, where the error stream is a terminal
    label   what runs; `value` what its first value is called
    """

    def __init__(self, shown: bool | None, label: str = "Lanczos", value: str = "top") -> None:
        self._label, self._value = label, value
        self._asked = bool(shown)
        self._wanted = sys.stderr.isatty() if shown is None else shown
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._plan = ""

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def label(self, text: str) -> None:
        """From now on it is `text` that runs."""
        self._label, self._start = text, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, description=text)

    def on_plan(self, plan: Any) -> None:
        """What the run will hold in memory: printed above the bar as soon as there is one, that is, before a long run."""
        self._plan = str(plan)

    def on_step(self, step: int, values: Any, estimate: Any) -> None:
        """Show step `step`; `values` are the wanted Ritz values so far, `estimate` the products the run is expected to take."""
        elapsed = time.monotonic() - self._start
        if not self._wanted or (elapsed < _QUIET_SECONDS and not self._asked):
            return
        if self._bar is None:
            self._open()
        top = f"{self._value} {float(values[0]):.5g}" if len(values) else ""
        total = max(int(estimate), step)
        left = elapsed / step * (total - step)
        self._bar.update(self._task, completed=step, total=total, top=top, left=f"about {_spoken(left)} left" if total > step else "")

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("products  {task.fields[top]}  {task.fields[left]}"),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        if self._plan:
            self._bar.console.print(self._plan, highlight=False, soft_wrap=True)
        self._task = self._bar.add_task(self._label, total=None, top="", left="")


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
