"""Before a curvature matrix is used: is it one fixed, symmetric matrix, and is it the right one?

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
  engine      products of a backend other than autograd against autograd's: see `fastsharp.engine_check`
  curvature   Gauss-Newton and Fisher matrices: v'Gv of three probes, a note where it is negative. The matrix is no derivative of the
              gradient, so that the finite difference does not apply; its rounding is measured all the same
  reference   Fisher matrices, covariance, residual: against their definition, see `fastsharp.score_check`. The residual's finite difference
              is that of the Hessian which it is a part of
All checks run on the first batch (the finite difference on at most 32 samples of it): H is a weighted sum over batches.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastsharp.batches import Batches, tensors_of
from fastsharp.curvature.batch_products import BatchProducts
from fastsharp.curvature.finite_sum import FiniteSum
from fastsharp.difference import DIFFERENCE_GATE, DoubleGradient, mismatch
from fastsharp.engine_check import check_engine
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
from fastsharp.score_check import check_scores

LEVELS = ("full", "fast", "off")
REPEAT_GATE = 64.0  # eps, where the device is not bitwise repeatable
SYMMETRY_GATE = 16.0  # eps
_DRAWS = 32  # evaluations of a loss that draws random numbers: a mask that drops 1 in 100 of 24 units shows with 1 - 5e-4
UNDECIDED = 1e-3  # of ||Hv||: a mismatch below it is small even if it were a fault
ROUNDING_NOTE = 1e-4  # of ||Hv||, a tenth of the default tolerance
ROUNDING_GATE = 0.1  # beyond it not even the first digit is right


def preflight(operator: FiniteSum, level: str = "fast", *, strict_data: bool = False, seed: int = 0) -> dict[str, Any]:
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
        objective = operator.objective
        outcome["data"] = check_data(objective.batches, level, strict_data)
        with objective.quiet():
            for index, batch in _chosen_batches(operator, level):
                generator = torch.Generator().manual_seed(seed + 7919 * index)
                measured = _check_products(operator, index, batch, generator)
                double = _double(operator, index, batch)
                measured |= check_engine(operator, index, batch, None if isinstance(double, str) else double, generator)
                measured |= check_scores(operator, double, generator)
                if not operator.form.gauss:
                    measured |= _check_difference(operator, double, generator, measured["symmetry"], probes=4 if level == "full" else 1)
                else:
                    measured |= _check_gauss_newton(operator, double, generator)
                _check_symmetry(operator, measured)
                for name, value in measured.items():
                    both = isinstance(value, float) and isinstance(outcome.get(name), float)
                    if both or not isinstance(outcome.get(name), str):  # a check that could not be run on some batch stays "not run"
                        outcome[name] = max(outcome[name], value) if both else value
    outcome["notes"] = outcome_notes(outcome)
    operator.preflight = outcome
    return outcome


def outcome_notes(outcome: dict[str, Any]) -> tuple[str, ...]:
    """What a result must say of the outcome."""
    notes = []
    if isinstance(other := outcome.get("reference"), str):
        notes.append(f"comparison with the matrix's definition {other}")
    if isinstance(unmeasured := outcome.get("finite_difference"), str):
        notes.append(f"finite-difference check {unmeasured}")
    if isinstance(compared := outcome.get("engine"), str):
        notes.append(f"products of the engine {compared}")
    if outcome.get("rounding", 0.0) > ROUNDING_NOTE:
        notes.append(f"rounding changes products by {outcome['rounding']:.0e} of their norm; model.double() gives more digits")
    if outcome.get("least_curvature", 0.0) < -ROUNDING_NOTE:
        notes.append("the Gauss-Newton matrix is indefinite: the loss is not convex in the network's output")
    return tuple(notes)


def check_data(batches: Batches, level: str, strict: bool) -> str:
    """Draw the loader again; "other samples" is a warning, or with `strict` NondeterministicOperatorError."""
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


def _chosen_batches(operator: FiniteSum, level: str) -> list[tuple[int, Any]]:
    """The first batch, or for "full" the first of each combination of shapes."""
    if level == "fast":
        return [(0, operator.objective.batches.first())]
    chosen: dict[tuple[Any, ...], tuple[int, Any]] = {}
    for index, batch in operator.objective.batches:
        chosen.setdefault(tuple(tuple(t.shape) for t in tensors_of(batch)), (index, batch))
    return list(chosen.values())


def _check_products(operator: FiniteSum, index: int, batch: Any, generator: torch.Generator) -> dict[str, Any]:
    """Graph walk, repeatability and the symmetry defect of the products of one batch."""
    eps = torch.finfo(operator.dtype).eps
    V = torch.randn(3, operator.n, generator=generator, dtype=torch.float64).to(operator.dtype).to(operator.device)
    before = random_states(operator.device)
    products = operator.minibatch_products(batch, index).products
    if random_states(operator.device) != before and operator.objective.modes.dropout != "fixed-masks":
        _check_draws(operator, index, batch)
    products.check_twice_differentiable()
    HV = _rows(products, V)
    again = _rows(operator.minibatch_products(batch, index).products, V)[0]
    if not bool(torch.isfinite(HV).all()):
        raise NonFiniteError(_where_not_finite(operator, HV))
    repeat, symmetry = defects(V, HV, again)
    if repeat > (0.0 if operator.device.type == "cpu" else REPEAT_GATE * eps):
        raise NondeterministicOperatorError(
            f"two products with the same vector differ by {repeat:.2e} of their norm: the model or loss is random.\n"
            "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
        )
    return {"repeat": repeat, "symmetry": symmetry}


def defects(V: torch.Tensor, HV: torch.Tensor, again: torch.Tensor) -> tuple[float, float]:
    """(||again - Hv_0|| / ||Hv_0||, the largest |u'Hv - v'Hu| / max(||u|| ||Hv||, ||v|| ||Hu||)) for probes V and products HV (p, n)."""
    tiny = torch.finfo(torch.float64).tiny
    U, W = V.double(), HV.double()
    norms = W.norm(dim=1)
    repeat = float((again.double() - W[0]).norm() / norms[0].clamp_min(tiny))
    cross, room = U @ W.T, torch.outer(U.norm(dim=1), norms)
    symmetry = (cross - cross.T).abs() / torch.maximum(room, room.T).clamp_min(tiny)
    return repeat, float(symmetry.max())


def _check_draws(operator: FiniteSum, index: int, batch: Any) -> None:
    """A model that draws random numbers may do so to no effect; a rare effect is missed by one repeated product."""
    with torch.no_grad():
        losses = {float(operator.objective.evaluate_unchecked(index, batch).loss) for _ in range(_DRAWS)}
    if len(losses) > 1:
        raise NondeterministicOperatorError(
            f"the loss of batch {index} took {len(losses)} values in {_DRAWS} evaluations with the same weights: the model or loss is random.\n"
            "Look for dropout called as a function, noise layers or sampling; call model.eval() or remove it."
        )


def _check_symmetry(operator: FiniteSum, measured: dict[str, Any]) -> None:
    """A defect beyond the gate is a fault, unless the float64 product was found to be right: then it is rounding."""
    defect, gate = measured["symmetry"], SYMMETRY_GATE * torch.finfo(operator.dtype).eps
    if defect <= gate:
        return
    if "rounding" not in measured:
        raise NotSymmetricError(
            f"|u'Hv - v'Hu| is {defect:.2e} of ||u|| ||Hv||, above the gate of {gate:.1e}: the product is not symmetric.\n"
            "A custom autograd.Function with an inconsistent backward is the usual cause; check it with torch.autograd.gradgradcheck."
        )
    if max(defect, measured["rounding"]) > ROUNDING_GATE:
        raise NotSymmetricError(
            f"rounding in {operator.dtype} spoils the product: |u'Hv - v'Hu| is {defect:.2e} of ||u|| ||Hv||, "
            f"the product itself off by {measured['rounding']:.0%}.\n"
            "The loss is so close to zero that its second derivative cancels. Use model.double()."
        )


def _rows(products: BatchProducts, V: torch.Tensor) -> torch.Tensor:
    """V A of one batch."""
    out = torch.zeros_like(V)
    products.add_products(V, out, 1.0)
    return out


def _where_not_finite(operator: FiniteSum, HV: torch.Tensor) -> str:
    parts = zip(operator.layout.names, operator.layout.views(HV[0]), strict=True)
    bad = [name for name, part in parts if not bool(torch.isfinite(part).all())] or ["another probe"]
    return (
        f"a Hessian-vector product has NaN or Inf in the rows of {', '.join(bad[:4])}, though the loss is finite.\n"
        "A square root or norm at zero has no second derivative; add a small constant inside it, or leave the parameter out with params=."
    )


def _double(operator: FiniteSum, index: int, batch: Any) -> DoubleGradient | str:
    """The batch's objective in float64, or why there is none."""
    try:
        double = DoubleGradient(operator, index, batch)
    except FastsharpError:
        raise
    except Exception as e:  # whatever a model's code makes of float64 is no fault of its second derivative
        return f"not run: the model does not evaluate in float64 ({_first_line(e)})"
    if double.narrow:
        return f"not run: part of the model computes in float32 whatever its inputs are ({double.narrow})"
    return double


