"""Relative flatness of the last linear layer of a softmax classifier, in closed form: one forward pass, no autograd.

For W (C, m) with rows w_s, features phi_i (m,) and p_i = softmax(f_i), the Hessian of the cross-entropy in W has the m x m blocks
H_st = mean_i (p_is [s = t] - p_is p_it) phi_i phi_i', so that

    kappa_tr  = sum_st <w_s, w_t> tr H_st     = mean_i ||phi_i||^2 V_i,   V_i = sum_c p_ic ||w_c||^2 - ||sum_c p_ic w_c||^2
    kappa_max = sum_s ||w_s||^2 lambda_max(H_ss),   H_ss = mean_i p_is (1 - p_is) phi_i phi_i'

V_i is the variance of the rows of W under p_i. With normalisation phi_k -> phi_k / sigma_k and w_k -> w_k sigma_k, sigma_k the standard
deviation (ddof 0) of feature k over the samples, 1 where it is zero. The network is never rescaled.

Numerical properties: p_is (1 - p_is) and V_i are sums of non-negative terms of the size of 1 - max p, computed from the tail of the softmax
with the rows of W relative to the row of the likeliest class, so confident samples keep their digits.

Source: Petzka, Kamp, Adilova, Sminchisescu, Boley, "Relative flatness and generalization" (NeurIPS 2021), definition 3; the closed form as in
Walter et al. 2510.14231. The published code sums over batches, rescales the network and adds weight decay; this is a mean over samples.
"""

from __future__ import annotations

import torch

from fastsharp.errors import InputError
from fastsharp.krylov.lanczos import lanczos
from fastsharp.measures.facts import BatchFacts, Need
from fastsharp.measures.head import Head
from fastsharp.measures.statistic import Moments, SampleEstimate, Samples, pieces
from fastsharp.operator import SymmetricOperator

KINDS = ("trace", "max")
_TOL = 1e-7  # of lambda_max; the rounding floor of the dtype decides in float32


class HeadFlatness:
    """kappa_tr or kappa_max of a head. Memory: the features, N m numbers, and for "max" the probabilities, N C, up to `room` bytes."""

    needs = Need.NOTHING

    def __init__(self, head: Head, *, kind: str, normalize: bool, confidence: float, room: int) -> None:
        self._head, self._kind, self._normalize, self._confidence, self._room = head, kind, normalize, confidence, room
        self.layers = frozenset({head.name})
        self._samples = Samples()  # the values are V_i where features are not normalised by what only the end of the pass knows
        self._features: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        self._moments = Moments()
        self._kept = 0

    def update(self, facts: BatchFacts) -> None:
        phi, logits = self._head.features(facts), facts.units.logits.detach()
        units = facts.units
        if self._kind == "trace" and not self._normalize:
            W = self._head.weight
            self._samples.add(squared_norms(phi, None) * variances(W, logits, None), units.weights, facts.owners)
            return
        self._kept += phi.nbytes + logits.nbytes
        if self._kept > self._room:
            raise InputError(
                f"relative_flatness: the features of the samples so far take {self._kept:,} bytes, of {self._room:,} in the memory budget.\n"
                "Raise memory=, pass fewer samples, or use normalize=False with kind='trace', which keeps none."
            )
        self._moments.add(phi)
        self._features.append(phi)
        self._logits.append(logits)
        self._samples.add(units.weights, units.weights, facts.owners)

    def result(self) -> SampleEstimate:
        if not self._features:
            return self._samples.mean(self._confidence)
        self._samples.require_any()
        sigma = self._moments.deviations().to(self._head.weight) if self._normalize else None
        W = self._head.weight
        if self._kind == "max":
            return self._largest(sigma)
        norms = [squared_norms(phi, sigma) for phi in self._features]
        spread = [variances(W, logits, sigma) for logits in self._logits]
        values = torch.cat([(n * v).double().cpu() for n, v in zip(norms, spread, strict=True)])
        return self._samples.mean(self._confidence, of=values)

    def _largest(self, sigma: torch.Tensor | None) -> SampleEstimate:
        W = self._head.weight if sigma is None else self._head.weight * sigma
        phi = torch.cat(self._features)
        phi = phi if sigma is None else phi / sigma
        p = torch.cat(self._logits).softmax(1)
        weights = self._samples.weights.to(phi)
        total, bound, products = 0.0, 0.0, 0
        for s in range(W.shape[0]):
            rest = torch.cat([p[:, :s], p[:, s + 1 :]], 1).sum(1)
            block = Gram(phi, p[:, s] * rest * weights / weights.sum())
            norm = float(W[s].double().square().sum())
            pair = lanczos(block, k=1, tol=_TOL, criterion="value", check="off")
            total += norm * float(pair.eigenvalues[0])
            bound += norm * float(pair.error_bounds[0])
            products += pair.n_matvec + pair.n_verify
        return SampleEstimate(
            value=total,
            stderr=0.0,
            interval=(total - bound, total + bound),
            confidence=1.0,
            samples=self._samples.examples,
            n_matvec=products,
            converged=True,
            notes=("the interval bounds the error of the eigenvalues; how the value varies with the samples is not known",),
        )


class Gram(SymmetricOperator):
    """Phi' diag(omega) Phi for features Phi (N, m) and weights omega (N,)."""

    def __init__(self, phi: torch.Tensor, omega: torch.Tensor) -> None:
        super().__init__(phi.shape[1], phi.dtype, phi.device)
        self._phi, self._omega = phi, omega

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        torch.matmul((V @ self._phi.T) * self._omega, self._phi, out=out)


def variances(W: torch.Tensor, logits: torch.Tensor, sigma: torch.Tensor | None) -> torch.Tensor:
    """(u,) V_i = sum_c p_c ||w_c - w_*||^2 - ||sum_c p_c (w_c - w_*)||^2 for the rows w of W diag(sigma), w_* that of the likeliest class.

    Cost: 2 u C min(C, m) flops and more; memory u (C + m), u C where C <= m.
    """
    rows = W - W.mean(0)  # V does not see a common shift; the smaller the rows, the less cancels
    if sigma is not None:
        rows = rows * sigma
    p = logits.softmax(1)
    best = p.argmax(1)
    tail = p.scatter(1, best[:, None], 0.0)
    norms = rows.square().sum(1)
    mass, star = tail.sum(1), norms[best]
    if W.shape[0] <= W.shape[1]:
        products = tail @ (rows @ rows.T)  # (u, C): <sum_c p_c w_c, w_s>
        across, squared = products.gather(1, best[:, None]).squeeze(1), (products * tail).sum(1)
    else:
        mean = tail @ rows
        across, squared = (mean * rows[best]).sum(1), mean.square().sum(1)
    first = tail @ norms - 2 * across + mass * star
    second = squared - 2 * mass * across + mass.square() * star
    return first - second


def squared_norms(phi: torch.Tensor, sigma: torch.Tensor | None) -> torch.Tensor:
    """(u,) ||phi_i / sigma||^2."""
    scaled = (piece if sigma is None else piece / sigma for piece in pieces(phi))
    return torch.cat([torch.linalg.vector_norm(piece, dim=1).square() for piece in scaled])
