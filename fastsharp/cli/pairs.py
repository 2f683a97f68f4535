"""fastsharp demo and lanczos: eigenpairs, shown and written."""

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
    import torch

    from fastsharp.data import ImageData
    from fastsharp.results import Eigenpairs

_PASSED_ON = ("k", "which", "tol", "criterion", "max_iter", "seed", "params", "bn", "dropout", "operator", "backend", "resume")
_WRITTEN = ("result.json", "eigenvalues.png", "eigenvectors.safetensors")


def demo(args: argparse.Namespace) -> int:
    """Top eigenpairs of the shipped network on the embedded sample, printed, plotted and recorded."""
    from fastsharp import data
    from fastsharp.data import _files
    from fastsharp.models import demo_cnn, load_weights

    model = demo_cnn()
    weights = _files.own_file("demo_cnn.safetensors")
    about = load_weights(model, weights)
    images = data.load("fashion_mnist_mini", samples=args.samples)
    name = f"demo_cnn, trained on Fashion-MNIST, test accuracy {float(about['test_accuracy']):.2%}"
    return _pairs(model, images, {"k": args.k}, name=name, weights=weights, out=Path(args.out))


def lanczos(args: argparse.Namespace) -> int:
    """Top eigenpairs of the user's network and weights on a named data set."""
    options = {key: getattr(args, key) for key in _PASSED_ON}
    options["loss_fn"] = loss_of(args.loss)
    return _pairs(
        network(args, args.weights),
        data_of(args),
        options,
        name=args.model,
        weights=Path(args.weights),
        out=Path(args.out) if args.out else None,
        batch_size=args.batch_size,
        one_hot=args.loss == "mse",
        save_vectors=args.vectors,
    )


def _pairs(
    model: torch.nn.Module,
    images: ImageData,
    options: dict[str, Any],
    *,
    name: str,
    weights: Path,
    out: Path | None,
    batch_size: int = 500,
    one_hot: bool = False,
    save_vectors: bool = False,
) -> int:
    """lanczos on the images, shown; written into `out` if given. The model is put into the mode that the options mean."""
    import fastsharp
    from fastsharp._report import facts, relative_residuals, table
    from fastsharp.data._files import sha256_file
    from fastsharp.results import _files

    mode = set_mode(model, options.get("bn"), options.get("dropout"))
    batches = batches_of(images, next(model.parameters()).device, batch_size, one_hot=one_hot)
    console = new_console()
    describe(console, name, mode, images)
    began = time.perf_counter()
    with warnings_as_lines():
        result: Eigenpairs = fastsharp.lanczos(model, batches, **options)
    seconds = time.perf_counter() - began
    console.print(table(result))
    for label, text in facts(result, seconds):
        line(console, label, text)
    for note in result.notes:
        line(console, "note", note)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        model_record = {"name": name, "mode": mode, "weights": str(weights), "weights_sha256": sha256_file(weights)}
        extra = {"n_parameters": result.eigenvectors.shape[1], "relative_residuals": relative_residuals(result)}
        extra |= {"seconds": seconds, "data": images.provenance(), "model": model_record}
        _files.save(result, out / "result.json", extra=extra)
        result.plot(out / "eigenvalues.png")
        if save_vectors:
            result.save(out / "eigenvectors.safetensors")
        line(console, "written", ", ".join(sorted(str(out / p.name) for p in out.iterdir() if p.name in _WRITTEN)))
    if not bool(result.converged.all()):
        missed = int((~result.converged).sum())
        print(f"fastsharp: {missed} of {len(result)} pairs did not reach the tolerance; raise --max-iter or --tol", file=sys.stderr)
        return NOT_CONVERGED
    return OK
