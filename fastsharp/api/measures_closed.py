"""`fastsharp.fisher_rao` and `fastsharp.relative_flatness`: two measures of the literature with closed forms, and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastsharp.api.samples_of import SampleSource
from fastsharp.api.subject import checked, frozen
from fastsharp.curvature import Hessian
from fastsharp.errors import InputError
from fastsharp.losses import cross_entropy_of
from fastsharp.measures.classes import needs_cross_entropy
from fastsharp.measures.fisher_rao import (
    CONVENTIONS,
    FORMS,
    FisherRaoClosed,
    FisherRaoIdentity,
    inhomogeneous,
    petzka_factor,
    weight_layers,
)
from fastsharp.measures.head import Head, HeadFinder
from fastsharp.measures.relative_flatness import KINDS, HeadFlatness
from fastsharp.measures.relative_products import InputMoments, largest_by_products, layer_of, trace_by_products
from fastsharp.measures.statistic import SampleEstimate
from fastsharp.params import Selector
from fastsharp.results import Estimate

METHODS = ("auto", "closed", "products")


def fisher_rao(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    form: str = "identity",
    convention: str | None = None,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    progress: bool | None = None,
) -> SampleEstimate:
    """||theta||_fr = sqrt(mean_i <grad l_i, theta>^2), l_i the loss of sample i: the Fisher-Rao norm.

    model, loader, loss_fn, params, reduction, bn, dropout, memory   as in `fastsharp.lanczos`
    form         "identity": any network and any loss(output, target); one tangent pass, about two forward passes, no per-sample gradients.
                 "closed": L sqrt(mean_i (<p_i, f_i> - f_i[y_i])^2) from the logits f_i alone, p_i = softmax(f_i), L the number of weight
                 layers (Linear, convolutions); cross-entropy only. The two are equal for networks without biases and normalisation whose
                 activations are positively homogeneous and whose layers form a chain; elsewhere a note names what differs
    convention   None, or "petzka": with form="closed" the factor of the published code, Linear, Conv and Embedding modules plus one
    confidence   of the interval: for the population that the samples are drawn from. The value is exact for these samples
    progress     True, False, or None: shown where the error stream is a terminal

    Returns SampleEstimate: an Estimate with `per_sample` (samples,), <grad l_i, theta> or its closed form. Samples are examples, or labels
    that count (tokens); class weights weigh them. theta is the chosen parameters.
    Invariance: layer rescalings t, 1/t of homogeneous networks leave it as it is. A change of the scale of the logits moves it.
    Raises InputError (no data, a batch_loss, a loss that is not the cross-entropy for form="closed", a loss that is not a sum over samples),
    LabelShapeError (one-hot labels), other FastsharpErrors of the data and the model.
    Source: Liang et al. 2019, "Fisher-Rao metric, geometry, and complexity of neural networks".
    """
    _choice("fisher_rao", "form", form, FORMS)
    _choice("fisher_rao", "convention", convention, CONVENTIONS)
    if convention is not None and form != "closed":
        raise InputError(f"fisher_rao: convention={convention!r} is a factor of the closed form. Pass form='closed' with it.")
    source = SampleSource(
        "fisher_rao", model, loader, loss_fn, params=params, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress,
    )  # fmt: skip
    if form == "identity":
        identity = FisherRaoIdentity(source.objective, confidence)
        notes = source.over([identity])
        return source.recorded(identity.result(), notes, form=form, convention=convention)
    needs_cross_entropy(source.objective.loss, "fisher_rao: form='closed'", "Use form='identity', which takes any loss.")
    factor = petzka_factor(model) if convention == "petzka" else weight_layers(model)
    closed = FisherRaoClosed(factor, confidence)
    notes = source.over([closed])
    reasons = inhomogeneous(model)
    if reasons:
        notes = (*notes, f"the closed form is not the norm itself here, since the network has {'; '.join(reasons)}. form='identity' is")
    return source.recorded(closed.result(), notes, form=form, convention=convention, factor=factor)


def relative_flatness(
    model: Any,
    loader: Any,
    loss_fn: Any = None,
    *,
    layer: str | None = None,
    normalize: bool = True,
    kind: str = "trace",
    method: str = "auto",
    rtol: float = 0.01,
    max_products: int = 2000,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    memory: str | int = "auto",
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    preflight: str = "fast",
) -> Estimate:
    """kappa = sum_st <w_s, w_t> tr H_st over neurons s, t of one layer: relative flatness, w_s a neuron's weights, H_st its Hessian blocks.

    model, loader, loss_fn, reduction, bn, dropout, memory, preflight   as in `fastsharp.lanczos`
    layer        name of a Linear or convolution; None: the linear layer that makes the logits. Its bias is left out
    normalize    features are divided by their standard deviation (ddof 0) over the samples and the weights multiplied, algebraically
    kind         "trace", or "max": sum_s ||w_s||^2 lambda_max(H_ss)
    method       "closed": for the layer that makes the logits of a cross-entropy, kappa = mean_i ||phi_i||^2 (sum_c G_cc p_ic - p_i'G p_i) with
                 G = W W'; one forward pass, any number of classes. "products": Hessian products, any layer and loss.
                 "auto": closed where it applies, or where layer is None
    rtol, max_products, seed   of the probes, for kind="trace" by products; see `fastsharp.trace`
    confidence   of the interval. Closed trace: for the population that the samples are drawn from. Products: of the probes

    Returns a SampleEstimate for the closed trace (`per_sample` holds the summands), an Estimate otherwise. A mean over samples.
    Cost: a forward pass, u C m + u m numbers; by products as many as `fastsharp.trace` needs, or one Lanczos run a neuron for "max".
    Invariance: survives a rescaling between layers that the network's function does not see, and with normalize=True one by feature.
    Temperature and confidence move it.
    Raises InputError (no head, several heads, a layer that is called several times, no cross-entropy for the closed form), LabelShapeError.
    Source: Petzka et al. 2021, "Relative flatness and generalization".
    """
    for name, value, choices in (("kind", kind, KINDS), ("method", method, METHODS)):
        _choice("relative_flatness", name, value, choices)
    source = SampleSource(
        "relative_flatness", model, loader, loss_fn, params=None, reduction=reduction, bn=bn, dropout=dropout,
        memory=memory, confidence=confidence, progress=progress, seed=seed,
    )  # fmt: skip
    settings = {"normalize": normalize, "kind": kind}
    head = _head(source, layer, method)
    if head is not None:
        flatness = HeadFlatness(head, kind=kind, normalize=normalize, confidence=confidence, room=source.objective.graph_budget)
        notes = source.over([flatness])
        names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n != f"{head.name}.weight"}
        own = names.get(id(model.get_submodule(head.name).weight))
        if own is not None:
            notes = (*notes, f"{head.name}.weight is tied with {own}: curvature through the head alone")
        return source.recorded(flatness.result(), notes, layer=head.name, method="closed", **settings)
    assert layer is not None
    return _by_products(
        source, model, loader, loss_fn, layer, normalize, kind, settings,
        {"rtol": rtol, "max_products": max_products, "confidence": confidence}, seed, preflight,
        {"reduction": reduction, "bn": bn, "dropout": dropout, "memory": memory, "seed": seed},
    )  # fmt: skip


def _head(source: SampleSource, layer: str | None, method: str) -> Head | None:
    """The head where the closed form is to be taken, None where products are."""
    objective = source.objective
    if layer is not None:
        layer_of(objective.model, layer)
    if method == "products":
        if layer is None:
            raise InputError("relative_flatness: method='products' needs the name of a layer. Pass layer='...'.")
        return None
    if layer is not None and method == "auto" and cross_entropy_of(objective.loss.loss_fn) is None:
        return None
    needs_cross_entropy(
        objective.loss,
        "relative_flatness: the closed form",
        "Name a layer: layer='...', method='products' takes any loss, a regression's too.",
    )
    finder = HeadFinder(objective.model)
    source.over([finder], first_only=True)
    if layer is None:
        return finder.head("relative_flatness")
    if layer in finder.found:
        return finder.named(layer)
    if method == "closed":
        raise InputError(
            f"relative_flatness: the output of {layer!r} is not the logits, so there is no closed form. Use method='products'."
        )
    return None


def _by_products(
    source: SampleSource,
    model: Any,
    loader: Any,
    loss_fn: Any,
    name: str,
    normalize: bool,
    kind: str,
    settings: dict[str, Any],
    of_probes: dict[str, Any],
    seed: int,
    preflight: str,
    of_hessian: dict[str, Any],
) -> Estimate:
    layer = layer_of(model, name)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if not weight.requires_grad:
        raise InputError(f"relative_flatness: the weight of {name!r} is frozen. Unfreeze it with requires_grad_(True).")
    sigma = None
    notes: tuple[str, ...] = ()
    if normalize:
        moments = InputMoments(layer, name)
        notes = source.over([moments])
        sigma = moments.sigma()
    objective = source.objective
    if objective.reduction == "sum":
        raise InputError("relative_flatness is a mean over samples, and the loss is their sum. Pass a loss with reduction='mean'.")
    data = frozen(objective, loader)
    hessian = Hessian(model, data, loss_fn, params=lambda _, p: p is weight, **of_hessian)
    checked(hessian, preflight=preflight, seed=seed)
    with torch.inference_mode(False), torch.no_grad():
        if kind == "max":
            result = largest_by_products(hessian, weight, sigma, seed=seed)
        else:
            result = trace_by_products(hessian, weight, sigma, seed=seed, **of_probes)
    settings = {**hessian.settings, "layer": name, "method": "products", **settings}
    return replace(result, notes=(*result.notes, *notes), settings={**result.settings, **settings}, provenance=hessian.provenance)


def _choice(what: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise InputError(f"{what}: {name}={value!r} is none of {', '.join(map(repr, choices))}.")
