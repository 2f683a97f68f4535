"""The Hessian of a loss over data as a SymmetricOperator."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any, final

import torch
from torch import nn

from fastsharp.batches import tensors_of
from fastsharp.curvature.autograd import GradientGraph
from fastsharp.errors import DeviceError, DisconnectedLossError, DtypeError, InputError, StaleOperatorError, UnusedParamWarning, stacklevel
from fastsharp.locate import non_finite_gradient
from fastsharp.losses import Value
from fastsharp.objective import Objective
from fastsharp.operator import BF16_NOISE, TF32_NOISE, SymmetricOperator
from fastsharp.params import ParamLayout, Selector

_NOISE = {"bf16": BF16_NOISE, "tf32": TF32_NOISE}


@final
class Hessian(SymmetricOperator):
    """H = d^2 L / d theta^2 of the weighted mean (or sum) of a loss over frozen data, at the present weights.

    Arguments are those of `fastsharp.lanczos`. `H @ v`, `H @ M` (columns), `H.apply(V)` (rows), `.to_scipy()`.
    Cost: a product is 6U a vector where the gradient's graph is kept, 9U where memory does not allow it (U: one forward
    pass's matrix products; a gradient is 3U); graphs are built in the first product and shared by all vectors of a block.
    At kinks (ReLU, max-pool) it is the Hessian almost everywhere, as autograd defines it.
    Raises StaleOperatorError when weights, buffers or data change afterwards; `.refresh()` takes the new weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Any = None,
        *,
        params: Selector = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        self.objective = Objective(
            model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout, memory=memory, seed=seed
        )
        super().__init__(self.objective.selection.layout.n, self.objective.dtype, self.objective.device)
        self.preflight: dict[str, Any] = {"level": "off"}
        self._options = {"bn": bn, "dropout": dropout, "memory": memory}
        self._precision: str | None = None  # of cheap products; None: the parameters' dtype
        self._relatives: weakref.WeakSet[Hessian] = weakref.WeakSet()  # operators on this objective: they share its budget for graphs
        self._reset()

    def cheap(self, precision: str) -> Hessian:
        """The same Hessian by cheaper products, for `precision=` of the solvers: its eigenpairs need correction by exact products.

        "bf16"   the forward pass under torch.autocast: weights stay float32, activations and their products are bfloat16.
                 Measured error of a product: 4e-3 to 2e-2 of its norm on small networks, more beside the kinks of ReLU and max-pool
        "tf32"   float32 matrix products and convolutions by TF32 units, CUDA only
        Data, weights and the watch over them are shared; graphs are kept apart, within one budget. float32 parameters only.
        Raises InputError, DtypeError, DeviceError.
        """
        if precision not in _NOISE:
            raise InputError(f"precision={precision!r} is none of {', '.join(map(repr, _NOISE))}.")
        if self.dtype != torch.float32:
            raise DtypeError(
                f"precision={precision!r}: the parameters are {self.dtype}, cheap products need float32. Use precision='auto'."
            )
        if precision == "tf32" and self.device.type != "cuda":
            raise DeviceError(f"precision='tf32': the model is on {self.device}, TF32 units are on CUDA devices. Use precision='auto'.")
        twin = copy.copy(self)
        twin._precision = precision
        twin._reset()
        return twin

    @property
    def noise(self) -> float:
        return 0.0 if self._precision is None else _NOISE[self._precision]

    def _reset(self) -> None:
        self._relatives.add(self)
        self._records = self.objective.records
        self._graphs: dict[int, tuple[GradientGraph, float]] = {}
        self._graph_bytes = 0
        self._all_kept = True
        self._denominator: float | None = None
        self._unused: tuple[str, ...] = ()

    def refresh(self) -> Hessian:
        """Take the model's present weights; the data stay the frozen ones, the preflight runs anew before a solver. Returns self."""
        if self._records == self.objective.records:
            self.objective.record_weights()
        else:
            self.objective.check_values()  # another operator on this objective has taken them
        self.preflight = {"level": "off"}
        self._reset()
        return self

    def release(self) -> None:
        """Drop the kept graphs, and the memory they hold; the next product builds them again."""
        self._reset()

    @property
    def notes(self) -> tuple[str, ...]:
        notes = self.objective.notes()
        if self._precision:
            notes.append(f"products in {self._precision}")
        if self._unused:
            notes.append(f"no gradient path to {', '.join(self._unused)}: their rows of the Hessian are zero")
        if not self._all_kept:
            notes.append(
                f"{len(self._graphs)} batches kept their graph; the others exceed the memory budget and are recomputed in every product"
            )
        notes.extend(self.preflight.get("notes", ()))
        if self.preflight["level"] == "off":
            notes.append("unchecked: preflight='off'")
        return tuple(notes)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "operator": "hessian",
            "backend": "autograd",
            "reduction": self.objective.reduction,
            **self._options,
            "products": self._precision or str(self.dtype).removeprefix("torch."),
            "preflight": self.preflight,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        return self.objective.provenance()

    @property
    def layout(self) -> ParamLayout:
        return self.objective.selection.layout

    def check_unchanged(self) -> None:
        self.objective.check_values()

    def reserve(self, nbytes: int) -> None:
        """Leave `nbytes` of the memory budget to a solver's basis: kept graphs get what is left of it."""
        self.objective.reserve(nbytes)

    def minibatch_graph(self, batch: Any, index: int = 0) -> tuple[GradientGraph, float]:
        """A fresh gradient graph of one batch and its scale in the numerator of L; call inside `objective.quiet()`."""
        value, graph = self._graph(batch, index)
        return graph, value.scale

    def _graph(self, batch: Any, index: int) -> tuple[Value, GradientGraph]:
        if self._precision and self.objective.modes.by_batch():
            with torch.no_grad():
                self.objective.evaluate_unchecked(index, batch)  # frozen statistics are those of the exact activations
        # no cache: it may hold casts that were made without a graph
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False):
            value = self.objective.evaluate(index, batch)
        graph = GradientGraph(value.loss, self.objective.selection.params)
        if graph.not_finite:  # a saturated unit hides an Inf in the data from the loss
            raise non_finite_gradient([self.objective.selection.names[i] for i in graph.not_finite], index, batch)
        return value, graph

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.objective.check_marks()
        if self._records != self.objective.records:
            raise StaleOperatorError("the weights were taken anew by another operator of this Hessian. Call refresh() on this one as well.")
        kept = self._denominator is not None and self._all_kept
        with self.objective.quiet(forward=not kept, tf32=self._precision == "tf32"):
            # autograd takes no tensor made under inference_mode, and writing into one is refused outside of it
            total = torch.zeros_like(V) if out.is_inference() else out.zero_()
            tangents = [self.layout.views(v) for v in (V.clone() if V.is_inference() else V)]
            sums = [self.layout.views(o) for o in total]
            if kept:
                for graph, scale in self._graphs.values():
                    _accumulate(graph, scale, tangents, sums)
            else:
                self._pass(tangents, sums)
            if self._denominator not in (None, 1.0):
                total.div_(self._denominator)
        if total is not out:
            out.copy_(total)

    def _pass(self, tangents: list[list[torch.Tensor]], sums: list[list[torch.Tensor]]) -> None:
        """One pass over the data: build missing graphs, keep those that fit, learn the denominator on the first one."""
        params = self.objective.selection.params
        ignore = {p.untyped_storage().data_ptr() for p in params}
        first, total, unused = self._denominator is None, 0.0, set(range(len(params)))
        if first:
            self._reset()  # an interrupted first pass leaves graphs whose counts are not known
        for index, batch in self.objective.batches:
            if index in self._graphs:
                graph, scale = self._graphs[index]
            else:
                value, graph = self._graph(batch, index)
                scale = value.scale
                if first:
                    total += 0.0 if value.count is None else value.count
                    unused &= set(graph.unused)
                    self._keep(index, graph, scale, ignore | {t.untyped_storage().data_ptr() for t in tensors_of(batch)})
            _accumulate(graph, scale, tangents, sums)
        if first:
            self._report_unused(unused)
            if self.objective.reduction != "sum" and not 0.0 < total < float("inf"):
                raise InputError(
                    f"the counts of the loss add up to {total:g} over all batches, so that its mean is not defined.\n"
                    "Check for labels that are all ignored, class weights of zero, or a loss that returns a wrong (sum, count)."
                )
            self._denominator = 1.0 if self.objective.reduction == "sum" else total

    def _keep(self, index: int, graph: GradientGraph, scale: float, ignore: set[int]) -> None:
        size = graph.nbytes(ignore) if self._all_kept else 0
        taken = sum(operator._graph_bytes for operator in self._relatives)
        if self._all_kept and not self.objective.batches.streamed and taken + size <= self.objective.graph_budget:
            self._graphs[index] = (graph, scale)
            self._graph_bytes += size
        else:
            self._all_kept = False

    def _report_unused(self, unused: set[int]) -> None:
        names = self.objective.selection.names
        if len(unused) == len(names):
            raise DisconnectedLossError(
                f"the loss has no path to any of the {len(names)} chosen parameters ({names[0]}, ...).\n"
                "Choose parameters that the loss depends on, or remove the .detach() between them."
            )
        self._unused = tuple(names[i] for i in sorted(unused))
        if self._unused and self._precision is None:  # the exact operator says it
            warnings.warn(
                f"no gradient path from the loss to {', '.join(self._unused)}: their rows of the Hessian are zero. Leave them out with params=.",
                UnusedParamWarning,
                stacklevel=stacklevel(),
            )


def _accumulate(graph: GradientGraph, scale: float, tangents: list[list[torch.Tensor]], sums: list[list[torch.Tensor]]) -> None:
    """sums[i] += scale * H_batch tangents[i], in place."""
    for tangent, total in zip(tangents, sums, strict=True):
        product = graph.product(tangent)
        if product is not None:
            torch._foreach_add_(total, list(product), alpha=scale)
