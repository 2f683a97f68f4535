"""Relative flatness of any layer from products with the Hessian of its weight.

For the weight W (d, m) of a linear layer, or the filters (d, c, ...) of a convolution as rows of m = c * ... numbers,

    kappa_tr  = sum_st <w_s, w_t> tr H_st = tr A,   A = B' H B,   B: (r, m) -> (d, m), Z -> U S Z diag(1 / sigma)
    kappa_max = sum_s ||w_s||^2 lambda_max(H_ss)

with U S V' the singular value decomposition of W diag(sigma): (U S)(U S)' holds the products <w_s, w_t>. tr A is known by the probes of
`krylov.trace`, or from all r m unit vectors where that is cheaper; lambda_max of each neuron's block by Lanczos.
Normalisation as in `relative_flatness`; of a convolution, sigma is taken by input channel over samples and positions.

Source: Petzka et al. 2021, definition 3, and the neuron-wise maximum of their code.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fastsharp.errors import InputError, NotConvergedWarning
from fastsharp.krylov.lanczos import lanczos
from fastsharp.krylov.trace import trace
from fastsharp.measures.facts import BatchFacts, Need
from fastsharp.measures.head import single
from fastsharp.measures.statistic import Moments
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Estimate

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOL = 1e-6


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The linear layer or convolution called `name`; InputError where it is none, or its weight is frozen."""
    modules = dict(model.named_modules())
    if name not in modules:
        fitting = [n for n, m in modules.items() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))]
        raise InputError(
            f"relative_flatness: there is no layer {name!r}. The model's layers with neurons are {', '.join(fitting) or 'none'}."
        )
    layer = modules[name]
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        raise InputError(f"relative_flatness: the layer {name!r} is a {type(layer).__name__}, expected a Linear or a convolution.")
    return layer


class InputMoments:
    """sigma (m,) of a layer's inputs: by feature of a linear layer, by channel of a convolution, over all samples and positions."""

    needs = Need.NOTHING

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._convolution = isinstance(layer, _CONVOLUTIONS)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        self._dims = weight.ndim - 1  # of one input, channels first, where it is a convolution
        self._name = name
        self.layers = frozenset({name})
        self._moments = Moments()

    def update(self, facts: BatchFacts) -> None:
        x = single(facts.calls.get(self._name, ()), self._name, facts.what).input
        self._moments.add((x.movedim(-self._dims, -1) if self._convolution else x).flatten(0, -2))

    def sigma(self) -> torch.Tensor:
        """(features,) float64; 1 where a feature is constant."""
        return self._moments.deviations()


class Relative(SymmetricOperator):
    """A = B' H B on R^(r m) for the Hessian H of a layer's weight."""

    def __init__(self, hessian: SymmetricOperator, weight: torch.Tensor, sigma: torch.Tensor | None) -> None:
        W, self._scale = rescaled(weight, sigma)
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        kept = S.max() * max(W.shape) * torch.finfo(torch.float64).eps < S
        self._left = (U * S)[:, kept].to(hessian.dtype)  # (d, r)
        self._hessian, self._shape = hessian, (int(kept.sum()), W.shape[1])
        super().__init__(max(1, self._shape[0]) * W.shape[1], hessian.dtype, hessian.device)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._hessian.notes

    def check_unchanged(self) -> None:
        self._hessian.check_unchanged()

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        b = V.shape[0]
        if self._shape[0] == 0:  # all weights are zero
            out.zero_()
            return
        Z = self._left @ V.view(b, *self._shape)
        Y = self._hessian.apply((Z * self._scale).reshape(b, -1)).view(b, self._left.shape[0], self._shape[1])
        out.copy_((self._left.T @ (Y * self._scale)).reshape(b, -1))


class Neuron(SymmetricOperator):
    """diag(1/sigma) H_ss diag(1/sigma) for one neuron s: products with H of vectors that are zero outside of its row."""

    def __init__(self, hessian: SymmetricOperator, scale: torch.Tensor, s: int) -> None:
        super().__init__(scale.numel(), hessian.dtype, hessian.device)
        self._hessian, self._scale, self._at = hessian, scale, slice(s * scale.numel(), (s + 1) * scale.numel())

    def check_unchanged(self) -> None:
        self._hessian.check_unchanged()

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        full = V.new_zeros(V.shape[0], self._hessian.n)
        full[:, self._at] = V * self._scale
        out.copy_(self._hessian.apply(full)[:, self._at] * self._scale)


def rescaled(weight: torch.Tensor, sigma: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(W diag(sigma) (d, m) float64, 1 / sigma (m,) in the weight's dtype); a convolution's sigma by channel is repeated over its window."""
    W = weight.detach().double().flatten(1)
    if sigma is None:
        return W, weight.new_ones(W.shape[1]).detach()
    sigma = sigma.repeat_interleave(W.shape[1] // sigma.numel())
    return W * sigma, (1 / sigma).to(weight.dtype)


def trace_by_products(
    hessian: SymmetricOperator,
    weight: torch.Tensor,
    sigma: torch.Tensor | None,
    *,
    rtol: float,
    confidence: float,
    max_products: int,
    seed: int,
) -> Estimate:
    """kappa_tr; the interval is that of the probes, not of the samples."""
    A = Relative(hessian, weight, sigma)
    return trace(A, rtol=rtol, confidence=confidence, max_products=max_products, seed=seed, check="off")


def largest_by_products(hessian: SymmetricOperator, weight: torch.Tensor, sigma: torch.Tensor | None, *, seed: int) -> Estimate:
    """kappa_max; the interval bounds the error of the eigenvalues."""
    W, scale = rescaled(weight, sigma)
    total, bound, products, converged = 0.0, 0.0, 0, True
    for s in range(W.shape[0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # said once, for all neurons
            pair = lanczos(Neuron(hessian, scale, s), k=1, tol=_TOL, criterion="value", check="off", seed=seed)
        norm = float(W[s].square().sum())
        total += norm * float(pair.eigenvalues[0])
        bound += norm * float(pair.error_bounds[0])
        products += pair.n_matvec + pair.n_verify
        converged &= bool(pair.converged.all())
    return Estimate(
        value=total,
        stderr=0.0,
        interval=(total - bound, total + bound),
        confidence=1.0,
        samples=0,
        n_matvec=products,
        converged=converged,
        notes=hessian.notes if converged else (*hessian.notes, "an eigenvalue of a neuron's block missed its tolerance"),
    )
