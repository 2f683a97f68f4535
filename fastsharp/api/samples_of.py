"""What the calls for measures of single samples share: the objective, one pass over its data, and the record of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from fastsharp.api.subject import first_steps
from fastsharp.errors import ArgumentTypeError, InputError, LabelShapeError
from fastsharp.measures.facts import Observer, one_pass
from fastsharp.measures.statistic import check_confidence
from fastsharp.objective import Objective
from fastsharp.params import Selector
from fastsharp.progress import Progress
from fastsharp.results import Estimate

AnyEstimate = TypeVar("AnyEstimate", bound=Estimate)


class SampleSource:
    """A model on frozen data, for measures of single samples; `what` names the call in messages."""

    def __init__(
        self,
        what: str,
        model: Any,
        loader: Any,
        loss_fn: Any,
        *,
        params: Selector,
        reduction: str,
        bn: str | None,
        dropout: str | None,
        memory: str | int,
        confidence: float,
        progress: bool | None,
        seed: int = 0,
    ) -> None:
        check_confidence(what, confidence)
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"{what} is a measure of networks: model is a {type(model).__name__}, expected a torch.nn.Module.")
        if loader is None:
            raise InputError(f"{what} needs data: pass a DataLoader, a Dataset, a list of batches or one batch.")
        self.what, self._progress = what, progress
        with first_steps(), label_forms(what):
            self.objective = Objective(
                model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout, memory=memory, seed=seed
            )

    def over(
        self, observers: Sequence[Observer], *, direction: Sequence[torch.Tensor] | None = None, first_only: bool = False
    ) -> tuple[str, ...]:
        """One pass that feeds the observers; -> its notes."""
        shown = Progress(self._progress, self.what.capitalize().replace("_", " "), "samples")
        with first_steps(), shown, torch.inference_mode(False):
            return one_pass(
                self.objective,
                observers,
                what=self.what,
                direction=direction,
                first_only=first_only,
                on_batch=lambda done, count: shown.on_step(done, (done,), count),
            )

    def recorded(self, result: AnyEstimate, notes: Sequence[str], **settings: Any) -> AnyEstimate:
        """The result with the notes of the objective and the pass, its settings and where it comes from."""
        said = [note for note in self.objective.notes() if not note.startswith("reduction 'sum'")]
        return replace(
            result,
            notes=(*result.notes, *said, *notes),
            settings={**result.settings, "measure": self.what, "confidence": result.confidence, **settings},
            provenance=self.objective.provenance(),
        )


class label_forms:
    """torch's complaint about the form of class labels in this package's words."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        text = str(error)
        if isinstance(error, (RuntimeError, ValueError)) and ("class probabilities" in text or "multi-target not supported" in text):
            raise LabelShapeError(
                f"{self._what}: integer labels have several columns, as one-hot ones do. Pass class indices, such as target.argmax(1)."
            ) from error
