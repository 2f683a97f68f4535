"""What the commands share: the network with its weights, the data, and how they are shown."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fastsharp.data import ImageData

OK, FAILED, USAGE, NOT_CONVERGED, CTRL_C = 0, 1, 2, 3, 130


def network(args: argparse.Namespace, weights: str) -> torch.nn.Module:
    """The network that MODULE:FACTORY makes, with these weights, on --device."""
    import torch

    from fastsharp.errors import DeviceError
    from fastsharp.models import load_weights

    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        have = f"cpu and {torch.cuda.device_count()} CUDA devices"
        raise DeviceError(f"--device {args.device}: not usable here; found {have}. Give one of those.") from e
    model = factory(args.model)
    load_weights(model, weights)
    return model.to(device)


def data_of(args: argparse.Namespace) -> ImageData:
    """The named data set."""
    from fastsharp import data

    return data.load(args.data, split=args.split, root=args.root, samples=args.samples, seed=args.seed)


def loss_of(name: str) -> Any:
    """The loss that --loss names."""
    import torch.nn.functional as F

    return F.mse_loss if name == "mse" else F.cross_entropy


def batches_of(images: ImageData, device: torch.device, batch_size: int, *, one_hot: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images and their labels on the device; one-hot float labels for a mean square."""
    from fastsharp import data

    target = one_hot_of(len(images.classes)) if one_hot else None
    return [(x.to(device), y.to(device)) for x, y in data.loader(images, batch_size=batch_size, target=target)]


def describe(console: Console, name: str, mode: str, images: ImageData) -> None:
    """Two lines: what is measured, and on what."""
    lossy = "; LOSSY, not comparable with published figures" if images.lossy else ""
    line(console, "model", f"{name}; {mode}")
    line(console, "data", f"{images.name}, {images.split}: {len(images):,} images{lossy}")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings go to the error stream, a line each."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setattr(warnings, "showwarning", show_warning)  # noqa: B010  (mypy forbids the assignment)
        yield


def set_mode(model: torch.nn.Module, bn: str | None, dropout: str | None) -> str:
    """Eval mode, except the modules for which the caller asked for a train-mode Hessian; says what was done."""
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    model.eval()
    kept = []
    for wanted, kind, label in ((bn == "frozen-batch-stats", _BatchNorm, "BatchNorm"), (dropout == "fixed-masks", _DropoutNd, "Dropout")):
        if wanted:
            for m in model.modules():
                if isinstance(m, kind):
                    m.train()
            kept.append(label)
    return "set to eval()" + (f", {' and '.join(kept)} to train()" if kept else "")


def one_hot_of(classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    return lambda y: torch.nn.functional.one_hot(y, classes).to(torch.float32)


def factory(spec: str) -> torch.nn.Module:
    """MODULE:FACTORY, imported with the current folder on the path, called without arguments."""
    from torch import nn

    from fastsharp.errors import ArgumentTypeError, InputError

    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise InputError(f"{spec!r} is not MODULE:FACTORY, such as fastsharp.models:demo_cnn or my_nets:make_net.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except ImportError as e:
        raise InputError(f"{spec}: cannot import {module_name} ({e}).\nRun in the folder that holds it, or install it.") from e
    except AttributeError as e:
        raise InputError(f"{spec}: module {module_name} has no {name}. Give the name of a function that returns the model.") from e
    try:
        model = factory()
    except TypeError as e:
        raise InputError(f"{spec}: calling {name}() without arguments failed: {e}.\nWrite a function without arguments around it.") from e
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{spec}: {name}() returned a {type(model).__name__}, expected a torch.nn.Module.")
    return model


def new_console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def line(console: Console, label: str, text: str) -> None:
    """`label  text`, the text hanging in its own column, so that long notes stay readable in 80 columns."""
    indent = " " * 14
    wrapped = textwrap.fill(text, max(console.width, 40), initial_indent=indent, subsequent_indent=indent)
    console.print(f"{label:<{len(indent)}}{wrapped[len(indent) :]}", markup=False, soft_wrap=True)


def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    from fastsharp.errors import NotConvergedWarning

    if not issubclass(category, NotConvergedWarning):  # the table and the exit code say it already
        print(f"fastsharp: {category.__name__}: {message}", file=sys.stderr)
