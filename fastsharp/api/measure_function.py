"""The function side of `measure`: the measures of single samples that share one pass over the data."""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.api.measure_job import Job
from fastsharp.batches import tensors_of
from fastsharp.errors import InputError
from fastsharp.losses import BatchLoss, split
from fastsharp.measures.classes import needs_cross_entropy
from fastsharp.measures.facts import Accumulator, one_pass
from fastsharp.measures.fisher_rao import FisherRaoClosed, FisherRaoIdentity, weight_layers
from fastsharp.measures.guarded import Guarded
from fastsharp.measures.head import HeadFinder
from fastsharp.measures.inputs import BoundaryTightness, InputJacobian
from fastsharp.measures.outputs import Confidence, LogitScale, Margin
from fastsharp.measures.relative_flatness import HeadFlatness
from fastsharp.measures.sample_curvature import SampleCurvature
from fastsharp.objective import Objective

_JACOBIAN_COLUMNS = 32  # reverse passes that the input Jacobian may take


def function_side(job: Job, objective: Objective, u: torch.Tensor, confidence: float) -> None:
    """The measures of the outputs, the inputs and single samples; u (n,) is the top eigenvector."""
    finder = HeadFinder(objective.model)
    columns = 0
    with job.may_skip("relative_flatness"):
        one_pass(objective, [finder], what="measure", first_only=True)
        columns = finder.classes[-1] if len(finder.classes) == 2 else 0

    def classifier(make: Any) -> Any:
        def checked_first() -> Accumulator:
            needs_cross_entropy(objective.loss, "the measure", "It has no value for other losses.")
            made: Accumulator = make()
            return made

        return checked_first

    def jacobian() -> Accumulator:
        if not 0 < columns <= _JACOBIAN_COLUMNS:
            raise InputError(
                f"the output has {columns or 'several dimensions of'} columns, one reverse pass each, and measure() takes at most {_JACOBIAN_COLUMNS}. "
                "Call fastsharp.input_jacobian."
            )
        return InputJacobian("logits", confidence)

    def flatness() -> Accumulator:
        return HeadFlatness(
            finder.head("relative_flatness"), kind="trace", normalize=True, confidence=confidence, room=objective.graph_budget
        )

    shared = [
        Guarded("fisher_rao", lambda: FisherRaoIdentity(objective, confidence)),
        Guarded("fisher_rao_closed", classifier(lambda: FisherRaoClosed(weight_layers(objective.model), confidence))),
        Guarded("relative_flatness", classifier(flatness)),
        Guarded("margin", classifier(lambda: Margin(confidence))),
        Guarded("prediction_confidence", classifier(lambda: Confidence(confidence))),
        Guarded("logit_scale", classifier(lambda: LogitScale(confidence))),
        Guarded("boundary_tightness", classifier(lambda: BoundaryTightness(confidence))),
        Guarded("input_jacobian", jacobian),
        Guarded("top_curvature", lambda: SampleCurvature(objective, u, confidence)),
    ]
    if not _floating_inputs(objective):  # it would stop the pass that all of them share
        for guarded in shared:
            if guarded.name in ("boundary_tightness", "input_jacobian"):
                guarded.refuse("it differentiates by the inputs, and none is floating-point")
    with job.may_skip(*(guarded.name for guarded in shared)):  # an output that no measure can read
        job.notes += one_pass(objective, shared, what="measure", on_batch=lambda done, count: job.shown.on_step(done, (done,), count))
    for guarded in shared:
        if guarded.name in job.skipped:
            continue
        found = guarded.result()
        if found is not None:
            job.add("function", {guarded.name: found})
        else:
            job.skip(guarded.reason, guarded.name)


def _floating_inputs(objective: Objective) -> bool:
    """Whether the model takes a floating-point tensor; a loss of the whole batch does not show what it takes."""
    if isinstance(objective.loss.loss_fn, BatchLoss):
        return False
    args, kwargs, _ = split(objective.batches.first())
    return any(t.is_floating_point() for t in tensors_of([args, kwargs]))