def _check_difference(
    operator: FiniteSum, double: DoubleGradient | str, generator: torch.Generator, symmetry: float, probes: int
) -> dict[str, Any]:
    """Compare the product with differences of gradients, in float64, on a few samples."""
    if isinstance(double, str):
        return {"finite_difference": double}
    worst, fault = 0.0, False
    for _ in range(probes):
        v = torch.randn(operator.n, generator=generator, dtype=torch.float64).to(operator.device)
        size, faulty = mismatch(double, v / v.norm(), generator)
        worst, fault = max(worst, size), fault or faulty
    if fault and symmetry > SYMMETRY_GATE * torch.finfo(operator.dtype).eps:
        return {"finite_difference": f"failed by {worst:.1e}"}  # both see it: the symmetry check names the cause better
    if fault:
        raise DoubleBackwardError(
            f"the product misses the finite difference of the gradient by {worst:.1e} of its norm (gate {DIFFERENCE_GATE:.0e}):\n"
            "a term of the loss is detached, or a custom backward is treated as constant, so autograd's second derivative is wrong.\n"
            "Look for .detach(), .data or torch.no_grad() in the model and loss, and check custom Functions with gradgradcheck."
        )
    if worst > UNDECIDED:
        return {"finite_difference": f"undecided: gradients jump or are rounding near the weights (mismatch {worst:.0e} without a cause)"}
    return {"finite_difference": worst, "rounding": _rounding(operator, double, v)}


