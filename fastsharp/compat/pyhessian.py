"""The calls of PyHessian (github.com/amirgholami/PyHessian), served by fastsharp.

    from fastsharp.compat.pyhessian import hessian      # was: from pyhessian import hessian

Arguments, returned types and their order are PyHessian's. What differs is in docs/how-to/coming-from-pyhessian.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import fastsharp
from fastsharp.api.subject import checked
from fastsharp.compat._shared import evaluating, present, probe_forms, unwrapped
from fastsharp.errors import ArgumentTypeError, DeviceError, InputError
from fastsharp.results import Density, Eigenpairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class hessian:
    """The Hessian of `criterion(model(inputs), targets)` over one batch or a loader, in eval mode, at the model's present weights.

    model       nn.Module; evaluated in eval mode, and given its mode back
    criterion   loss(outputs, targets) -> scalar
    data        one batch (inputs, targets), or
    dataloader  an iterable of batches, of which the mean weighted by the number of samples counts
    cuda        True asks for a model on a GPU, False for one on the host; data are moved to the model

    `.pairs` and `.measure` hold the Eigenpairs and the Density behind the last call, with residuals and notes.
    Raises DeviceError where model and `cuda` disagree, InputError, and all that `fastsharp.Hessian` and its preflight raise.
    Random probes follow torch.manual_seed.
    """

    def __init__(
        self, model: nn.Module, criterion: Any, data: Any = None, dataloader: Iterable[Any] | None = None, cuda: bool = True
    ) -> None:
        if (data is None) == (dataloader is None):
            raise InputError("hessian: give either data=(inputs, targets) or dataloader=, one of the two.")
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"hessian: model is a {type(model).__name__}, expected a torch.nn.Module.")
        self.model, self.criterion = model, criterion
        self.full_dataset = data is None
        self.device = "cuda" if cuda else "cpu"
        self._network = unwrapped(model)
        self._check_device()
        loader = dataloader if data is None else [data]
        with evaluating(self._network):
            # PyHessian averages the losses of batches, whatever the criterion's own reduction; of one batch that is the loss itself
            self._operator = fastsharp.Hessian(self._network, loader, criterion, reduction="mean")
            checked(self._operator)
        self.params = list(self._operator.objective.selection.params)
        self.pairs: Eigenpairs | None = None
        self.measure: Density | None = None

    def _check_device(self) -> None:
        found = next((p.device for p in self._network.parameters()), None)
        if found is None or found.type == self.device:
            return
        if self.device == "cuda":
            gpus = f"{torch.cuda.device_count()} GPUs are there" if torch.cuda.is_available() else "and there is no usable GPU"
            raise DeviceError(
                f"hessian: cuda=True, which is the default, but the model is on {found}, {gpus}.\nPass cuda=False, or move it: model.cuda()."
            )
        raise DeviceError(f"hessian: cuda=False, but the model is on {found}. Leave cuda out, or move it: model.cpu().")

    def eigenvalues(self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1) -> tuple[list[float], list[list[torch.Tensor]]]:
        """The top_n eigenvalues of largest modulus, and unit eigenvectors as lists of tensors, one for each parameter.

        maxIter  products for each eigenvalue, at most
        tol      relative residual ||Hv - lambda v|| / |lambda|. PyHessian's is the change between two power iterations, no error bound

        Cost: that of `fastsharp.lanczos`, usually 20 to 40 products. NotConvergedWarning where maxIter did not do.
        """
        _at_least_one("eigenvalues", maxIter=maxIter, top_n=top_n)
        with evaluating(self._network):
            operator = present(self._operator)
            self.pairs = fastsharp.lanczos(operator, k=top_n, which="LM", tol=tol, max_iter=maxIter * top_n, seed=_seed(), progress=False)
        return self.pairs.eigenvalues.tolist(), [self._operator.layout.views(v) for v in self.pairs.eigenvectors]

    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """z'Hz for Rademacher probes z; their mean estimates tr H.

        maxIter  probes, at most
        tol      stops when a probe moves the running mean m by less than tol (|m| + 1e-6), PyHessian's rule. That is no error bound, and
                 may come true by chance: `fastsharp.trace` gives an interval

        Cost: a product a probe, up to seven more.
        """
        _at_least_one("trace", maxIter=maxIter)
        samples: list[float] = []
        total = mean = 0.0
        with evaluating(self._network), torch.inference_mode(False), torch.no_grad():
            operator = present(self._operator)
            for sample in probe_forms(operator, "rademacher", maxIter, _seed(), "trace"):
                samples.append(sample)
                total += sample
                before, mean = mean, total / len(samples)
                if abs(mean - before) < tol * (abs(before) + 1e-6):
                    break
            operator.check_unchanged()
        return samples

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Ritz values and weights, sum 1, of n_v Lanczos runs of `iter` steps from Rademacher probes: what `get_esd_plot` takes.

        Runs in small spaces end before `iter` steps; shorter lists are filled up with their last value at weight 0.
        """
        _at_least_one("density", iter=iter, n_v=n_v)
        with evaluating(self._network):
            operator = present(self._operator)
            self.measure = fastsharp.density(operator, probes=n_v, steps=iter, kind="rademacher", seed=_seed(), progress=False)
        rules = [(nodes.tolist(), weights.tolist()) for nodes, weights in self.measure.probes]
        longest = max(len(nodes) for nodes, _ in rules)
        nodes = [x + [x[-1]] * (longest - len(x)) for x, _ in rules]
        return nodes, [w + [0.0] * (longest - len(w)) for _, w in rules]


def get_esd_plot(eigenvalues: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]) -> Figure:
    """The density on a logarithmic axis, written as example.pdf into the working folder, as density_plot.py of PyHessian does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    density, grid = density_generate(eigenvalues, weights)
    figure = Figure(layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.semilogy(grid, density + 1e-7)
    axes.set_ylabel("Density (Log Scale)", fontsize=14)
    axes.set_xlabel("Eigenvalue", fontsize=14)
    axes.set_xlim(float(np.min(eigenvalues)) - 1, float(np.max(eigenvalues)) + 1)
    figure.savefig("example.pdf")
    return figure


def density_generate(
    eigenvalues: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    num_bins: int = 10000,
    sigma_squared: float = 1e-5,
    overhead: float = 0.01,
) -> tuple[Any, Any]:
    """(density, grid): Gaussians of variance sigma_squared max(1, range) at the eigenvalues, mean over the runs, with integral one."""
    nodes, masses = np.asarray(eigenvalues, dtype=float), np.asarray(weights, dtype=float)
    low, high = nodes.min(axis=1).mean() - overhead, nodes.max(axis=1).mean() + overhead
    grid = np.linspace(low, high, num_bins)
    variance = sigma_squared * max(1.0, high - low)
    density = np.zeros(num_bins)
    for x, w in zip(nodes, masses, strict=True):
        density += np.exp(-((grid[:, None] - x) ** 2) / (2 * variance)) @ w
    return density / (density.sum() * (grid[1] - grid[0])), grid


def _seed() -> int:
    """Drawn from torch's generator, so that torch.manual_seed makes a script repeatable and calls differ."""
    return int(torch.randint(2**62, (), dtype=torch.int64))


def _at_least_one(call: str, **counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{call}: {name} is {count!r}, expected an int of at least 1.")
