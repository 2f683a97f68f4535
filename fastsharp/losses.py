"""From a batch to (value, weight): which loss is meant, how the model is called, and how many examples the value stands for.

With value_b and weight_b of each batch, L = sum_b weight_b value_b / sum_b weight_b for a mean loss, exact for uneven
batches, `ignore_index` and class weights, and L = sum_b value_b for a sum loss.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.batches import count_of, head
from fastsharp.errors import (
    ArgumentTypeError,
    BatchFormatError,
    InputError,
    LabelError,
    LabelShapeError,
    LossShapeError,
    OutputFormatError,
    ReductionUnknownError,
)

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
REDUCTIONS = ("auto", "mean", "sum")
_CLASSIFICATION = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASSIFICATION_FN = (F.cross_entropy, F.nll_loss)


@dataclass(frozen=True)
class BatchLoss:
    """A loss of the whole batch, called `fn(model, batch)`; made by `batch_loss`."""

    fn: Callable[[nn.Module, Any], Any]


def batch_loss(fn: Callable[[nn.Module, Any], Any]) -> BatchLoss:
    """Mark fn as a loss of the whole batch: fastsharp calls `fn(model, batch)` instead of `loss_fn(output, target)`.

    fn returns a scalar, or `(sum, count)`: then L = total sum / total count, exact whatever count means (tokens, pairs).
    """
    if not callable(fn):
        raise ArgumentTypeError(f"batch_loss: got a {type(fn).__name__}, expected a callable fn(model, batch).")
    return BatchLoss(fn)


@dataclass(frozen=True)
class Value:
    """One batch's loss: L = sum scale * loss / sum count over batches; count is None where the plain sum is meant.

    output   what the model returned; None for a `batch_loss`, which calls the model itself
    """

    loss: torch.Tensor
    scale: float
    count: float | None
    stated: bool = False  # the loss itself returned (sum, count)
    output: Any = None


class Loss:
    """The loss of a model on a batch, with its weight.

    loss_fn    `loss_fn(output, target)`, a `batch_loss(fn)`, or None: `out.loss` where the output has one, else cross-entropy
    reduction  "mean", "sum", or "auto": `.reduction`, a default of the signature, else a batch compared with its halves
    """

    def __init__(self, model: nn.Module, loss_fn: Any, reduction: str) -> None:
        if reduction not in REDUCTIONS:
            raise InputError(f"reduction={reduction!r} is none of {', '.join(map(repr, REDUCTIONS))}.")
        if loss_fn is not None and not callable(loss_fn) and not isinstance(loss_fn, BatchLoss):
            raise ArgumentTypeError(
                f"loss_fn is a {type(loss_fn).__name__}, expected loss_fn(output, target), fastsharp.batch_loss(fn) or None."
            )
        self.model = model
        self.loss_fn = loss_fn
        self.reduction = _declared(loss_fn) if reduction == "auto" else reduction
        if self.reduction == "none":
            raise LossShapeError(f"{_name(loss_fn)} has reduction='none', so the loss is not a scalar. Use reduction='mean' or 'sum'.")
        self.additive = not isinstance(loss_fn, BatchLoss)  # a sum over examples, however they are grouped into batches
        self.notes: list[str] = []

    def __call__(self, batch: Any) -> Value:
        """The batch's loss, checked to be a scalar, and what it weighs."""
        result, weight, output = self._evaluate(batch)
        if isinstance(result, tuple) and len(result) == 2:
            total, count = result
            return Value(_scalar(total, self._label()), 1.0, float(count), stated=True, output=output)
        loss = _scalar(result, self._label())
        if self.reduction == "sum":
            return Value(loss, 1.0, None, output=output)
        weight = float(count_of(batch)) if weight is None else weight
        return Value(loss, weight, weight, output=output)

    def settle_reduction(self, batch: Any, evaluate: Callable[[Any], Value]) -> None:
        """Decide "auto" by comparing the batch with its halves: a mean averages them, a sum adds them."""
        if self.reduction != "auto":
            return
        whole = evaluate(batch)
        if whole.stated:
            self.reduction = "mean"  # nothing is left to decide
            return
        n = count_of(batch)
        parts = [(part, m) for part, m in ((head(batch, 0, n // 2), n // 2), (head(batch, n // 2, n), n - n // 2)) if m]
        if len(parts) < 2 or any(part is None for part, _ in parts):
            raise ReductionUnknownError(
                f"{self._label()}: cannot tell a sum from a mean, the first batch cannot be halved. Pass reduction='mean' or 'sum'."
            )
        values = [(float(evaluate(part).loss), m) for part, m in parts]
        total = float(whole.loss)
        mean, plain = sum(v * m for v, m in values) / n, sum(v for v, _ in values)
        room = 64 * n**0.5 * torch.finfo(whole.loss.dtype).eps * max(abs(v) for v in (total, *(v for v, _ in values)))
        fits = {"mean": abs(total - mean) <= room, "sum": abs(total - plain) <= room}
        if fits["mean"] == fits["sum"]:
            raise ReductionUnknownError(
                f"{self._label()}: a batch gives {total:.6g}, its halves average to {mean:.6g} and add up to {plain:.6g},\n"
                "so the loss is neither clearly a mean nor a sum over examples. Pass reduction='mean' or 'sum', or return (sum, count)."
            )
        self.reduction = "mean" if fits["mean"] else "sum"
        self.additive = True
        self.notes.append(f"reduction {self.reduction!r} found by halving a batch")

    def _evaluate(self, batch: Any) -> tuple[Any, float | None, Any]:
        """The raw loss, the weight of a mean where it is not the number of examples, and the model's output."""
        if isinstance(self.loss_fn, BatchLoss):
            return self.loss_fn.fn(self.model, batch), None, None
        args, kwargs, target = split(batch, keep_target=self.loss_fn is None)
        output = call_model(self.model, args, kwargs)
        return (*self._of_output(output, target, batch), output)

    def _of_output(self, output: Any, target: Any, batch: Any) -> tuple[Any, float | None]:
        if self.loss_fn is None:
            own = _field(output, "loss")
            if own is not None:
                count = _token_count(self.model, target, output)
                return (own, count) if count != 0.0 else (_nothing(output), 0.0)
            if target is None or not _is_class_target(target):
                raise OutputFormatError(
                    f"no loss: the output ({_describe(output)}) has no .loss and the target ({_describe(target)}) is not a tensor of class indices.\n"
                    "Pass loss_fn(output, target), or fastsharp.batch_loss(fn)."
                )
            return self._classify(F.cross_entropy, _logits(output), target)
        if target is None:
            raise BatchFormatError(
                f"{self._label()} needs a target, but the batch ({_describe(batch)}) has none. Yield (x, y), or use fastsharp.batch_loss(fn)."
            )
        if _is_native(self.loss_fn):
            output = _logits(output)
        if _is_classification(self.loss_fn) and _is_class_target(target):
            return self._classify(self.loss_fn, output, target)
        return _applied(self.loss_fn, output, target, self._label()), None

    def _classify(self, fn: Any, output: Any, target: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Cross-entropy with labels checked before the loss sees them; the weight is what torch's mean divides by."""
        ignore, weight = _options(fn)
        valid = target != ignore
        _check_labels(output, target, valid)
        counted = valid.sum() if weight is None else weight.to(target.device)[target[valid]].sum()
        if float(counted) == 0.0:
            return _nothing(output), 0.0
        return _applied(fn, output, target, self._label()), float(counted)

    def _label(self) -> str:
        return "cross-entropy" if self.loss_fn is None else f"loss {_name(self.loss_fn)}"


@dataclass(frozen=True)
class CrossEntropy:
    """The options of a cross-entropy of logits."""

    ignore_index: int
    weight: torch.Tensor | None
    label_smoothing: float


def cross_entropy_of(loss_fn: Any) -> CrossEntropy | None:
    """The options of torch's cross-entropy, which None stands for as well; None for every other loss.

    Class weights together with label smoothing make another loss: the smoothed part weighs classes, not samples.
    """
    base = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    if base is not None and not isinstance(base, nn.CrossEntropyLoss) and base is not F.cross_entropy:
        return None
    given = loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
    smoothing = given.get("label_smoothing", getattr(base, "label_smoothing", 0.0))
    ignore, weight = _options(loss_fn)
    return None if smoothing and weight is not None else CrossEntropy(ignore, weight, float(smoothing))


def split(batch: Any, *, keep_target: bool = False) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A batch as (positional inputs, keyword inputs, target); `keep_target` leaves a mapping's labels among its inputs."""
    if isinstance(batch, Mapping):
        key = next((k for k in TARGET_KEYS if k in batch), None)
        rest = {k: v for k, v in batch.items() if keep_target or k != key}
        if key is None and not keep_target:
            raise BatchFormatError(
                f"a dict batch with keys {', '.join(map(repr, batch))} has no target: none of {', '.join(map(repr, TARGET_KEYS))}.\n"
                "Rename the key, or use fastsharp.batch_loss(fn) with fn(model, batch)."
            )
        return (), rest, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        if isinstance(x, Mapping):
            return (), dict(x), y
        return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}, y
    if isinstance(batch, torch.Tensor):
        raise BatchFormatError(
            f"a batch is one tensor of shape {tuple(batch.shape)}, without a target. Yield (x, y), or use fastsharp.batch_loss(fn)."
        )
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise BatchFormatError(
        f"a batch is a {type(batch).__name__}{size}, expected (x, y) or a dict. Use fastsharp.batch_loss(fn) with fn(model, batch)."
    )


def call_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """model(*args, **kwargs); a mapping's only tensor goes by position where forward has no argument of its name."""
    if kwargs and not args:
        accepted = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        unknown = [] if open_ended else [k for k in kwargs if k not in accepted]
        if unknown:
            inputs = [v for k, v in kwargs.items() if k not in TARGET_KEYS]
            if len(inputs) == 1:
                return model(inputs[0])
            raise BatchFormatError(
                f"{type(model).__name__}.forward takes {', '.join(accepted)}, the batch has {', '.join(map(repr, kwargs))}.\n"
                "Rename the keys, or use fastsharp.batch_loss(fn) with fn(model, batch)."
            )
    return model(*args, **kwargs)


def _applied(fn: Any, output: Any, target: Any, label: str) -> Any:
    """fn(output, target); torch's warning that shapes will be broadcast is an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size", category=UserWarning)
        try:
            return fn(output, target)
        except UserWarning as e:
            if not str(e).startswith("Using a target size"):
                raise
            raise LabelShapeError(
                f"{label}: the output has shape {_shape(output)}, the target {_shape(target)}; they would be broadcast against each other.\n"
                "Give both the same shape, e.g. target.unsqueeze(1) or output.squeeze(1)."
            ) from e


def _check_labels(output: Any, target: torch.Tensor, valid: torch.Tensor) -> None:
    if not isinstance(output, torch.Tensor) or output.ndim < 2:
        raise OutputFormatError(
            f"cross-entropy: the output is {_describe(output)}, expected a tensor (N, classes, ...). Pass loss_fn(output, target)."
        )
    labels = target[valid]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= output.shape[1]):
        bad = valid & ((target < 0) | (target >= output.shape[1]))
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise LabelError(
            f"label {int(target[where])} at position {where} of the batch is outside the output's {output.shape[1]} classes (0 to {output.shape[1] - 1}).\n"
            "Correct the labels, widen the last layer, or set ignore_index."
        )


def _nothing(output: Any) -> torch.Tensor:
    """Zero, with a path to the parameters: the value of a batch with nothing but ignored labels, where torch's mean is 0/0."""
    return _logits(output).sum() * 0.0  # type: ignore[no-any-return]


def _token_count(model: nn.Module, labels: Any, output: Any) -> float | None:
    """What a transformer's own mean divides by: labels that are not -100; a causal model predicts all but the first."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return None
    logits = _field(output, "logits")
    if isinstance(logits, torch.Tensor) and logits.ndim == labels.ndim:
        return None  # multi-label classification, not one class a token
    causal = "CausalLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel")
    counted = labels[..., 1:] if causal else labels
    return float((counted != -100).sum())


def _declared(loss_fn: Any) -> str:
    """The reduction a loss states itself: its attribute, a keyword of a partial, a default of its signature, else "auto"."""
    if loss_fn is None:
        return "mean"
    own = getattr(loss_fn, "reduction", None)
    if isinstance(own, str):
        return "mean" if own == "batchmean" else own
    if isinstance(loss_fn, functools.partial) and isinstance(loss_fn.keywords.get("reduction"), str):
        return str(loss_fn.keywords["reduction"])
    if isinstance(loss_fn, functools.partial) and isinstance(loss_fn.func, nn.Module):
        return _declared(loss_fn.func)
    if isinstance(loss_fn, (nn.Module, BatchLoss)):
        return "auto"
    try:
        parameter = inspect.signature(loss_fn).parameters.get("reduction")
    except (TypeError, ValueError):
        return "auto"
    default = parameter.default if parameter is not None else None
    return default if default in ("mean", "sum", "none") else "auto"


def _options(fn: Any) -> tuple[int, torch.Tensor | None]:
    """(ignore_index, class weights) of a cross-entropy."""
    if isinstance(fn, functools.partial) and not isinstance(fn.func, nn.Module):
        return int(fn.keywords.get("ignore_index", -100)), fn.keywords.get("weight")
    fn = fn.func if isinstance(fn, functools.partial) else fn
    return int(getattr(fn, "ignore_index", -100)), getattr(fn, "weight", None)


def _is_classification(fn: Any) -> bool:
    base = fn.func if isinstance(fn, functools.partial) else fn
    return isinstance(base, _CLASSIFICATION) or base in _CLASSIFICATION_FN


def _is_native(fn: Any) -> bool:
    base = fn.func if isinstance(fn, functools.partial) else fn
    return type(base).__module__.startswith("torch.nn.") or getattr(base, "__module__", None) == F.__name__


def _is_class_target(target: Any) -> bool:
    return isinstance(target, torch.Tensor) and not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool


def _logits(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    logits = _field(output, "logits")
    if logits is None:
        raise OutputFormatError(
            f"the model's output is {_describe(output)}, expected a tensor or something with .logits. Use fastsharp.batch_loss(fn)."
        )
    return logits


def _field(output: Any, name: str) -> Any:
    return (
        output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) if not isinstance(output, torch.Tensor) else None
    )


def _scalar(loss: Any, label: str) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        raise LossShapeError(f"{label} returned a {type(loss).__name__}, expected a scalar tensor.")
    if loss.numel() != 1:
        raise LossShapeError(
            f"{label} has shape {tuple(loss.shape)}, expected a scalar. Reduce it with .mean() or .sum(), or set its reduction."
        )
    return loss.reshape(())


def _name(fn: Any) -> str:
    if isinstance(fn, BatchLoss):
        return f"batch_loss({_name(fn.fn)})"
    if isinstance(fn, functools.partial):
        return _name(fn.func)
    return getattr(fn, "__name__", type(fn).__name__)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(repr, value))}"
    return type(value).__name__


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
