"""The command line: fastsharp demo, lanczos and info.

Exit codes: 0 done, 1 an error of fastsharp (its message on stderr), 2 usage, 3 at least one pair did not converge,
130 Ctrl-C (the pairs so far are printed).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fastsharp.data import ImageData
    from fastsharp.results import Eigenpairs

OK, FAILED, USAGE, NOT_CONVERGED, CTRL_C = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argv defaults to the process's arguments."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as e:  # argparse exits by itself for --help and usage errors
        return e.code if isinstance(e.code, int) else USAGE
    from fastsharp.errors import FastsharpError, Interrupted
    from fastsharp.results import Eigenpairs

    try:
        return int(args.run(args))
    except Interrupted as e:
        print(f"fastsharp: {e}", file=sys.stderr)
        if isinstance(e.partial, Eigenpairs):
            from fastsharp._report import table

            _console().print(table(e.partial))
        return CTRL_C
    except KeyboardInterrupt:
        print("fastsharp: interrupted before the first result", file=sys.stderr)
        return CTRL_C
    except FastsharpError as e:
        print(f"fastsharp: {type(e).__name__}: {e}", file=sys.stderr)
        return FAILED


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
    return _measure(model, images, {"k": args.k}, name=name, weights=weights, out=Path(args.out))


def lanczos(args: argparse.Namespace) -> int:
    """Top eigenpairs of the user's network and weights on a named data set."""
    import torch
    import torch.nn.functional as F

    from fastsharp import data
    from fastsharp.errors import DeviceError
    from fastsharp.models import load_weights

    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        have = f"cpu and {torch.cuda.device_count()} CUDA devices"
        raise DeviceError(f"--device {args.device}: not usable here; found {have}. Give one of those.") from e
    model = _factory(args.model)
    load_weights(model, args.weights)
    images = data.load(args.data, split=args.split, root=args.root, samples=args.samples, seed=args.seed)
    options = {key: getattr(args, key) for key in _PASSED_ON}
    options["loss_fn"] = F.mse_loss if args.loss == "mse" else F.cross_entropy
    return _measure(
        model.to(device),
        images,
        options,
        name=args.model,
        weights=Path(args.weights),
        out=Path(args.out) if args.out else None,
        batch_size=args.batch_size,
        one_hot=args.loss == "mse",
        save_vectors=args.vectors,
    )


def info(args: argparse.Namespace) -> int:
    """Versions, devices and which kernels are live."""
    from fastsharp import _environment

    print(_environment.info_text())
    return OK


