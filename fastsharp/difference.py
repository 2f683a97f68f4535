"""Is the Hessian-vector product the derivative of the gradient? Compared in float64, on a copy of the weights.

Note on numerical properties. E(h) = (g(t + hv) - g(t - hv)) / 2h - Hv for unit v has four parts:
  truncation  O(h^2): 1e-10 of ||Hv|| at the first step
  rounding    eps ||g|| / h: 1e-9 of ||g|| at the first step, and the limit to how small h can be
  kinks       a ReLU whose sign changes between the two points adds a jump / 2h. How many do is proportional to h, to the
              samples and to the units; at the first step a residual network on 32 images crosses dozens of them
  a fault     (detached term, backward taken as constant, product of the transposed matrix): the same vector at every h
So one step that passes the gate is proof, and one that fails is none. What fails is tried again with smaller steps and fewer
samples, at a point a little beside the weights, where no unit sits on its kink exactly (zero biases under zero pixels do).
Last comes a ladder of steps on one sample: the error of a fault has a plateau there, the same vector on neighbouring steps,
while kinks vanish or grow tenfold and rounding is random. Where there is neither a pass nor a plateau (a network trained to
a loss near zero, whose gradient is rounding to the fifth digit), the smallest mismatch seen bounds what can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastsharp.batches import count_of, head, tree_map
from fastsharp.curvature.autograd import GaussNewtonGraph, GradientGraph, lacks_second_derivative
from fastsharp.curvature.form import HESSIAN, Form
from fastsharp.curvature.mlp import double_product
from fastsharp.curvature.rop.linearise import Linearised
from fastsharp.curvature.rop.tape import record
from fastsharp.doubling import double_loss, to_double
from fastsharp.losses import Value
from fastsharp.swap import with_weights
from fastsharp.widening import NARROW, Doubling

if TYPE_CHECKING:
    from fastsharp.curvature.finite_sum import FiniteSum

DIFFERENCE_GATE = 1e-5  # of ||Hv||: healthy networks stay below 5e-10, the weakest planted fault was 1.4e-2
_SAMPLES = 32
STEP = 1e-6  # of max(1, ||theta||)
_BESIDE = 1e-4  # of max(1, ||theta||): 100 times the largest step, 0.01 % of a typical weight
_AGREE = 0.3  # errors of two steps closer than this share of their norm are one and the same fault
_ATTEMPTS = ((1.0, _SAMPLES, False), (0.1, _SAMPLES, False), (0.1, 4, True))  # share of the step, samples, beside the weights
_LADDER = tuple(10.0**-e for e in range(7))  # shares of the step on one sample
_CANDIDATES = 8  # samples among which the one with the largest loss is taken: a saturated one tells nothing
Found = TypeVar("Found")


def mismatch(double: DoubleGradient, v: torch.Tensor, generator: torch.Generator) -> tuple[float, bool]:
    """(||E|| / ||Hv|| at the step where it is smallest, whether it is a fault)."""
    size = max(1.0, float(double.theta.norm()))
    aside = torch.randn(v.numel(), generator=generator, dtype=torch.float64).to(v.device)
    beside = double.theta + _BESIDE * size / float(aside.norm()) * aside
    best = float("inf")
    for shrink, samples, moved in _ATTEMPTS:
        found = _error(double, beside if moved else double.theta, v, STEP * size * shrink, lambda count=samples: double.limit(count))  # type: ignore[misc]
        best = min(best, best if found is None else found[0])
        if best <= DIFFERENCE_GATE:
            return best, False
    chosen = double.hardest(_CANDIDATES)
    rungs = []
    for shrink in _LADDER:
        found = _error(double, beside, v, STEP * size * shrink, lambda: double.limit(1, chosen))
        if found is not None:
            rungs.append(found)
            if found[0] <= DIFFERENCE_GATE:
                return found[0], False
    if rungs:
        lowest = min(share for share, _ in rungs)
        flat = [max(a, b) for (a, E), (b, F) in pairwise(rungs) if float((E - F).norm()) <= _AGREE * float(E.norm())]
        if flat and min(flat) <= 2 * lowest:  # at smaller steps rounding joins in
            return min(flat), True
        best = min(best, lowest)
    return best, False


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """||got - exact|| / ||exact||; of a product that is zero, ||got||."""
    scale = float(exact.norm())
    return float((got - exact).norm()) / (scale or 1.0)


def _error(
    double: DoubleGradient, point: torch.Tensor, v: torch.Tensor, h: float, cut: Callable[[], None]
) -> tuple[float, torch.Tensor] | None:
    """(||E(h)|| / ||Hv||, E(h)), None where the point tells nothing: not finite, no gradient, or a batch that cannot be cut so small."""
    try:
        cut()
        Hv, g = double.product(point, v)
        E = (double.gradient(point + h * v) - double.gradient(point - h * v)) / (2 * h) - Hv
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    error, scale, slope = E.norm(), Hv.norm(), g.norm()
    if not error < float("inf") or scale == slope == 0.0:
        return None
    return float(share(error, scale, slope, h)), E


def share(error: torch.Tensor, scale: torch.Tensor, slope: torch.Tensor, h: float | torch.Tensor) -> torch.Tensor:
    """||E|| / ||Hv|| from ||E||, ||Hv|| and ||g||, entry by entry; at most the gate where rounding of g is all that can be seen."""
    # a gradient that hardly depends on the weights leaves rounding to compare with; below 1e-9 of it nothing can be said
    unseen = error <= torch.minimum(128 * torch.finfo(torch.float64).eps * slope / h, 1e-9 * slope)
    found = torch.where(scale > 0.0, error / scale, torch.inf)
    return torch.where(unseen, found.clamp(max=DIFFERENCE_GATE), found)


class DoubleGradient:
    """Gradient and product of a float64 copy of the objective on a few samples of one batch; the model is not touched.

    cuttable  whether it can be evaluated on a part of its batch
    narrow   the operation whose result depends on the parameters and is in float32 for all that, None where there is none
    """

    def __init__(self, operator: FiniteSum, index: int, batch: Any) -> None:
        self._operator = operator
        self._objective = operator.objective
        self._layout = operator.layout
        self._key = ("float64", index)
        self._original = batch
        self._default = torch.get_default_dtype()
        self.narrow: str | None = None
        model = self._objective.model
        # a buffer may be stored in float32 whatever the parameters are, so everything floating goes along
        self._constants = {name: to_double(t.detach()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._loss = double_loss(self._objective.loss)
        self.theta = torch.cat([p.detach().double().reshape(-1) for p in self._objective.selection.params])
        self.cuttable = True
        self._settle()

    def _settle(self) -> None:
        """Evaluate once: a model may need its whole batch, or create tensors of the default dtype on its way."""
        for default, cuttable in ((self._default, True), (torch.float64, True), (torch.float64, False)):
            self._default, self.cuttable = default, cuttable
            self.limit(_SAMPLES)
            try:
                self.gradient(self.theta)
                return
            except (RuntimeError, ValueError, IndexError, TypeError):
                if not cuttable:
                    raise

    def limit(self, samples: int, start: int = 0) -> None:
        """Use at most this many samples, from `start` on, where the batch can be cut."""
        cut = head(self._original, start, start + samples) if self.cuttable and count_of(self._original) > samples else None
        self._single = self._original if cut is None else cut
        self._batch = tree_map(to_double, self._single)

    @property
    def samples(self) -> int:
        """How many there are at present."""
        return count_of(self._single)

    def hardest(self, most: int) -> int:
        """Which of the first samples has the largest loss by itself."""
        losses = []
        for start in range(min(most, count_of(self._original)) if self.cuttable else 0):
            try:
                self.limit(1, start)
                with self._doubled(), torch.no_grad():
                    losses.append(float(self._value(list(self._layout.views(self.theta))).loss))
            except (RuntimeError, ValueError, IndexError, TypeError):
                break
        finite = [i for i, value in enumerate(losses) if value < float("inf")]
        return max(finite, key=losses.__getitem__) if finite else 0

    def rounding(self, v: torch.Tensor) -> float:
        """||A v - (A v in float64)|| / ||A v|| for the operator's own products: what the model's precision loses, on the same samples."""
        self.limit(_SAMPLES)
        exact = self._or_by_engine(lambda: self.exact(v), lambda: self.by_engine(v)[0])
        own = torch.zeros(1, len(v), dtype=self._objective.dtype, device=v.device)
        self._operator.minibatch_products(self._single, self._key).products.add_products(v.to(own.dtype)[None], own, 1.0)
        return relative_error(own[0].double(), exact)

    def exact(self, v: torch.Tensor) -> torch.Tensor:
        """A v at the weights by autograd, for the matrix of the operator."""
        form = self._operator.form
        return self._by_autograd(self.theta, v)[0] if form == HESSIAN else self.formed(form, v)

    def formed(self, form: Form, v: torch.Tensor) -> torch.Tensor:
        """A v at the weights by autograd, for the matrix of this form."""
        with self.evaluation() as (value, leaves):
            output, loss = self._split(value, leaves, form)
            graph = GradientGraph(loss, leaves) if output is None else GaussNewtonGraph(loss, output, leaves)
            product = graph.product(self._layout.views(v))
        return torch.zeros_like(v) if product is None else torch.cat([p.reshape(-1) for p in product])

    @contextmanager
    def evaluation(self) -> Iterator[tuple[Value, list[torch.Tensor]]]:
        """The loss at the weights with its graph, and the tensors that stand for the parameters."""
        leaves = [view.detach().requires_grad_() for view in self._layout.views(self.theta)]
        with self._doubled():
            yield self._value(leaves), leaves

    def constants(self, form: Form, value: Value) -> Any:
        """What a form's stand-in takes of an evaluation."""
        return form.constants(value, self._batch, self._loss, self._objective.draw_seed(self._key))

    def _split(self, value: Value, leaves: list[torch.Tensor], form: Form) -> tuple[torch.Tensor | None, torch.Tensor]:
        seed = self._objective.draw_seed(self._key)
        output, value = form.of(value, self._batch, self._loss, leaves, self._layout.names, seed)
        return output, value.loss

    def by_engine(
        self, v: torch.Tensor, rules: int | None = None, theta: torch.Tensor | None = None, form: Form | None = None
    ) -> tuple[torch.Tensor, list[tuple[str, str]]]:
        """(A v by the R-operator, its calls), by default at the weights; Unrecorded where there is no tape. `rules` as in `Linearised`."""
        leaves = [view.detach().requires_grad_() for view in self._layout.views(self.theta if theta is None else theta)]
        form = form or self._operator.form
        out = torch.zeros_like(v)[None]
        with self._doubled():
            tape = record(lambda: self._split(self._value(leaves), leaves, form), leaves, modules=self._objective.model)
            linearised = Linearised(tape, rules=rules)
            linearised.product(self._layout.rows(v[None]), self._layout.rows(out), gauss=form.gauss)
        return out[0], linearised.names

    def by_kernel(self, v: torch.Tensor) -> torch.Tensor:
        """A v at the weights by the native kernel; Unavailable where it does not apply."""
        return double_product(self._objective, self._key, self._single, v, self._operator.form.gauss)

    def gradient(self, theta: torch.Tensor) -> torch.Tensor:
        """g(theta), (n,)."""
        leaves = [view.detach().requires_grad_() for view in self._layout.views(theta)]
        with self._doubled():
            grads = torch.autograd.grad(self._value(leaves).loss, leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    def product(self, theta: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(H v, g) at theta, by the engine where it computes the products and torch has no second derivative."""
        return self._or_by_engine(
            lambda: self._by_autograd(theta, v), lambda: (self.by_engine(v, theta=theta, form=HESSIAN)[0], self.gradient(theta))
        )

    def _or_by_engine(self, by_autograd: Callable[[], Found], by_engine: Callable[[], Found]) -> Found:
        """By the engine where it computes the products and torch has no second derivative."""
        try:
            return by_autograd()
        except RuntimeError as e:
            if self._operator.backend != "rop" or not lacks_second_derivative(e):
                raise
        return by_engine()

    def _by_autograd(self, theta: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves = [view.detach().requires_grad_() for view in self._layout.views(theta)]
        with self._doubled():
            grads = torch.autograd.grad(self._value(leaves).loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
            pairs = [(g, t) for g, t in zip(grads, self._layout.views(v), strict=True) if g.requires_grad]
            outputs, tangents = [g for g, _ in pairs], [t for _, t in pairs]
            if pairs:
                product = torch.autograd.grad(outputs, leaves, tangents, allow_unused=True, materialize_grads=True)
            else:
                product = tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.cat([p.reshape(-1) for p in product]), torch.cat([g.detach().reshape(-1) for g in grads])

    def _value(self, leaves: list[torch.Tensor]) -> Value:
        objective = self._objective
        weights = self._constants | dict(zip(self._layout.names, leaves, strict=True))

        def call() -> Value:
            with objective.modes.applied(self._key, objective.mask_seed(self._key)):
                return self._loss(self._batch)

        value = with_weights(objective.model, weights, call)
        if value.loss.dtype in NARROW:
            self.narrow = "the loss"
        return value

    @contextmanager
    def _doubled(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._default)
        try:
            with Doubling() as mode:
                yield
            self.narrow = self.narrow or mode.narrow
        finally:
            torch.set_default_dtype(before)
