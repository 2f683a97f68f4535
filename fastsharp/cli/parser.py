"""Commands and options of the command line."""

from __future__ import annotations

import argparse

from fastsharp.cli.measures import compare, measure
from fastsharp.cli.pairs import demo, lanczos
from fastsharp.cli.shared import OK

PARTS = ("curvature", "gauss-newton", "perturbation", "trajectory", "function", "layers", "landscape")
EPILOG = "Exit codes: 0 done, 1 error, 2 usage, 3 not converged, 130 interrupted."


def info(args: argparse.Namespace) -> int:
    """Versions, devices and which kernels are live."""
    from fastsharp import _environment

    print(_environment.info_text())
    return OK


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="fastsharp", description="Sharpness of trained networks: certified eigenpairs, measures, comparisons.", epilog=EPILOG
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="demo | lanczos | measure | compare | info")

    p = commands.add_parser("demo", help="a trained network and data that are part of the package; under a minute")
    p.add_argument("--out", default="fastsharp-demo", metavar="DIR", help="folder for result.json and eigenvalues.png (%(default)s)")
    p.add_argument("-k", type=int, default=10, help="number of eigenpairs (%(default)s)")
    p.add_argument("--samples", type=int, metavar="N", help="class-balanced subset of the 1,000 training images (all)")
    p.set_defaults(run=demo)

    p = commands.add_parser("lanczos", help="your network, your weights, a named data set", epilog=EPILOG)
    _subject(p)
    p.add_argument("-k", type=int, default=5, help="number of eigenpairs (%(default)s)")
    p.add_argument("--which", choices=("LA", "SA", "LM", "BE"), default="LA", help="largest, smallest, by modulus, both ends (%(default)s)")
    p.add_argument("--tol", type=float, default=1e-3, help="relative tolerance (%(default)s)")
    p.add_argument("--criterion", choices=("residual", "value"), default="residual", help="what tol bounds (%(default)s)")
    p.add_argument("--max-iter", type=int, metavar="M", help="most Krylov products (automatic)")
    kinds = ("hessian", "ggn", "fisher", "empirical-fisher", "gradient-covariance", "residual")
    p.add_argument("--operator", choices=kinds, default="hessian", help="which curvature matrix (%(default)s)")
    p.add_argument("--out", metavar="DIR", help="folder for result.json and eigenvalues.png")
    p.add_argument("--resume", metavar="LOG", help="log of the products: created, or continued after a crash")
    p.add_argument("--vectors", action="store_true", help="also write eigenvectors.safetensors into --out")
    p.set_defaults(run=lanczos)

    p = commands.add_parser("measure", help="every measure of sharpness of one checkpoint, as a table and a page", epilog=EPILOG)
    _subject(p)
    _spectrum(p)
    p.add_argument("--parts", action="append", choices=PARTS, help="what to measure beside the curvature, may be repeated (all)")
    p.add_argument("--rho", type=float, default=0.005, help="length of the random steps of SAM-sharpness (%(default)s)")
    p.add_argument("--directions", type=int, default=100, metavar="N", help="random directions of it (%(default)s)")
    p.add_argument("--grid", type=int, default=15, metavar="N", help="points a side of the plane of the loss, 0 for none (%(default)s)")
    p.add_argument("--report", metavar="FILE.html", help="one self-contained page with the figures")
    _outputs(p, "PNG figures")
    p.set_defaults(run=measure)

    p = commands.add_parser("compare", help="two checkpoints of one network", epilog=EPILOG)
    _subject(p, checkpoints=2)
    _spectrum(p)
    p.add_argument("--points", type=int, default=31, metavar="N", help="points on the line between the two (%(default)s)")
    _outputs(p, "the PNG figure")
    p.set_defaults(run=compare)

    p = commands.add_parser("info", help="versions, devices and which kernels are live")
    p.set_defaults(run=info)
    return made


def _subject(p: argparse.ArgumentParser, checkpoints: int = 1) -> None:
    """What is measured: network, weights, data, loss, and which matrix is meant."""
    p.add_argument("model", metavar="MODULE:FACTORY", help="a function without arguments that returns the network")
    what = "state_dict, keys exactly those of the network"
    if checkpoints == 1:
        p.add_argument("--weights", required=True, metavar="FILE.safetensors", help=what)
    else:
        p.add_argument("--weights", required=True, action="append", metavar="FILE.safetensors", help=f"{what}; give it twice")
    p.add_argument("--data", required=True, metavar="NAME", help="fashion_mnist_mini, fashion_mnist, cifar10, cifar10_jpeg or synthetic")
    p.add_argument("--split", choices=("train", "test"), default="train", help="(%(default)s)")
    p.add_argument("--samples", type=int, metavar="N", help="class-balanced seeded subset (all)")
    p.add_argument("--root", metavar="DIR", help="folder searched first for the data; else $FASTSHARP_DATA, system, cache")
    p.add_argument(
        "--batch-size", type=int, default=500, metavar="B", help="images per forward pass, no effect on the result (%(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="of random vectors and the subset (%(default)s)")
    p.add_argument("--loss", choices=("ce", "mse"), default="ce", help="cross-entropy, or mean square against one-hot (%(default)s)")
    p.add_argument("--params", action="append", metavar="GLOB", help="parameters to include, may be repeated (all)")
    p.add_argument("--bn", choices=("eval", "frozen-batch-stats"), help="which Hessian is meant for BatchNorm (eval)")
    p.add_argument("--dropout", choices=("eval", "fixed-masks"), help="which Hessian is meant for Dropout (eval)")
    p.add_argument("--backend", choices=("auto", "rop", "autograd", "mlp"), default="auto", help="what computes products (%(default)s)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")


def _spectrum(p: argparse.ArgumentParser) -> None:
    p.add_argument("-k", type=int, default=5, help="eigenpairs at each end (%(default)s)")
    p.add_argument("--steps", type=int, default=80, metavar="M", help="fewest Krylov steps: the resolution of the density (%(default)s)")
    p.add_argument("--rtol", type=float, default=0.05, help="relative tolerance of trace and norm (%(default)s)")


def _outputs(p: argparse.ArgumentParser, figures: str) -> None:
    p.add_argument("--json", metavar="FILE", help="the result as .json, .npz or .safetensors, which fastsharp.load reads")
    p.add_argument("--plots", metavar="DIR", help=f"folder for {figures}")
