"""A curvature matrix of a loss over data as a weighted sum of the batches' matrices."""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import nn

from fastsharp.batches import tensors_of
from fastsharp.curvature.backends import MAKERS, SPECIAL, against, candidates, check_backend
from fastsharp.curvature.batch_products import BatchProducts, Made, Request, Unavailable
from fastsharp.curvature.cheap import NOISE, check_precision
from fastsharp.curvature.cuda_graph import recorder_of
from fastsharp.curvature.form import Form
from fastsharp.curvature.kept import KeptSum, writable
from fastsharp.curvature.network_output import refuse_batch_loss
from fastsharp.curvature.said import preflight_notes, unused_names, warn_unused
from fastsharp.errors import EngineError, InputError, StaleOperatorError, listing
from fastsharp.locate import non_finite_gradient
from fastsharp.objective import Objective
from fastsharp.operator import SymmetricOperator
from fastsharp.params import ParamLayout, Selector
from fastsharp.reading import deaths_told

Own = TypeVar("Own", bound="FiniteSum")


class FiniteSum(SymmetricOperator):
    """A = sum_b scale_b A_b / sum_b count_b over frozen batches, at the weights of construction; subclasses say which A_b is meant.

    Products of a batch come from a backend; batches are linearised in the first product and kept where memory allows.
    """

    splits = True  # at the network's output, which the loss then has to show

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
        backend: str = "auto",
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        if self.splits:
            refuse_batch_loss(loss_fn, self.kind)
        check_backend(backend)
        self.objective = Objective(
            model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout, memory=memory, seed=seed
        )
        super().__init__(self.objective.selection.layout.n, self.objective.dtype, self.objective.device)
        self.preflight: dict[str, Any] = {"level": "off"}
        self._options = {"bn": bn, "dropout": dropout, "memory": memory}
        self._candidates = candidates(backend, self.objective)  # backends to be used, the first of them at present
        self._refusals: list[str] = []  # why an earlier candidate was left
        self._precision: str | None = None  # of cheap products; None: the parameters' dtype
        self._relatives: weakref.WeakSet[FiniteSum] = weakref.WeakSet()  # operators on this objective: they share its budget
        self._reset()

    @property
    @abstractmethod
    def form(self) -> Form:
        """Which matrix of a batch it is made of."""

    @property
    def kind(self) -> str:
        """What `operator=` calls this matrix."""
        return self.form.kind

    @property
    def by_sample(self) -> bool:
        """Whether it is a mean of matrices of single samples, so that a part of the data gives a part of it."""
        return True

    @property
    @abstractmethod
    def label(self) -> str:
        """The matrix in a sentence: "the Hessian"."""

    def cheap(self: Own, precision: str) -> Own:
        """The same matrix by cheaper products, for `precision=` of the solvers: its eigenpairs need correction by exact products.

        "bf16"   the forward pass under torch.autocast: weights stay float32, activations, their tangents and products are bfloat16.
                 Measured error of a product: 4e-3 to 2e-2 of its norm on small networks, more beside the kinks of ReLU and max-pool
        "tf32"   float32 matrix products and convolutions by TF32 units, CUDA only
        Data, weights and the watch over them are shared; graphs are kept apart, within one budget. float32 parameters only.
        Raises InputError, DtypeError, DeviceError.
        """
        check_precision(precision, self.dtype, self.device)
        twin = copy.copy(self)
        twin._precision = precision
        # the native kernel has none in bfloat16
        twin._candidates = [name for name in self._candidates if name not in SPECIAL or precision != "bf16"] or ["rop", "autograd"]
        twin._refusals = []
        twin._reset()
        return twin

    @property
    def noise(self) -> float:
        return 0.0 if self._precision is None else NOISE[self._precision]

    @property
    def backend(self) -> str:
        """The backend of the products: what "auto" took, as far as batches have been seen."""
        return self._candidates[0]

    @property
    def cuda_graph(self) -> tuple[int, ...]:
        """Numbers of rows b for which products are replayed as a CUDA graph at present; `notes` name the reason where there is none."""
        return () if self._sum is None else self._sum.replayed

    def _reset(self) -> None:
        self._relatives.add(self)
        self._records = self.objective.records
        self._kept: dict[int, tuple[BatchProducts, float]] = {}
        self._kept_bytes = 0
        self._all_kept = True
        self._denominator: float | None = None
        self._unused: tuple[str, ...] = ()
        self._islands: dict[str, None] = {}
        self._sum: KeptSum | None = None

    def refresh(self: Own) -> Own:
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
        if self.objective.kinks and self.kind == "hessian":
            notes.append(
                f"a.e. Hessian (almost everywhere): no second derivative at the kinks of {listing(self.objective.kinks, 4)}; "
                "that of the smooth piece around the weights is meant. operator='ggn' needs none"
            )
        if self.objective.uses_attention and self.backend == "autograd":
            notes.append("attention ran on torch's MATH kernel, the one with a second derivative")
        if self._precision:
            notes.append(f"products in {self._precision}")
        notes += [f"products by {self.backend}: {reason}" for reason in self._refusals]
        if self._islands:
            notes.append(f"by torch's double backward of one call: {listing(list(self._islands), 4)}")
        if self._unused:
            notes.append(f"no gradient path to {', '.join(self._unused)}: their rows of {self.label} are zero")
        if not self._all_kept:
            notes.append(
                f"{len(self._kept)} batches kept their graph; the others exceed the memory budget and are recomputed in every product"
            )
        if self._sum is not None and self._sum.refusal:
            notes.append(f"products without a CUDA graph: {self._sum.refusal}")
        return (*notes, *preflight_notes(self.preflight))

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "operator": self.kind,
            "backend": self.backend,
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

    def minibatch_products(self, batch: Any, index: Any = 0) -> Made:
        """Fresh products of one batch, not kept; call inside `objective.quiet()`."""
        while True:
            try:
                return self._make(batch, index)
            except Unavailable as e:
                self._fall_back(e)

    def settle_backend(self) -> None:
        """Let "auto" decide by the first batch, at the cost of linearising it."""
        if len(self._candidates) > 1 and self._denominator is None:
            with self.objective.quiet(tf32=self._precision == "tf32"):
                self.minibatch_products(self.objective.batches.first())

    def _make(self, batch: Any, index: Any) -> Made:
        if self._precision and self.objective.modes.by_batch():
            with torch.no_grad():
                self.objective.evaluate_unchecked(index, batch)  # frozen statistics are those of the exact activations
        reason = against(self.backend, self.objective) if len(self._candidates) > 1 else None  # a hook may be new since
        if reason:
            raise Unavailable(reason)
        request = Request(self.objective, index, batch, self.form, self._precision == "bf16")
        made = MAKERS[self.backend](request.exact() if self._precision else request)
        if made.products.not_finite:  # a saturated unit hides an Inf in the data from the loss
            raise non_finite_gradient([self.objective.selection.names[i] for i in made.products.not_finite], index, batch)
        self._islands.update(dict.fromkeys(made.products.islands))
        return made

    def _fall_back(self, refusal: Unavailable) -> None:
        """The next backend from here on, for all batches: a sum has one rounding, whichever batches are kept."""
        if len(self._candidates) == 1:
            raise EngineError(
                f"backend={self.backend!r} cannot compute this model's products: {refusal}.\nUse backend='auto' or 'autograd'."
            ) from refusal
        if self.backend not in SPECIAL:
            self._refusals.append(str(refusal))
        self._candidates = self._candidates[1:]
        self._reset()

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.objective.check_marks()
        if self._records != self.objective.records:
            raise StaleOperatorError("the weights were taken anew by another operator on these data. Call refresh() on this one as well.")
        if self._denominator is not None and self._all_kept:
            self._kept_sum().product(V, out, self._fits)
            return
        with deaths_told(), self.objective.quiet(tf32=self._precision == "tf32"), writable(V, out) as (rows, total):
            while not self._passed(rows, total):
                total.zero_()
            if self._denominator not in (None, 1.0):
                total.div_(self._denominator)

    def _kept_sum(self) -> KeptSum:
        if self._sum is None:
            assert self._denominator is not None
            tf32 = self._precision == "tf32"
            recorder = recorder_of(self.device)
            self._sum = KeptSum(self._kept.values(), self._denominator, self.objective, tf32=tf32, recorder=recorder)
        return self._sum

    def _fits(self, nbytes: int) -> bool:
        """Whether so much more may be held, beside what operators on this objective hold."""
        held = sum(o._kept_bytes + (0 if o._sum is None else o._sum.nbytes) for o in self._relatives)
        return held + nbytes <= self.objective.graph_budget

    def _passed(self, V: torch.Tensor, total: torch.Tensor) -> bool:
        """One pass over the data; False where the backend refused a batch and the next one has to start over."""
        try:
            self._pass(V, total)
        except Unavailable as e:
            self._fall_back(e)
            return False
        return True

    def _pass(self, V: torch.Tensor, total: torch.Tensor) -> None:
        """total += the numerator's products: make missing ones, keep those that fit, learn the denominator on the first pass."""
        params = self.objective.selection.params
        ignore = {p.untyped_storage().data_ptr() for p in params}
        first, counts, unused = self._denominator is None, 0.0, set(range(len(params)))
        if first:
            self._reset()  # an interrupted first pass leaves graphs whose counts are not known
        for index, batch in self.objective.batches:
            if index in self._kept:
                products, scale = self._kept[index]
            else:
                made = self._make(batch, index)
                products, scale = made.products, made.scale
                if first:
                    counts += 0.0 if made.count is None else made.count
                    unused &= set(products.unused)
                    self._keep(index, products, scale, ignore | {t.untyped_storage().data_ptr() for t in tensors_of(batch)})
            products.add_products(V, total, scale)
        if first:
            self._unused = unused_names(self.objective.selection.names, unused)
            if self._unused and self._precision is None:  # the exact operator says it
                warn_unused(self._unused, self.label)
            if self.objective.reduction != "sum" and not 0.0 < counts < float("inf"):
                raise InputError(
                    f"the counts of the loss add up to {counts:g} over all batches, so that its mean is not defined.\n"
                    "Check for labels that are all ignored, class weights of zero, or a loss that returns a wrong (sum, count)."
                )
            self._denominator = self.divisor(counts)

    def divisor(self, counts: float) -> float:
        """What the sum over batches is divided by; counts: that of their counts."""
        return 1.0 if self.objective.reduction == "sum" else counts

    def _keep(self, index: int, products: BatchProducts, scale: float, ignore: set[int]) -> None:
        size = products.nbytes(ignore) if self._all_kept else 0
        if self._all_kept and not self.objective.batches.streamed and self._fits(size):
            self._kept[index] = (products, scale)
            self._kept_bytes += size
        else:
            self._all_kept = False
