"""Before a Hessian is used: is it one fixed, symmetric matrix, and is it the derivative of the gradient?

Note on numerical properties. The gates were set between healthy networks and planted faults:
  repeat     two products from graphs built anew: bitwise on the CPU, 64 eps elsewhere; healthy 0, weakest fault 1.6e-4
             A model that moves torch's random state is evaluated 32 times more: a rare mask is missed by one repetition
  symmetry   |u'Hv - v'Hu| <= 16 eps ||u|| ||Hv||: healthy <= 0.5 eps; |u'Hv| below the line would raise false alarms,
             since it is small by chance. A network trained to a loss near zero lives on 1 - p for p near 1, which rounding
             spoils: 250 eps at a loss of 1e-5. Where the finite difference finds the float64 product right, that is what it is
  finite     ||(g(t + hv) - g(t - hv)) / 2h - Hv|| <= 1e-5 ||Hv|| in float64 with unit v: healthy <= 4.4e-10, weakest
  difference fault 1.4e-2. It alone sees a detached term or a backward taken as constant, which leave H symmetric.
             A failure is looked into with smaller steps on fewer samples: see `fastsharp.difference`.
  rounding   ||Hv - Hv in float64|| / ||Hv||: healthy 1e-6 in float32, 4e-3 at a loss of 1e-5. Above 1e-4 the result says so
All checks run on the first batch (the finite difference on at most 32 samples of it): H is a weighted sum over batches.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastsharp.batches import tensors_of
from fastsharp.curvature.hessian import Hessian
from fastsharp.difference import DIFFERENCE_GATE, DoubleGradient, mismatch
from fastsharp.errors import (
    DoubleBackwardError,
    FastsharpError,
    InputError,
    NondeterministicOperatorError,
    NonFiniteError,
    NotSymmetricError,
    UnstableDataWarning,
    stacklevel,
)
from fastsharp.guard import random_states

LEVELS = ("full", "fast", "off")
REPEAT_GATE = 64.0  # eps, where the device is not bitwise repeatable
SYMMETRY_GATE = 16.0  # eps
_DRAWS = 32  # evaluations of a loss that draws random numbers: a mask that drops 1 in 100 of 24 units shows with 1 - 5e-4
UNDECIDED = 1e-3  # of ||Hv||: a mismatch below it is small even if it were a fault
ROUNDING_NOTE = 1e-4  # of ||Hv||, a tenth of the default tolerance
ROUNDING_GATE = 0.1  # beyond it not even the first digit is right


def preflight(hessian: Hessian, level: str = "fast", *, strict_data: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run the checks of `level`, raise on the first that fails, and return what was measured.

    level   "fast": graph walk, repeat, three symmetry pairs, one finite-difference probe, the first two batches drawn again;
            "full": the same on one batch of each shape, four finite-difference probes, and a whole second data pass;
            "off": nothing, and the result says so
    Cost of "fast": 4 products and 2 gradients on one batch, 1 product and 2 gradients on <= 32 samples in float64.
    Raises DoubleBackwardError, NotSymmetricError, NondeterministicOperatorError, NonFiniteError.
    """
    if level not in LEVELS:
        raise InputError(f"preflight={level!r} is none of {', '.join(map(repr, LEVELS))}.")
    outcome: dict[str, Any] = {"level": level}
    if level != "off":
        objective = hessian.objective
        outcome["data"] = _check_data(hessian, level, strict_data)
        with objective.quiet():
            for index, batch in _chosen_batches(hessian, level):
                generator = torch.Generator().manual_seed(seed + 7919 * index)
                measured = _check_products(hessian, index, batch, generator)
                measured |= _check_difference(hessian, index, batch, generator, measured["symmetry"], probes=4 if level == "full" else 1)
                _check_symmetry(hessian, measured)
                for name, value in measured.items():
                    both = isinstance(value, float) and isinstance(outcome.get(name), float)
                    if both or not isinstance(outcome.get(name), str):  # a check that could not be run on some batch stays "not run"
                        outcome[name] = max(outcome[name], value) if both else value
    outcome["notes"] = _notes(outcome)
    hessian.preflight = outcome
    return outcome


