"""ggn_spectrum: every non-zero eigenvalue of a Gauss-Newton matrix, without Lanczos, where samples times outputs are few."""

from __future__ import annotations

from typing import Any

import torch

from fastsharp.api.subject import checked, first_steps, operator_of
from fastsharp.batches import Budget
from fastsharp.curvature import GGN
from fastsharp.curvature.gram import Gram, gram
from fastsharp.errors import ArgumentTypeError, BasisMemoryError, EngineError, InputError, listing
from fastsharp.params import Selector
from fastsharp.results import GGNSpectrum

_GATE = 2.0**12  # eps, of a product from the Gram matrix against the operator's own


def ggn_spectrum(
    model: torch.nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    vectors: bool | int = False,
    max_rows: int = 20_000,
    params: Selector = None,
    reduction: str = "auto",
    bn: str | None = None,
    dropout: str | None = None,
    backend: str = "auto",
    memory: str | int = "auto",
    seed: int = 0,
    strict_data: bool = False,
    preflight: str = "fast",
) -> GGNSpectrum:
    """All non-zero eigenvalues of G = J' H_L J from K = M M', M = D^(1/2) S J with H_L = S' D S: float64, to rounding, no Lanczos.

        result = fastsharp.ggn_spectrum(model, loader)
        result.eigenvalues, result.trace, result.logdet(1e-3), result.effective_dimension(1e-3)

    model, loader, loss_fn, params, reduction, bn, dropout, backend, memory, seed, strict_data, preflight
                as in `fastsharp.lanczos`; the matrix, its weights and what it refuses are those of `fastsharp.GGN`
    vectors     True: eigenvectors M'u / sqrt(lambda) of all eigenvalues, or a number: of that many from the top; a backward pass each
    max_rows    samples times outputs at most: K has (samples times outputs)^2 entries and is decomposed in float64

    Cost: as many input-gradient passes as a sample has outputs, the products of factors (weights that a sample passes once) or of
    explicit Jacobian rows (convolutions, sequences, norms, embeddings), and `eigh`; result.equivalent_products states it in products
    with G. Parameters used in another way cost a backward pass for each row. A loss that is not convex is handled: its negative
    eigenvalues come out of K^(1/2) D K^(1/2).

    Returns GGNSpectrum. Raises InputError or BasisMemoryError with the size where K or the rows do not fit, InputError where the loss
    couples samples, EngineError where a product from K disagrees with the operator's; else as `fastsharp.GGN`.
    Sources: ViViT, Dangel, Tatzel and Hennig 2022; structured Jacobians, Novak, Sohl-Dickstein and Schoenholz 2022.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(f"ggn_spectrum: model is a {type(model).__name__}, expected a torch.nn.Module with its data.")
    if isinstance(vectors, float) or not isinstance(vectors, int) or vectors < 0:
        raise ArgumentTypeError(f"ggn_spectrum: vectors is {vectors!r}, expected True, False or how many.")
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
        raise InputError(f"ggn_spectrum: max_rows is {max_rows!r}, expected an int from 1.")
    build: dict[str, Any] = {"params": params, "reduction": reduction, "bn": bn, "dropout": dropout, "backend": backend}
    operator = operator_of(model, loader, loss_fn, operator="ggn", memory=memory, seed=seed, preflight=preflight, **build)
    assert isinstance(operator, GGN)
    budget = Budget.of(memory, operator.device).total // 2
    operator.reserve(budget)
    with first_steps(), torch.inference_mode(False), torch.no_grad():
        made = gram(operator.objective, max_rows, budget)  # refuses before the preflight spends products
        checked(operator, preflight=preflight, strict_data=strict_data, seed=seed)
        operator.check_unchanged()
        values, U = _eigen(made, vectors=bool(vectors))
        error = _compared(made, operator)
        count = len(values) if vectors is True else min(int(vectors), len(values))
        found = _vectors(made, U[:, :count], budget) if vectors else None
        operator.check_unchanged()
    signs, K = made.signs, made.K
    whole = bool(vectors) or bool((signs < 0).any())
    flops = {**made.flops, "eigh": (9.0 if whole else 4.0 / 3.0) * made.rows**3}
    notes = list(operator.notes)
    if made.by_rows:
        notes.append(f"one backward pass for each of {made.rows} rows: {listing(list(made.by_rows), 4)}")
    if bool((signs < 0).any()):
        notes.append("the loss is not convex in the output: the Gauss-Newton matrix has negative eigenvalues, or may have them")
    return GGNSpectrum(
        eigenvalues=values.cpu(),
        eigenvectors=found,
        n=operator.n,
        rows=made.rows,
        trace=float((signs * K.diagonal()).sum()),
        frobenius=float(max(float((signs[:, None] * K.square() * signs).sum()), 0.0) ** 0.5),
        error=error,
        notes=tuple(notes),
        settings={**operator.settings, "max_rows": max_rows, "flops": flops},
        provenance=operator.provenance,
        layout=operator.layout,
    )


def _eigen(made: Gram, *, vectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-zero eigenvalues, descending, and coefficients U (R, rank) with orthonormal eigenvectors M'U; no columns unless `vectors`."""
    if not made.rows:
        return made.signs.new_zeros(0), made.K
    eps, model_eps = torch.finfo(torch.float64).eps, torch.finfo(made.objective.dtype).eps
    floor = made.rows * max(eps, model_eps**2)  # of decomposition and of rows whose entries are rounded
    convex = bool((made.signs > 0).all())
    if convex and not vectors:
        values = torch.linalg.eigvalsh(made.K)
        return values[values > floor * values[-1]].flip(0), made.K[:, :0]
    values, V = torch.linalg.eigh(made.K)
    kept = values > floor * values[-1]
    values, V = values[kept].flip(0), V[:, kept].flip(1)
    if convex:
        return values, V / values.sqrt()
    P = V * values.sqrt()  # K = P P', G = (M'V / sqrt(values)) P'D P (...)'
    mixed, W = torch.linalg.eigh(P.T @ (made.signs[:, None] * P))
    kept = mixed.abs() > floor * mixed.abs().max()
    mixed, W = mixed[kept].flip(0), W[:, kept].flip(1)
    return mixed, (V / values.sqrt()) @ W


