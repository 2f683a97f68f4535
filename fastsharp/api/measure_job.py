"""What one call of `measure` has found so far, and the report that it makes of it, however the call ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastsharp.errors import FastsharpError, Interrupted, NondeterministicOperatorError, NotSymmetricError, StaleOperatorError, in_a_line
from fastsharp.measures.eigen import MEASURES, hessian_measures
from fastsharp.progress import Progress
from fastsharp.results import Estimate, Landscape2D, LayerSpectra, Report, Spectrum

GGN_MEASURES = ("lambda_max", "trace", "effective_rank")
NAMES = {
    "curvature": MEASURES,
    "gauss-newton": (*(f"ggn_{name}" for name in GGN_MEASURES), "soft_rank"),
    "perturbation": ("sam", "ascent", "adaptive_ascent"),
    "trajectory": ("gradient_norm", "directional", "gradient_overlap"),
    "function": (
        "fisher_rao",
        "fisher_rao_closed",
        "relative_flatness",
        "margin",
        "prediction_confidence",
        "logit_scale",
        "boundary_tightness",
        "input_jacobian",
        "top_curvature",
    ),
    "layers": (),
    "landscape": (),
}
_OF_THE_WHOLE = (StaleOperatorError, NondeterministicOperatorError, NotSymmetricError)  # after these no number means anything


class Job:
    """What has been measured so far. `settings` are those of the call; `counts` reads the running counters of its cost."""

    def __init__(self, chosen: tuple[str, ...], settings: dict[str, Any], progress: bool | None) -> None:
        self.shown = Progress(progress, "measure", "value")
        self.chosen, self.settings = chosen, settings
        self.measures: dict[str, Estimate] = {}
        self.groups: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.cost: dict[str, float] = {}
        self.counts: dict[str, Callable[[], float]] = {}
        self.notes: list[str] = []
        self.spectrum: Spectrum | None = None
        self.layers: LayerSpectra | None = None
        self.landscape: Landscape2D | None = None
        self._running = ""

    def add(self, group: str, found: dict[str, Estimate]) -> None:
        """Measures of a group; a later one of the same name takes the place of the earlier."""
        self.measures |= found
        self.skipped = {name: why for name, why in self.skipped.items() if name not in found}
        self.groups |= dict.fromkeys(found, group)

    def set_spectrum(self, spectrum: Spectrum) -> None:
        """The Hessian's, and what is read off it."""
        self.spectrum = spectrum
        self.add("curvature", hessian_measures(spectrum))

    def set_layers(self, found: Any) -> None:
        """Spectra of the layers; an early end carries those of one layer, which are no result of this call."""
        self.layers = found if isinstance(found, LayerSpectra) else None

    def set_landscape(self, drawn: Landscape2D) -> None:
        self.landscape = drawn

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part, timed, also where it does not come to its end."""
        began = time.perf_counter()
        self._running = name
        self.shown.label(name)
        try:
            yield
        finally:
            self.cost[f"seconds.{name}"] = time.perf_counter() - began

    @contextmanager
    def keeping(self, keep: Callable[[Any], None]) -> Iterator[None]:
        """What an early end carries as `.partial` is kept."""
        try:
            yield
        except BaseException as e:
            partial = getattr(e, "partial", None)
            if partial is not None:
                with contextlib.suppress(FastsharpError):
                    keep(partial)
            raise

    @contextmanager
    def may_skip(self, *names: str) -> Iterator[None]:
        """A refusal of what does not apply is a reason, not an end."""
        try:
            yield
        except _OF_THE_WHOLE:
            raise
        except (FastsharpError, NotImplementedError) as e:
            self.skip(in_a_line(e), *names)

    def skip(self, reason: str, *names: str) -> None:
        """The names that have no value get a reason."""
        self.skipped |= dict.fromkeys((n for n in names if n not in self.measures), reason)

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Whatever ends the work in here carries `.partial`, a Report of what there is or None; Ctrl-C becomes Interrupted."""
        try:
            with self.shown:
                yield
        except KeyboardInterrupt as e:
            report = self._cut_short("it was interrupted")
            what = f"{len(report.measures)} measures are in .partial" if report else "before the first measure"
            raise Interrupted(f"measure: interrupted in the part {self._running!r}, {what}.", report) from e
        except Exception as error:
            with contextlib.suppress(Exception):
                error.__dict__["partial"] = self._cut_short(f"it ended in {type(error).__name__}")
            raise

    def _cut_short(self, why: str) -> Report | None:
        if self.spectrum is None:
            return None
        self.notes.append(f"the call is not complete: {why} in the part {self._running!r}")
        for part in self.chosen:
            missing = [name for name in NAMES[part] if name not in self.skipped]
            self.skip(f"the call did not come to it: {why} in the part {self._running!r}", *missing)
        return self.report()

    def report(self) -> Report:
        """All there is; the spectrum must be."""
        spectrum = self.spectrum
        assert spectrum is not None
        missed = [f"{name} did not reach its tolerance: its interval is wider" for name, e in self.measures.items() if not e.converged]
        return Report(
            dict(self.measures),
            dict(self.groups),
            dict(self.skipped),
            spectrum,
            self.layers,
            self.landscape,
            self.cost | {name: read() for name, read in self.counts.items()},
            tuple(dict.fromkeys((*spectrum.notes, *self.notes, *missed))),
            {**spectrum.settings, **self.settings},
            spectrum.provenance,
        )