def _notes(outcome: dict[str, Any]) -> tuple[str, ...]:
    """What a result must say of the outcome."""
    notes = []
    if isinstance(unmeasured := outcome.get("finite_difference"), str):
        notes.append(f"finite-difference check {unmeasured}")
    if outcome.get("rounding", 0.0) > ROUNDING_NOTE:
        notes.append(f"rounding changes products by {outcome['rounding']:.0e} of their norm; model.double() gives more digits")
    return tuple(notes)


def _check_data(hessian: Hessian, level: str, strict: bool) -> str:
    batches = hessian.objective.batches
    found = batches.recheck() if level == "full" else batches.redraw()
    if found == "other samples":
        message = (
            "the loader returns other samples when it is read again (augmentation, or shuffle with drop_last).\n"
            f"The curvature is that of the first draw, hash {batches.digest()}. For figures that can be repeated, fix the data."
        )
        if strict:
            raise NondeterministicOperatorError(message)
        warnings.warn(message, UnstableDataWarning, stacklevel=stacklevel())
    return found


def _chosen_batches(hessian: Hessian, level: str) -> list[tuple[int, Any]]:
    """The first batch, or for "full" the first of each combination of shapes."""
    if level == "fast":
        return [(0, hessian.objective.batches.first())]
    chosen: dict[tuple[Any, ...], tuple[int, Any]] = {}
    for index, batch in hessian.objective.batches:
        chosen.setdefault(tuple(tuple(t.shape) for t in tensors_of(batch)), (index, batch))
    return list(chosen.values())


def _check_products(hessian: Hessian, index: int, batch: Any, generator: torch.Generator) -> dict[str, Any]:
    """Graph walk, repeatability and the symmetry defect of the products of one batch."""
    eps = torch.finfo(hessian.dtype).eps
    V = torch.randn(3, hessian.n, generator=generator, dtype=torch.float64).to(hessian.dtype).to(hessian.device)
    before = random_states(hessian.device)
    graph, _ = hessian.minibatch_graph(batch, index)
    if random_states(hessian.device) != before and hessian.objective.modes.dropout != "fixed-masks":
        _check_draws(hessian, index, batch)
    graph.check_twice_differentiable()
    HV = torch.stack([_flat_product(hessian, graph, v) for v in V])
    again = _flat_product(hessian, hessian.minibatch_graph(batch, index)[0], V[0])
    if not bool(torch.isfinite(HV).all()):
        raise NonFiniteError(_where_not_finite(hessian, HV))
    repeat = float((again - HV[0]).norm().double() / HV[0].norm().double().clamp_min(torch.finfo(torch.float64).tiny))
    if repeat > (0.0 if hessian.device.type == "cpu" else REPEAT_GATE * eps):
        raise NondeterministicOperatorError(
            f"two products with the same vector differ by {repeat:.2e} of their norm: the model or loss is random.\n"
            "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
        )
    U, W = V.double(), HV.double()
    cross, room = U @ W.T, torch.outer(U.norm(dim=1), W.norm(dim=1))
    defect = float(((cross - cross.T).abs() / torch.maximum(room, room.T).clamp_min(torch.finfo(torch.float64).tiny)).max())
    return {"repeat": repeat, "symmetry": defect}


def _check_draws(hessian: Hessian, index: int, batch: Any) -> None:
    """A model that draws random numbers may do so to no effect; a rare effect is missed by one repeated product."""
    with torch.no_grad():
        losses = {float(hessian.objective.evaluate_unchecked(index, batch).loss) for _ in range(_DRAWS)}
    if len(losses) > 1:
        raise NondeterministicOperatorError(
            f"the loss of batch {index} took {len(losses)} values in {_DRAWS} evaluations with the same weights: the model or loss is random.\n"
            "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
        )


