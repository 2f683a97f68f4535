"""fastsharp measure and compare: every measure of one checkpoint, or of two, shown and written."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsharp.cli.shared import (
    NOT_CONVERGED,
    OK,
    batches_of,
    data_of,
    describe,
    line,
    loss_of,
    network,
    new_console,
    set_mode,
    warnings_as_lines,
)

if TYPE_CHECKING:
    from fastsharp.results import Report

_SUFFIXES = (".json", ".npz", ".safetensors")
_SHARED = ("k", "steps", "rtol", "params", "bn", "dropout", "backend", "seed")
_MEASURE = (*_SHARED, "rho", "directions", "grid")
_COMPARE = (*_SHARED, "points")


def measure(args: argparse.Namespace) -> int:
    """Every measure of the user's network and weights on a named data set; what Ctrl-C leaves is written too."""
    import fastsharp
    from fastsharp.errors import Interrupted
    from fastsharp.results import Report

    _check_places(args)
    model, images = network(args, args.weights), data_of(args)
    mode = set_mode(model, args.bn, args.dropout)
    console = new_console()
    describe(console, args.model, mode, images)
    options: dict[str, Any] = {key: getattr(args, key) for key in _MEASURE}
    if args.parts:
        options["parts"] = args.parts
    batches = batches_of(images, next(model.parameters()).device, args.batch_size, one_hot=args.loss == "mse")
    began = time.perf_counter()
    try:
        with warnings_as_lines():
            report = fastsharp.measure(model, batches, loss_of(args.loss), **options)
    except Interrupted as e:
        if isinstance(e.partial, Report):
            _write(args, e.partial)
        raise
    console.print(report.table())
    for note in report.notes:
        line(console, "note", note)
    line(
        console, "cost", f"{time.perf_counter() - began:.1f} s, {report.cost['products']:.0f} products, {report.cost['passes']:.0f} passes"
    )
    if written := _write(args, report):
        line(console, "written", ", ".join(map(str, written)))
    missed = [name for name, e in report.measures.items() if report.groups[name] == "curvature" and not e.converged]
    if missed:
        print(f"fastsharp: {', '.join(missed)} did not reach the tolerance; raise --steps or --rtol", file=sys.stderr)
        return NOT_CONVERGED
    return OK


def compare(args: argparse.Namespace) -> int:
    """Two checkpoints of one network on a named data set."""
    import fastsharp
    from fastsharp.errors import InputError

    if len(args.weights) != 2:
        raise InputError(
            f"compare: {len(args.weights)} x --weights, expected two: --weights BEFORE.safetensors --weights AFTER.safetensors."
        )
    _check_places(args)
    models, images = [network(args, weights) for weights in args.weights], data_of(args)
    modes = [set_mode(model, args.bn, args.dropout) for model in models]
    console = new_console()
    describe(console, f"{args.model}, a: {args.weights[0]}, b: {args.weights[1]}", modes[0], images)
    batches = batches_of(images, next(models[0].parameters()).device, args.batch_size, one_hot=args.loss == "mse")
    with warnings_as_lines():
        a, b = models
        found = fastsharp.compare(a, b, batches, loss_of(args.loss), **{key: getattr(args, key) for key in _COMPARE})
    console.print(found.table())
    for note in found.notes:
        line(console, "note", note)
    written = []
    if args.json:
        written.append(found.save(args.json))
    if args.plots:
        into = Path(args.plots)
        found.plot(into / "comparison.png")
        written.append(into / "comparison.png")
    if written:
        line(console, "written", ", ".join(map(str, written)))
    return OK


def _check_places(args: argparse.Namespace) -> None:
    """Files can be written where they are asked for: said before the work, not after it."""
    from fastsharp.errors import InputError

    if args.json and Path(args.json).suffix not in _SUFFIXES:
        raise InputError(f"--json {args.json}: the suffix is none of {', '.join(_SUFFIXES)}. Results are written by their suffix.")
    for option in ("report", "json"):
        if place := getattr(args, option, None):
            if Path(place).is_dir():
                raise InputError(f"--{option} {place} is a folder. Give the name of a file.")
            Path(place).parent.mkdir(parents=True, exist_ok=True)
    if args.plots:
        if Path(args.plots).is_file():
            raise InputError(f"--plots {args.plots} is a file. Give the name of a folder.")
        Path(args.plots).mkdir(parents=True, exist_ok=True)


def _write(args: argparse.Namespace, report: Report) -> list[Path]:
    """Page, record and figures as far as they are asked for; -> their paths."""
    written = []
    if args.report:
        written.append(report.to_html(args.report))
    if args.json:
        written.append(report.save(args.json))
    if args.plots:
        written += report.plot(args.plots)
    return written