def _measure(
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
    from fastsharp import data
    from fastsharp._report import facts, relative_residuals, table
    from fastsharp.data._files import sha256_file
    from fastsharp.results import _files

    mode = _set_mode(model, options.get("bn"), options.get("dropout"))
    device = next(model.parameters()).device
    target = _one_hot(len(images.classes)) if one_hot else None
    batches = [(x.to(device), y.to(device)) for x, y in data.loader(images, batch_size=batch_size, target=target)]
    console = _console()
    lossy = "; LOSSY, not comparable with published figures" if images.lossy else ""
    _line(console, "model", f"{name}; {mode}")
    _line(console, "data", f"{images.name}, {images.split}: {len(images):,} images{lossy}")
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        setattr(warnings, "showwarning", _show_warning)  # noqa: B010  (mypy forbids the assignment)
        result: Eigenpairs = fastsharp.lanczos(model, batches, **options)
    seconds = time.perf_counter() - began
    console.print(table(result))
    for label, text in facts(result, seconds):
        _line(console, label, text)
    for note in result.notes:
        _line(console, "note", note)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        model_record = {"name": name, "mode": mode, "weights": str(weights), "weights_sha256": sha256_file(weights)}
        extra = {"n_parameters": result.eigenvectors.shape[1], "relative_residuals": relative_residuals(result)}
        extra |= {"seconds": seconds, "data": images.provenance(), "model": model_record}
        _files.save(result, out / "result.json", extra=extra)
        result.plot(out / "eigenvalues.png")
        if save_vectors:
            result.save(out / "eigenvectors.safetensors")
        _line(console, "written", ", ".join(sorted(str(out / p.name) for p in out.iterdir() if p.name in _WRITTEN)))
    if not bool(result.converged.all()):
        missed = int((~result.converged).sum())
        print(f"fastsharp: {missed} of {len(result)} pairs did not reach the tolerance; raise --max-iter or --tol", file=sys.stderr)
        return NOT_CONVERGED
    return OK


_PASSED_ON = ("k", "which", "tol", "criterion", "max_iter", "seed", "params", "bn", "dropout", "operator", "backend", "resume")
_WRITTEN = ("result.json", "eigenvalues.png", "eigenvectors.safetensors")


def _set_mode(model: torch.nn.Module, bn: str | None, dropout: str | None) -> str:
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


def _one_hot(classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    return lambda y: torch.nn.functional.one_hot(y, classes).to(torch.float32)


def _factory(spec: str) -> torch.nn.Module:
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


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _line(console: Console, label: str, text: str) -> None:
    """`label  text`, the text hanging in its own column, so that long notes stay readable in 80 columns."""
    indent = " " * 14
    wrapped = textwrap.fill(text, max(console.width, 40), initial_indent=indent, subsequent_indent=indent)
    console.print(f"{label:<{len(indent)}}{wrapped[len(indent) :]}", markup=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    from fastsharp.errors import NotConvergedWarning

    if not issubclass(category, NotConvergedWarning):  # the table and the exit code say it already
        print(f"fastsharp: {category.__name__}: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastsharp", description="Certified top eigenpairs of a loss Hessian.", epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | lanczos | info")

    p = commands.add_parser("demo", help="a trained network and data that are part of the package; under a minute")
    p.add_argument("--out", default="fastsharp-demo", metavar="DIR", help="folder for result.json and eigenvalues.png (%(default)s)")
    p.add_argument("-k", type=int, default=10, help="number of eigenpairs (%(default)s)")
    p.add_argument("--samples", type=int, metavar="N", help="class-balanced subset of the 1,000 training images (all)")
    p.set_defaults(run=demo)

    p = commands.add_parser("lanczos", help="your network, your weights, a named data set", epilog=_EPILOG)
    p.add_argument("model", metavar="MODULE:FACTORY", help="a function without arguments that returns the network")
    p.add_argument("--weights", required=True, metavar="FILE.safetensors", help="state_dict, keys exactly those of the network")
    p.add_argument("--data", required=True, metavar="NAME", help="fashion_mnist_mini, fashion_mnist, cifar10, cifar10_jpeg or synthetic")
    p.add_argument("--split", choices=("train", "test"), default="train", help="(%(default)s)")
    p.add_argument("--samples", type=int, metavar="N", help="class-balanced seeded subset (all)")
    p.add_argument("--root", metavar="DIR", help="folder searched first for the data; else $FASTSHARP_DATA, system, cache")
    p.add_argument("-k", type=int, default=5, help="number of eigenpairs (%(default)s)")
    p.add_argument("--which", choices=("LA", "SA", "LM", "BE"), default="LA", help="largest, smallest, by modulus, both ends (%(default)s)")
    p.add_argument("--tol", type=float, default=1e-3, help="relative tolerance (%(default)s)")
    p.add_argument("--criterion", choices=("residual", "value"), default="residual", help="what tol bounds (%(default)s)")
    p.add_argument("--max-iter", type=int, metavar="M", help="most Krylov products (automatic)")
    p.add_argument(
        "--batch-size", type=int, default=500, metavar="B", help="images per forward pass, no effect on the result (%(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the start vector and the subset (%(default)s)")
    p.add_argument("--loss", choices=("ce", "mse"), default="ce", help="cross-entropy, or mean square against one-hot (%(default)s)")
    p.add_argument("--params", action="append", metavar="GLOB", help="parameters to include, may be repeated (all)")
    p.add_argument("--bn", choices=("eval", "frozen-batch-stats"), help="which Hessian is meant for BatchNorm (eval)")
    p.add_argument("--dropout", choices=("eval", "fixed-masks"), help="which Hessian is meant for Dropout (eval)")
    kinds = ("hessian", "ggn", "fisher", "empirical-fisher", "gradient-covariance", "residual")
    p.add_argument("--operator", choices=kinds, default="hessian", help="which curvature matrix (%(default)s)")
    p.add_argument("--backend", choices=("auto", "rop", "autograd", "mlp"), default="auto", help="what computes products (%(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    p.add_argument("--out", metavar="DIR", help="folder for result.json and eigenvalues.png")
    p.add_argument("--resume", metavar="LOG", help="log of the products: created, or continued after a crash")
    p.add_argument("--vectors", action="store_true", help="also write eigenvectors.safetensors into --out")
    p.set_defaults(run=lanczos)

    p = commands.add_parser("info", help="versions, devices and which kernels are live")
    p.set_defaults(run=info)
    return parser


_EPILOG = "Exit codes: 0 done, 1 error, 2 usage, 3 not converged, 130 interrupted."

if __name__ == "__main__":
    raise SystemExit(main())
