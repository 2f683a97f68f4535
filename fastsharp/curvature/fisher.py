"""Fisher matrices of a loss over data as SymmetricOperators: with labels drawn from the model, and with those of the data."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import nn

from fastsharp import quantiles
from fastsharp.curvature.autograd import GaussNewtonGraph
from fastsharp.curvature.examples import check_additive
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.curvature.form import Form
from fastsharp.curvature.network_output import network_output
from fastsharp.curvature.predictive import drawn_scores, recognised
from fastsharp.curvature.scores import OuterProducts, own_scores
from fastsharp.errors import ArgumentTypeError, InputError, ShapeError
from fastsharp.params import Selector
from fastsharp.results import Estimate

NAMES = {"mc": "fisher", "empirical": "empirical-fisher"}
FEWEST = 4  # draws that a standard error takes: Student's quantile is known to 0.2 % from 3 degrees of freedom on


@final
class Fisher(FiniteSum):
    """F = E_x E_y~p(y|x) [g g'] by draws of y, or with the data's own labels: E = (1/N) sum_i g_i g_i'; g the gradient of an example's loss.

    kind        "mc": `mc_samples` labels are drawn from the model's predictive distribution for every example, once, from `seed`: the
                same matrix in every product. It converges to `fastsharp.GGN` as mc_samples grows, with the same weights (ignored labels,
                class weights, mean or sum).
                Softmax cross-entropy draws a class for every row of logits (a token, a pixel) and sums the outer products of rows; mean
                squared error (a normal law of variance D/2 for the mean over an example's D numbers, 1/2 for a sum) and binary
                cross-entropy with logits draw an example's whole output.
                "empirical": the labels are the data's. An example is an index of the output's first dimension: a whole sequence in a
                language model. With L = (1/N) sum_i l_i, g_i is the gradient of l_i, so that the mean of g_i is the gradient of L; N counts
                all examples. Where L is a mean over tokens, l_i is N / (tokens in all) times the sum over the example's tokens. For
                reduction "sum", L = sum_i l_i and E = sum_i g_i g_i'.
    mc_samples  draws an example; the variance falls as 1 / mc_samples. A row of logits keeps a class a draw, other outputs a copy of theirs
    seed        of the draws (and of dropout's masks)

    Other arguments, methods and errors are those of `fastsharp.GGN`: the loss is split at the network's output. Cost: 4U a vector.
    Raises InputError where the loss has no known predictive distribution ("mc"), or is no sum over examples ("empirical").
    """

    label = "the Fisher matrix"

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Any = None,
        *,
        kind: str = "mc",
        mc_samples: int = 1,
        params: Selector = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        backend: str = "auto",
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        if kind not in NAMES:
            raise InputError(f"Fisher: kind={kind!r} is none of {', '.join(map(repr, NAMES))}.")
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int):
            raise ArgumentTypeError(f"Fisher: mc_samples is a {type(mc_samples).__name__}, expected an int.")
        if mc_samples < 1 or (mc_samples > 1 and kind != "mc"):
            expected = "at least 1" if kind == "mc" else "none: kind='empirical' draws nothing"
            raise InputError(f"Fisher: mc_samples is {mc_samples}, expected {expected}.")
        self._kind = NAMES[kind]  # before the loss is looked at
        super().__init__(
            model,
            loader,
            loss_fn,
            params=params,
            reduction=reduction,
            bn=bn,
            dropout=dropout,
            backend=backend,
            memory=memory,
            seed=seed,
        )
        self.mc_samples = mc_samples if kind == "mc" else None
        if kind == "mc":
            self.objective.batches.in_order = True  # draws go by the place of a row in its batch
            scores = drawn_scores(recognised(self.objective, self.kind), mc_samples)
        else:
            check_additive(self.objective, self.kind)
            scores = own_scores
        self._form = Form(self.kind, True, OuterProducts(scores))

    @property
    def form(self) -> Form:
        return self._form

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def by_sample(self) -> bool:
        return self.mc_samples is None

    @property
    def settings(self) -> dict[str, Any]:
        if self.mc_samples is None:
            return super().settings
        return {**super().settings, "mc_samples": self.mc_samples, "draw_seed": self.objective.seed}

    @property
    def notes(self) -> tuple[str, ...]:
        drawn = () if self.mc_samples is None else (f"labels drawn {self.mc_samples} times from the model, seed {self.objective.seed}",)
        return (*super().notes, *drawn)

    def divisor(self, counts: float) -> float:
        """Counts weigh draws; examples' own gradients carry L = (1/N) sum l_i, so that sums of squares of their shares take counts^2 / N."""
        count = super().divisor(counts)
        return count if self.mc_samples is not None or self.objective.reduction == "sum" else count * count / self.objective.batches.count

    def interval(self, v: torch.Tensor, *, confidence: float = 0.95) -> Estimate:
        """v'Fv for v (n,), with the interval that holds its limit v'Gv at this confidence: mean and standard error of the independent draws.

        Student's t with mc_samples - 1 degrees of freedom. v must not depend on the draws: for an eigenvector of F itself, whose
        direction the draws have chosen, v'Fv is too large.
        Cost: one pass over the data, about 5U, by autograd. Raises InputError for fewer than 4 draws, ShapeError, DtypeError, DeviceError.
        """
        if self.mc_samples is None or self.mc_samples < FEWEST:
            raise InputError(f"interval: the spread of draws needs kind='mc' and mc_samples >= {FEWEST}. Build Fisher(..., mc_samples=8).")
        if not 0.0 < confidence < 1.0:
            raise InputError(f"interval: confidence is {confidence}, expected a number between 0 and 1, such as 0.95.")
        self._check(v, "v")
        if v.shape != (self.n,):
            raise ShapeError(f"interval: v has shape {tuple(v.shape)}, expected ({self.n},).")
        self.check_unchanged()
        draws = self._draws(v)
        value, stderr = float(draws.mean()), float(draws.std()) / self.mc_samples**0.5
        half = quantiles.student(0.5 + confidence / 2, self.mc_samples - 1) * stderr
        return Estimate(
            value,
            stderr,
            (value - half, value + half),
            confidence,
            self.mc_samples,
            1,
            True,
            notes=self.notes,
            settings=self.settings,
            provenance=self.provenance,
        )

    def _draws(self, v: torch.Tensor) -> torch.Tensor:
        """v'F_s v of each draw s, (mc_samples,) in float64."""
        objective, form = self.objective, self._form
        total, counts = torch.zeros(self.mc_samples or 0, dtype=torch.float64, device=self.device), 0.0
        with torch.inference_mode(False), objective.quiet():
            for index, batch in objective.batches:
                value = objective.evaluate(index, batch)
                output = network_output(value, form.kind)
                scores = form.constants(value, batch, objective.loss, objective.draw_seed(index))
                pushed = GaussNewtonGraph(value.loss, output, objective.selection.params).pushed(self.layout.views(v.clone()))
                total += value.scale * scores.quadratics(pushed).double()
                counts += value.count or 0.0
        return total / self.divisor(counts)
