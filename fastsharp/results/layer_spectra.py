"""LayerSpectra: what is known of each layer's diagonal block, and of what the blocks leave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastsharp.params import ParamLayout
from fastsharp.results.estimate import Estimate
from fastsharp.results.result import Result

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The k leading eigenpairs and the trace of one layer's diagonal block H_ll."""

    name: str
    kind: str  # class of the module, "" for a group of parameters
    params: tuple[str, ...]
    n: int
    eigenvalues: torch.Tensor  # (k,) float64 on the host; fewer where the layer has fewer parameters
    residuals: torch.Tensor  # (k,) float64, ||H_ll v - lambda v||
    error_bounds: torch.Tensor  # (k,) float64 bounds of the values' errors
    converged: torch.Tensor  # (k,) bool
    trace: Estimate  # stderr 0 where the rows of the local factor were formed
    n_matvec: int  # products of the block: Krylov steps, verification, and those of the trace
    route: str  # "dense", "jacobian", "sensitivity": local factor; "engine"; "none": no path to the loss, the block is zero
    reason: str = ""  # why the engine
    norm: tuple[float, float] | None = None  # ||H_ll||_F and its standard error, from the probes of the coupling
    coupling: tuple[float, float] | None = None  # ||H_l: without H_ll||_F, the rest of the layer's rows, and its standard error
    eigenvectors: torch.Tensor | None = None  # (k, n) rows, where vectors=True asked for them
    layout: ParamLayout | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self, i: int) -> dict[str, torch.Tensor]:
        """Eigenvector i as {parameter name: tensor of the parameter's shape}."""
        if self.eigenvectors is None or self.layout is None:
            from fastsharp.errors import InputError

            raise InputError(f"as_dict: the vectors of layer {self.name!r} were not kept. Pass vectors=True to layer_spectra.")
        return self.layout.unflatten(self.eigenvectors[i])


@dataclass(frozen=True, eq=False)
class Coupling:
    """What a block view leaves out: D has the diagonal blocks of H, H - D the rest. Standard errors come from the spread over the probes."""

    rest: tuple[float, float]  # ||H - D||_F and its standard error
    blocks: tuple[float, float]  # ||D||_F
    share: tuple[float, float]  # ||H - D||_F^2 / ||H||_F^2
    probes: int
    pairs: torch.Tensor | None = None  # (L, L) float64, ||H_lm||_F, where coupling="pairs" asked for it
    pairs_stderr: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerSpectra(Result):
    """All layers' spectra from one sweep; a sequence of `LayerSpectrum` in the model's order, also by name."""

    layers: tuple[LayerSpectrum, ...]
    coupling: Coupling | None
    n_matvec: int  # products with the whole matrix, for the coupling
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerSpectrum]:
        return iter(self.layers)

    def __getitem__(self, key: int | str) -> LayerSpectrum:
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        raise KeyError(f"no layer is called {key!r}; there are {', '.join(layer.name for layer in self.layers)}")

    def table(self) -> Table:
        """One row a layer: parameters, top eigenvalue with its error bound, least one of the list, trace, coupling, route."""
        from fastsharp._report import layer_table

        return layer_table(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the leading eigenvalues and traces by layer; written as PNG if a path is given."""
        from fastsharp.plots import plot_layers

        return plot_layers(self, path)