def _check_symmetry(hessian: Hessian, measured: dict[str, Any]) -> None:
    """A defect beyond the gate is a fault, unless the float64 product was found to be right: then it is rounding."""
    defect, gate = measured["symmetry"], SYMMETRY_GATE * torch.finfo(hessian.dtype).eps
    if defect <= gate:
        return
    if not isinstance(measured["finite_difference"], float):
        raise NotSymmetricError(
            f"|u'Hv - v'Hu| is {defect:.2e} of ||u|| ||Hv||, above the gate of {gate:.1e}: the product is not symmetric.\n"
            "A custom autograd.Function with an inconsistent backward is the usual cause; check it with torch.autograd.gradgradcheck."
        )
    if max(defect, measured["rounding"]) > ROUNDING_GATE:
        raise NotSymmetricError(
            f"rounding in {hessian.dtype} spoils the product: |u'Hv - v'Hu| is {defect:.2e} of ||u|| ||Hv||, "
            f"the product itself off by {measured['rounding']:.0%}.\n"
            "The loss is so close to zero that its second derivative cancels. Use model.double()."
        )


def _flat_product(hessian: Hessian, graph: Any, v: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(v)
    product = graph.product(hessian.layout.views(v))
    if product is not None:
        torch._foreach_add_(hessian.layout.views(out), list(product))
    return out


def _where_not_finite(hessian: Hessian, HV: torch.Tensor) -> str:
    parts = zip(hessian.layout.names, hessian.layout.views(HV[0]), strict=True)
    bad = [name for name, part in parts if not bool(torch.isfinite(part).all())] or ["another probe"]
    return (
        f"a Hessian-vector product has NaN or Inf in the rows of {', '.join(bad[:4])}, though the loss is finite.\n"
        "A square root or norm at zero has no second derivative; add a small constant inside it, or leave the parameter out with params=."
    )


def _check_difference(hessian: Hessian, index: int, batch: Any, generator: torch.Generator, symmetry: float, probes: int) -> dict[str, Any]:
    """Compare the product with differences of gradients, in float64, on a few samples."""
    try:
        double = DoubleGradient(hessian, index, batch)
    except FastsharpError:
        raise
    except Exception as e:  # whatever a model's code makes of float64 is no fault of its second derivative
        return {"finite_difference": f"not run: the model does not evaluate in float64 ({_first_line(e)})"}
    if double.narrow:
        return {"finite_difference": f"not run: part of the model computes in float32 whatever its inputs are ({double.narrow})"}
    worst, fault = 0.0, False
    for _ in range(probes):
        v = torch.randn(hessian.n, generator=generator, dtype=torch.float64).to(hessian.device)
        size, faulty = mismatch(double, v / v.norm(), generator)
        worst, fault = max(worst, size), fault or faulty
    if fault and symmetry > SYMMETRY_GATE * torch.finfo(hessian.dtype).eps:
        return {"finite_difference": f"failed by {worst:.1e}"}  # both see it: the symmetry check names the cause better
    if fault:
        raise DoubleBackwardError(
            f"the product misses the finite difference of the gradient by {worst:.1e} of its norm (gate {DIFFERENCE_GATE:.0e}):\n"
            "a term of the loss is detached, or a custom backward is treated as constant, so autograd's second derivative is wrong.\n"
            "Look for .detach(), .data or torch.no_grad() in the model and loss, and check custom Functions with gradgradcheck."
        )
    if worst > UNDECIDED:
        return {"finite_difference": f"undecided: gradients jump or are rounding near the weights (mismatch {worst:.0e} without a cause)"}
    masked = hessian.objective.modes.dropout == "fixed-masks"  # float64 draws other masks
    return {"finite_difference": worst, "rounding": double.rounding(v / v.norm()) if not masked else 0.0}


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).split("\n")[0][:120]
