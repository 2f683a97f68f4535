"""The figures of a report, each as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsharp.plots import plot_density, plot_eigenpairs, plot_landscape, plot_layers, plot_plane

if TYPE_CHECKING:
    from fastsharp.results import Report


def figures(report: Report) -> dict[str, tuple[str, Callable[[], Any]]]:
    """{file name: (caption, draw)} of what the report has."""
    spectrum = report.spectrum
    found: dict[str, tuple[str, Callable[[], Any]]] = {
        "eigenvalues.png": ("Eigenvalues at both ends, with their residuals.", lambda: plot_eigenpairs(spectrum.eigenpairs)),
        "density.png": ("Density of all eigenvalues; shaded: bounds of the share below.", lambda: plot_density(spectrum.density)),
    }
    layers = report.layers
    if layers is not None:
        found["layers.png"] = ("Top eigenvalue and trace of each layer's diagonal block.", lambda: plot_layers(layers))
    drawn = report.landscape
    if drawn is not None:
        found["lines.png"] = (
            "The loss along the top eigenvectors; dashed: slope and eigenvalue alone. Where the two part, the curvature at the weights says little.",
            lambda: plot_landscape(drawn),
        )
        if drawn.axis.numel():
            found["plane.png"] = (
                "The loss on a plane of two random directions, each filter's scaled to the norm of its weights.",
                lambda: plot_plane(drawn),
            )
    return found


def png(figure: Any) -> bytes:
    """The figure's picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_figures(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Every figure into `folder`, made if absent; -> their paths."""
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (_, draw) in figures(report).items():
        (into / name).write_bytes(png(draw()))
        written.append(into / name)
    return written