def _compared(made: Gram, operator: GGN) -> float:
    """||G v - M'D K w|| / ||G v|| for v = M'w; EngineError beyond rounding."""
    if not made.rows:
        return 0.0
    w = torch.linspace(1.0, 2.0, made.rows, dtype=torch.float64, device=made.K.device).mul(11.0 * made.rows).cos()
    v = made.pull(w[None])
    exact = operator.apply(v).double()
    ours = made.pull((made.signs * (made.K @ w))[None]).double()
    scale = float(exact.norm())
    missed = float((ours - exact).norm())
    if not missed <= _GATE * torch.finfo(operator.dtype).eps * float(made.K.diagonal().sum()) * float(v.double().norm()):
        raise EngineError(
            f"ggn_spectrum: a product from the Gram matrix differs from that of fastsharp.GGN by {missed / scale if scale else missed:.2g}.\n"
            "Use fastsharp.lanczos(operator='ggn'), and report the model."
        )
    return missed / scale if scale else missed


def _vectors(made: Gram, U: torch.Tensor, budget: int) -> torch.Tensor:
    layout, dtype = made.layout, made.objective.dtype
    need = U.shape[1] * layout.n * torch.finfo(dtype).bits // 8
    if need > budget:
        raise BasisMemoryError(
            f"ggn_spectrum: {U.shape[1]} eigenvectors of {layout.n:,} parameters need {need / 1e9:.3g} GB, the budget is {budget / 1e9:.3g} GB.\n"
            "Pass vectors= a smaller number, or raise memory=."
        )
    X = made.pull(U.T)
    X /= torch.linalg.vector_norm(X, dim=1, keepdim=True)
    return X
