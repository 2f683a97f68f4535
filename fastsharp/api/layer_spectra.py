"""layer_spectra: top eigenpairs and trace of every layer's diagonal block, in one sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastsharp.api.layer_coupling import CouplingProbes
from fastsharp.api.subject import checked, kind_of, operator_of
from fastsharp.batches import Budget
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.layers import Block, Layer, LayerBlocks, Layers, layers_of, route_notes
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, listing
from fastsharp.krylov.lanczos import report_failure, solve
from fastsharp.krylov.request import check_arguments
from fastsharp.krylov.trace import check_arguments as check_trace_arguments
from fastsharp.krylov.trace import trace
from fastsharp.params import Selector, select
from fastsharp.progress import Progress
from fastsharp.results import Eigenpairs, Estimate, LayerSpectra, LayerSpectrum

COUPLINGS = ("total", "pairs", None)
_LEAST_PROBES = 2


def layer_spectra(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    k: int = 5,
    layers: Layers = None,
    which: str = "LA",
    tol: float = 1e-3,
    criterion: str = "residual",
    max_iter: int | None = None,
    trace_rtol: float = 0.05,
    confidence: float = 0.95,
    coupling: str | None = "total",
    probes: int = 8,
    vectors: bool = False,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    operator: str = "hessian",
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    progress: bool | None = None,
    strict: bool = False,
    strict_data: bool = False,
    preflight: str = "fast",
) -> LayerSpectra:
    """H_ll x = lambda x for every layer l: the k leading eigenpairs and the trace of each diagonal block, and what the blocks leave out.

        spectra = fastsharp.layer_spectra(model, loader)
        spectra["fc"].eigenvalues, spectra.coupling.share

    model, loader, loss_fn, params, reduction, bn, dropout, operator, memory, progress, strict, strict_data, preflight   as in
                `fastsharp.lanczos`
    k, which, tol, criterion, max_iter   of each block, as in `fastsharp.lanczos`; a layer of fewer than k parameters has as many pairs
    layers      None: every module with parameters of its own, weight and bias together. Names of modules: a glob picks such modules, an
                exact name takes all below it as one layer; `f(name, module)`; or {label: parameters} as `params=` takes them
    trace_rtol, confidence   where a trace is estimated by probes; most are exact
    coupling    "total": ||H - D||_F for the matrix D of blocks, with its standard error; "pairs": every ||H_lm||_F as well; None: neither
    probes      random vectors behind the coupling: so many products with H, or so many a layer for "pairs"
    vectors     keep the eigenvectors
    backend     "auto": local factors where the rule in `docs/how-to/layer-spectra.md` allows them, else products of the layer's parameters
                alone; any other: such products alone, by that backend
    seed        of start vectors and probes

    A local factor is d output / d (layer's output), C backward passes for C outputs, and serves all products of the layer. It makes the
    Gauss-Newton block; of the Hessian it makes the block only where the network is linear in the layer and all that follows (ReLU,
    max-pooling, BatchNorm in eval), which is read off the recorded calls and checked by products. `route` and `reason` of a layer say which way
    it went.

    Returns LayerSpectra. Raises what `fastsharp.lanczos` does; Ctrl-C raises Interrupted with the layers so far in `.partial`.
    Source of the blocks' identity: Schraudolph 2002; Botev, Ritter and Barber 2017, section 5.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"layer_spectra: the model is a {type(model).__name__}, expected a torch.nn.Module: only a model has layers."
        )
    kind_of(operator)
    if coupling not in COUPLINGS:
        raise InputError(f"layer_spectra: coupling={coupling!r} is none of {', '.join(map(repr, COUPLINGS))}.")
    if isinstance(probes, bool) or not isinstance(probes, int):
        raise ArgumentTypeError(f"layer_spectra: probes is {probes!r}, a {type(probes).__name__}; expected an int.")
    if coupling is not None and probes < _LEAST_PROBES:
        raise InputError(f"layer_spectra: probes={probes} tell no standard error. Pass at least {_LEAST_PROBES}, or coupling=None.")
    arguments: dict[str, Any] = {"which": which, "tol": tol, "criterion": criterion, "max_iter": max_iter, "seed": seed, "strict": strict}
    check_arguments(max(k, 1) if isinstance(k, int) else 1, k=k, method="auto", **{**arguments, "max_iter": None})
    estimate = {"rtol": trace_rtol, "confidence": confidence, "seed": seed}
    check_trace_arguments("layer_spectra", atol=None, method="auto", max_products=2000, pairs=None, **estimate)  # type: ignore[arg-type]
    selection = select(model, params)
    chosen = layers_of(model, selection, layers)
    names = {name for layer in chosen for name in layer.params}
    whole = names == set(selection.names)
    matrix = operator_of(
        model,
        loader,
        loss_fn,
        params=params if whole else [name for name in selection.names if name in names],
        reduction=reduction,
        bn=bn,
        dropout=dropout,
        operator=operator,
        backend=backend,
        memory=memory,
        seed=seed,
        preflight=preflight,
    )
    assert isinstance(matrix, FiniteSum)
    checked(matrix, preflight=preflight, strict_data=strict_data, seed=seed)
    run = _Run(matrix, chosen, k, arguments, estimate, vectors, Budget.of(memory, matrix.device).total // 2)
    if not whole:
        left = [name for name in selection.names if name not in names]
        run.notes += [f"parameters of no chosen layer left out: {listing(left)}"] if left else []
        run.notes += [f"frozen parameters left out: {listing(selection.frozen)}"] if selection.frozen else []
    shown = Progress(progress, "Layer spectra")
    with shown, torch.inference_mode(False), torch.no_grad():
        try:
            run.all(shown, coupling, probes, local=backend == "auto" and matrix.kind in ("hessian", "ggn"))
        except KeyboardInterrupt as interrupt:
            message = f"layer_spectra: interrupted after {len(run.rows)} of {len(chosen)} layers; .partial holds these."
            raise Interrupted(message, run.result(None, 0)) from interrupt
    return run.outcome


class _Run:
    """One call: the blocks in their order, and the rows so far."""

    def __init__(
        self,
        matrix: FiniteSum,
        layers: list[Layer],
        k: int,
        arguments: dict[str, Any],
        estimate: dict[str, Any],
        vectors: bool,
        basis: int,
    ) -> None:
        self.matrix, self.layers, self.k = matrix, layers, k
        self.arguments, self.estimate, self.vectors, self.basis = arguments, estimate, vectors, basis
        self.rows: dict[str, LayerSpectrum] = {}
        self.notes: list[str] = []
        self.blocks: list[Block] = []

    def all(self, shown: Progress, coupling: str | None, probes: int, *, local: bool) -> None:
        """Every layer's row, and the coupling."""
        matrix, layout = self.matrix, self.matrix.layout
        place = {name: torch.arange(a, b) for name, a, b in zip(layout.names, layout.offsets, layout.offsets[1:], strict=False)}
        columns = [torch.cat([place[name] for name in layer.params]).to(matrix.device) for layer in self.layers]
        sampled = None
        if coupling is not None and len(self.layers) > 1:
            sampled = CouplingProbes(matrix, columns, probes, self.arguments["seed"], pairs=coupling == "pairs")
        elif coupling is not None:
            self.notes.append("one layer: there is no coupling between layers")
        number = {layer.name: i for i, layer in enumerate(self.layers)}
        for block in LayerBlocks(matrix, self.layers, local=local, seed=self.arguments["seed"]):
            pairs = self._pairs(block, shown)
            i = number[block.layer.name]
            if sampled is not None:
                sampled.see(i, block.operator, pairs)
            self._row(block, pairs, None if sampled is None else sampled.norms(i))
            block.release()
        self.outcome = self.result(sampled, 0 if sampled is None else sampled.n_matvec)

    def _pairs(self, block: Block, shown: Progress) -> Eigenpairs | None:
        if block.operator is None:
            return None
        n = block.layout.n
        check = "off" if block.route == "engine" else "auto"  # the preflight has looked at the engine's products
        request = check_arguments(n, k=min(self.k, n), method="auto", check=check, **self.arguments)
        found, settled = solve(block.operator, request, memory=self.basis, on_step=shown.on_step)
        report_failure(found, request, settled, f"layer {block.layer.name}: ")
        return found

    def _row(self, block: Block, pairs: Eigenpairs | None, norms: tuple[tuple[float, float], tuple[float, float]] | None) -> None:
        layer, n, k = block.layer, block.layout.n, min(self.k, block.layout.n)
        zero = torch.zeros(k, dtype=torch.float64)
        traced = self._trace(block, pairs)
        blank = torch.zeros(k, n, dtype=self.matrix.dtype, device=self.matrix.device)
        self.blocks.append(block)
        self.rows[layer.name] = LayerSpectrum(
            name=layer.name,
            kind=layer.kind,
            params=layer.params,
            n=n,
            eigenvalues=zero if pairs is None else pairs.eigenvalues,
            residuals=zero if pairs is None else pairs.residuals,
            error_bounds=zero if pairs is None else pairs.error_bounds,
            converged=torch.ones(k, dtype=torch.bool) if pairs is None else pairs.converged,
            trace=traced,
            n_matvec=traced.n_matvec + (0 if pairs is None else pairs.n_matvec + pairs.n_verify),
            route=block.route,
            reason=block.reason,
            norm=None if norms is None else norms[0],
            coupling=None if norms is None else norms[1],
            eigenvectors=None if not self.vectors else blank if pairs is None else pairs.eigenvectors,
            layout=block.layout,
            notes=() if pairs is None else tuple(note for note in pairs.notes if note not in self.matrix.notes),
        )

    def _trace(self, block: Block, pairs: Eigenpairs | None) -> Estimate:
        """Without a product where the factor's rows were formed, else by probes beside the known pairs."""
        if block.trace is None:
            assert block.operator is not None
            return trace(block.operator, pairs=pairs, check="off", strict=self.arguments["strict"], **self.estimate)
        rounding = 8 * torch.finfo(self.matrix.dtype).eps * abs(block.trace)
        at = (block.trace - rounding, block.trace + rounding)
        return Estimate(block.trace, 0.0, at, self.estimate["confidence"], samples=0, n_matvec=0, converged=True)

    def result(self, sampled: CouplingProbes | None, products: int) -> LayerSpectra:
        """The rows in the model's order."""
        matrix = self.matrix
        return LayerSpectra(
            layers=tuple(self.rows[layer.name] for layer in self.layers if layer.name in self.rows),
            coupling=None if sampled is None else sampled.coupling(),
            n_matvec=products,
            notes=(*matrix.notes, *self.notes, *route_notes(self.blocks)),
            settings={
                **matrix.settings,
                "k": self.k,
                **self.arguments,
                **{f"trace_{k}": v for k, v in self.estimate.items() if k != "seed"},
            },
            provenance=matrix.provenance,
        )
