"""The Fisher-Rao norm ||theta||_fr, by its identity for any network and loss, and by its closed form for homogeneous classifiers.

Let l_i be the loss of sample i. The identity is sqrt(mean_i <grad l_i, theta>^2). Where scaling all weights by t scales the outputs by t^L
(no biases, no normalisation, activations with a(tx) = t a(x), L weight layers in a chain), <grad l_i, theta> = L <dl_i/df_i, f_i>, which is
L (<p_i, f_i> - f_i[y_i]) for the cross-entropy of logits f_i with p_i = softmax(f_i). Elsewhere the two differ.

Source: Liang, Poggio, Rakhlin, Stokes, "Fisher-Rao metric, geometry, and complexity of neural networks" (AISTATS 2019), theorem 3.1; their
L counts hidden layers, so their L + 1 is the number of weight layers. The reference code of Petzka et al. 2021 adds one once more.
"""

from __future__ import annotations

import torch
from torch import nn

from fastsharp.errors import ShapeError
from fastsharp.losses import cross_entropy_of
from fastsharp.measures.facts import BatchFacts, Need, must_agree
from fastsharp.measures.statistic import SampleEstimate, Samples
from fastsharp.objective import Objective

FORMS = ("identity", "closed")
CONVENTIONS = (None, "petzka")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHTED = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FisherRaoIdentity:
    """sqrt(mean_i <grad l_i, theta>^2): one tangent pass, whatever the network; theta the chosen parameters."""

    layers: frozenset[str] = frozenset()

    def __init__(self, objective: Objective, confidence: float) -> None:
        self.needs = needs_of_slopes(objective)
        self._confidence = confidence
        self._samples = Samples()

    def update(self, facts: BatchFacts) -> None:
        self._samples.add(*slopes(facts))

    def result(self) -> SampleEstimate:
        return self._samples.root_mean_square(self._confidence)


def needs_of_slopes(objective: Objective) -> Need:
    """How a pass has to evaluate batches for `slopes`."""
    return Need.TANGENT if cross_entropy_of(objective.loss.loss_fn) is not None else Need.TANGENT | Need.SLOPE


def slopes(facts: BatchFacts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(<grad l_i, u>, weights, owners) of every sample along the direction u of the pass; their sum is compared with the batch's."""
    tangent, options, scale = facts.tangent, facts.cross_entropy, facts.value.scale
    assert tangent is not None, "the pass has no tangents: ask for needs_of_slopes"
    if options is not None:
        values = facts.units.slopes(facts.unit_rows(tangent.output), options.label_smoothing)
        weights, owners = facts.units.weights, facts.owners
    else:
        assert tangent.slope is not None
        if facts.output.shape[:1] != (facts.count,):
            raise ShapeError(
                f"{facts.what}: the output has shape {tuple(facts.output.shape)}, the batch {facts.count} examples. Return one row an example."
            )
        values = scale * (tangent.slope * tangent.output).reshape(facts.count, -1).sum(1)
        weights, owners = torch.ones_like(values), facts.example_owners()
    must_agree(facts.what, values * weights, scale * tangent.loss, scale * tangent.output)
    return values, weights, owners


class FisherRaoClosed:
    """factor sqrt(mean_i (<p_i, f_i> - f_i[y_i])^2), a function of the logits alone."""

    layers: frozenset[str] = frozenset()
    needs = Need.NOTHING

    def __init__(self, factor: float, confidence: float) -> None:
        self._factor, self._confidence = factor, confidence
        self._samples = Samples()

    def update(self, facts: BatchFacts) -> None:
        units = facts.units
        self._samples.add(units.slopes(units.logits), units.weights, facts.owners)

    def result(self) -> SampleEstimate:
        return self._samples.root_mean_square(self._confidence, self._factor)


def weight_layers(model: nn.Module) -> int:
    """Modules that multiply by a weight matrix or filter; embeddings are inputs, not layers."""
    return sum(isinstance(m, _WEIGHTED) or _transposed_linear(m) for m in model.modules())


def petzka_factor(model: nn.Module) -> int:
    """The factor of Petzka's code and its heirs: Linear, Conv1d-3d and Embedding modules, plus one."""
    return 1 + sum(isinstance(m, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) for m in model.modules())


def _transposed_linear(m: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer by another name."""
    weight = getattr(m, "weight", None)
    return type(m).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2


def inhomogeneous(model: nn.Module) -> list[str]:
    """Why scaling all weights by t does not scale the outputs by t^L, as far as the modules say so."""
    reasons = []
    biases = [name for name, p in model.named_parameters() if name.rsplit(".", 1)[-1].startswith("bias")]
    if biases:
        reasons.append(f"biases ({len(biases)}, such as {biases[0]!r})")
    norms = [name for name, m in model.named_modules() if "Norm" in type(m).__name__]
    if norms:
        reasons.append(f"normalisation ({len(norms)}, such as {norms[0]!r})")
    smooth = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Softmax, nn.MultiheadAttention, nn.RNNBase)
    curved = [name for name, m in model.named_modules() if isinstance(m, smooth)]
    if curved:
        reasons.append(f"activations that are not positively homogeneous ({len(curved)}, such as {curved[0]!r})")
    return reasons
