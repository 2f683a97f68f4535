"""Measures of the function next to those of the weights: what sharpness is to be compared with.

All are means over samples with a standard error, exact for the data at hand (but for `loss_trace`, which has probes).
"""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.api.samples_of import SampleSource
from fastsharp.errors import ArgumentTypeError, InputError, ShapeError
from fastsharp.measures.classes import needs_cross_entropy
from fastsharp.measures.coherence import Along, Coherence
from fastsharp.measures.inputs import OF, BoundaryTightness, InputJacobian
from fastsharp.measures.outputs import Confidence, LogitScale, Margin
from fastsharp.measures.sample_curvature import LossTrace, SampleCurvature
from fastsharp.measures.statistic import SampleEstimate
from fastsharp.params import Selector
from fastsharp.results import Eigenpairs

_LABELS = "It is defined by class labels: pass F.cross_entropy, or no loss at all."


def margin(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """mean_i m_i, m_i = f_i[y_i] - max over c != y_i of f_i[c]: the margin of the logits f_i, negative where a sample is misclassified.

    Larger = further from the boundary, unlike the measures of sharpness. Arguments as in `fastsharp.lanczos`; `confidence` is of the interval.
    Returns SampleEstimate with `per_sample` m_i (samples,); one forward pass. Survives a rescaling of layers that leaves the function as it
    is; a temperature T divides it by T. Raises InputError (no cross-entropy), LabelShapeError (one-hot labels), errors of data and model.
    """
    source = SampleSource(
        "margin", model, loader, loss_fn, params=None, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    needs_cross_entropy(source.objective.loss, source.what, _LABELS)
    measure = Margin(confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes)


def prediction_confidence(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """mean_i max_c p_i[c], p_i = softmax(f_i): how sure the classifier is of its answers, right or wrong, in [1/C, 1].

    Arguments as in `fastsharp.lanczos`; `confidence` is of the interval.
    Returns SampleEstimate with `per_sample` (samples,); one forward pass. Survives a rescaling of layers that leaves the function as it is; a
    temperature moves it, and with it the Fisher-Rao norm and relative flatness. Raises as `fastsharp.margin`.
    """
    source = SampleSource(
        "prediction_confidence", model, loader, loss_fn, params=None, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    needs_cross_entropy(source.objective.loss, source.what, _LABELS)
    measure = Confidence(confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes)


def logit_scale(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """mean_i ||f_i - mean_c f_i[c]||: the length of the logits without the part that the softmax does not see.

    Arguments as in `fastsharp.lanczos`; `confidence` is of the interval.
    Returns SampleEstimate with `per_sample` (samples,); one forward pass. Survives a rescaling of layers that leaves the function as it is; a
    temperature T divides it by T. Raises as `fastsharp.margin`. Source: the normalisation of logits in Andriushchenko et al. 2302.07011.
    """
    source = SampleSource(
        "logit_scale", model, loader, loss_fn, params=None, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    needs_cross_entropy(source.objective.loss, source.what, _LABELS)
    measure = LogitScale(confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes)


def boundary_tightness(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """1 / mean_i |d_i|, d_i = m_i / ||d m_i / d x_i||: how close the decision boundary is to the data, to first order in the inputs.

    Arguments as in `fastsharp.lanczos`; `confidence` is of the interval.
    Returns SampleEstimate with `per_sample` the signed distances d_i (samples,), in units of the inputs; larger value = tighter. One forward and one
    reverse pass. A sample whose margin does not move with its input has no distance: it is left out, which a note says.
    Survives rescalings of layers that leave the function as it is, and a temperature. Raises as `fastsharp.margin`, and InputError where no
    input is floating-point. Source: Elsayed et al. 2018, "Large margin deep networks for classification".
    """
    source = SampleSource(
        "boundary_tightness", model, loader, loss_fn, params=None, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    needs_cross_entropy(source.objective.loss, source.what, _LABELS)
    measure = BoundaryTightness(confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes)


def input_jacobian(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    of: str = "logits",
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """mean_i ||d f_i / d x_i||_F: the Frobenius norm of the Jacobian of a sample's outputs in its inputs.

    of   "logits": the outputs themselves, any loss; "probabilities": their softmax over the classes
    Arguments as in `fastsharp.lanczos`; `confidence` is of the interval.

    Returns SampleEstimate with `per_sample` (samples,). Cost: one forward pass and one reverse pass a column of the output, for all samples at
    once. Survives a rescaling of layers that leaves the function as it is; a temperature moves it.
    Raises InputError (`of`, no floating-point input), ShapeError (no row an example), DisconnectedLossError, errors of data and model.
    Source: Novak et al. 2018, "Sensitivity and generalization in neural networks".
    """
    if of not in OF:
        raise InputError(f"input_jacobian: of={of!r} is none of {', '.join(map(repr, OF))}.")
    source = SampleSource(
        "input_jacobian", model, loader, loss_fn, params=None, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    measure = InputJacobian(of, confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes, of=of)


def sample_curvature(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    direction: torch.Tensor | Eigenpairs,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """mean_i u'H_i u = u'Hu, H_i the Hessian of the loss of sample i: the curvature that single samples see in one direction.

    direction   u: flat (n,) vector over the chosen parameters, in their dtype and order; or Eigenpairs, whose first vector is taken. It is
                normalised to length 1
    params      which parameters; arguments as in `fastsharp.lanczos`; `confidence` is of the interval.

    Returns SampleEstimate with `per_sample` u'H_i u (samples,). Cost: one forward and three reverse passes for all samples at once.
    Does not survive a rescaling of layers. Raises ShapeError, InputError (zero direction; a loss that is no sum over samples), errors of data
    and model.
    """
    source = SampleSource(
        "sample_curvature", model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    u = _unit(direction, source)
    measure = SampleCurvature(source.objective, u, confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes)


def loss_trace(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    probes: int = 16,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> SampleEstimate:
    """mean_i tr H_i = tr H, H_i the Hessian of the loss of sample i, by random signs z: the mean over probes of z'H_i z.

    probes   how many; each costs two reverse passes through the graph of a batch, for all samples at once
    params, seed   which parameters; seed of the signs. Arguments as in `fastsharp.lanczos`; `confidence` is of the interval.

    Returns SampleEstimate with `per_sample` each sample's mean over the probes (samples,). stderr and interval hold both chances, of samples
    and of probes; a note states the second. For the trace alone to a tolerance use `fastsharp.trace`.
    Does not survive a rescaling of layers. Raises InputError (probes; a loss that is no sum over samples), errors of data and model.
    """
    if isinstance(probes, bool) or not isinstance(probes, int):
        raise ArgumentTypeError(f"loss_trace: probes is a {type(probes).__name__}, expected an int.")
    if probes < 2:
        raise InputError(f"loss_trace: probes is {probes}, expected 2 or more, since one says nothing of its own error.")
    source = SampleSource(
        "loss_trace", model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress, seed=seed,
    )  # fmt: skip
    measure = LossTrace(source.objective, probes, seed, confidence)
    notes = source.over([measure])
    return source.recorded(measure.result(), notes, probes=probes, seed=seed)


def coherence(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """N ||mean_i g_i||^2 / mean_i ||g_i||^2, g_i the gradient of example i: m-coherence; 0 where they cancel, 1 orthogonal, N equal.

    params   which parameters; arguments as in `fastsharp.lanczos`; `confidence` is of the interval.

    Larger = gradients agree, unlike the measures of sharpness. Returns SampleEstimate with `per_sample` ||g_i||^2 (examples,). Cost: a gradient
    an example, each evaluated by itself, and one tangent pass for the standard error.
    Does not survive a rescaling of layers. Raises InputError (all gradients zero; batch statistics or masks), errors of data and model.
    Source: Chatterjee and Zielinski 2008.01217.
    """
    source = SampleSource(
        "coherence", model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    measure = Coherence(source.objective)
    notes = source.over([measure])
    mean = source.objective.selection.layout.views(measure.mean_gradient.to(source.objective.dtype))
    along = Along(source.objective)
    notes += source.over([along], direction=mean)
    return source.recorded(measure.finished(along.values, confidence), notes)


def _unit(direction: torch.Tensor | Eigenpairs, source: SampleSource) -> torch.Tensor:
    """The direction as a unit vector over the chosen parameters."""
    u = direction.eigenvectors[0] if isinstance(direction, Eigenpairs) else direction
    if not isinstance(u, torch.Tensor):
        raise ArgumentTypeError(f"{source.what}: direction is a {type(u).__name__}, expected a flat tensor or Eigenpairs.")
    n = source.objective.selection.layout.n
    if u.shape != (n,):
        raise ShapeError(
            f"{source.what}: direction has shape {tuple(u.shape)}, expected ({n},), one number a chosen parameter. Pass the same params=."
        )
    u = u.detach().to(source.objective.device, source.objective.dtype)
    length = float(u.double().norm())
    if not 0 < length < float("inf"):
        raise InputError(f"{source.what}: direction has length {length}, so it points nowhere. Pass a vector that is finite and not zero.")
    return (u / length).contiguous()