def _check_gauss_newton(operator: FiniteSum, double: DoubleGradient | str, generator: torch.Generator) -> dict[str, Any]:
    """Curvature along a few vectors, and the product against the one in float64.

    A negative v'Gv is no fault by itself: the loss need not be convex in the output. The result says so.
    """
    V = torch.randn(3, operator.n, generator=generator, dtype=torch.float64).to(operator.dtype).to(operator.device)
    batch = operator.objective.batches.first()
    measured = {"least_curvature": least_curvature(V, _rows(operator.minibatch_products(batch, 0).products, V))}
    if isinstance(double, DoubleGradient):
        measured["rounding"] = _rounding(operator, double, V[0].double())
    return measured


def least_curvature(V: torch.Tensor, GV: torch.Tensor) -> float:
    """The least v'Gv / (||v|| ||Gv||) of probes and their products (p, n)."""
    U, W = V.double(), GV.double()
    room = (U.norm(dim=1) * W.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((U * W).sum(dim=1) / room).min())


def _rounding(operator: FiniteSum, double: DoubleGradient, v: torch.Tensor) -> float:
    masked = operator.objective.modes.dropout == "fixed-masks"  # float64 draws other masks
    return 0.0 if masked else double.rounding(v / v.norm())


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).split("\n")[0][:120]
