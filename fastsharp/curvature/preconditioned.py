"""The curvature that an adaptive optimiser sees: P^-1/2 A P^-1/2 with P from its live state.

With momentum b1 and learning rate lr, Adam is stable on a quadratic while lambda_max(P^-1 A) < 2 (1 + b1) / ((1 - b1) lr), 38 / lr for
b1 = 0.9. P^-1 A is not symmetric; P^-1/2 A P^-1/2 has its eigenvalues.
Source: Cohen et al., Adaptive gradient methods at the edge of stability (2207.14484), section 2: P_t = (1 - b1^t) [diag(sqrt(v_t / (1 - b2^t))) + eps].
"""

from __future__ import annotations

from typing import Any, final

import torch

from fastsharp.composite import Composite, digest, name_of
from fastsharp.curvature.coordinates import layout_of, parameters_of
from fastsharp.curvature.optimizer import check_optimizer, groups_of, steps_as
from fastsharp.errors import ArgumentTypeError, InputError, ShapeError, StaleOperatorError, listing
from fastsharp.operator import SymmetricOperator

_CLASSES = (torch.optim.Adam, torch.optim.AdamW)
_CALL = "Preconditioned"
_SPREAD_NOTE = 1e-3  # max P / min P times eps: a product's error of eps ||A||, where it is no smaller in rows that P^-1/2 blows up
Preconditioner = torch.optim.Optimizer | torch.Tensor


@final
class Preconditioned(Composite):
    """P^-1/2 A P^-1/2 for a diagonal P > 0: of a live Adam or AdamW, P = (1 - b1^t) (diag(sqrt(v / (1 - b2^t))) + eps).

    A   any operator; for an optimizer one of a model, whose parameters it holds
    P   the torch.optim.Adam or AdamW that trains the model (amsgrad, foreach, fused and capturable as they are), or the diagonal of P as
        a tensor (n,), all positive

    Eigenvectors u are in preconditioned coordinates: `to_parameters(u)` = P^-1/2 u is the eigenvector of P^-1 A, a direction of the weights.
    P is read now and at every `refresh()`; an optimizer that has stepped since is StaleOperatorError. Cost: one product of A, n numbers.
    Raises InputError where the state is missing (no step yet) or P has a zero, ParamError where the optimizer does not hold a parameter.
    """

    def __init__(self, A: SymmetricOperator, P: Preconditioner) -> None:
        if not isinstance(A, SymmetricOperator):
            raise ArgumentTypeError(
                f"{_CALL}: A is a {type(A).__name__}, expected an operator, as fastsharp.Hessian(model, loader, loss_fn)."
            )
        super().__init__([A], A.n)
        self._source = P
        self._read()

    @property
    def kind(self) -> str:
        return f"preconditioned ({name_of(self.parts[0])})"

    @property
    def facts(self) -> dict[str, Any]:
        return {"preconditioner": digest(self._root)}

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        rates = sorted({float(group["lr"]) for group in self._groups})
        if len(rates) > 1:
            notes.append(f"the optimizer's groups have learning rates from {rates[0]:g} to {rates[-1]:g}: no one threshold holds for all")
        if self._spread * torch.finfo(self.dtype).eps > _SPREAD_NOTE:
            notes.append(
                f"P spans a factor of {self._spread:.0e}: rounding in {self.dtype} may show; a float64 copy of the model with P=A.diagonal.double() gives more digits"
            )
        return (*super().notes, *notes)

    @property
    def diagonal(self) -> torch.Tensor:
        """The diagonal of P, (n,), in the operator's dtype."""
        return self._root.reciprocal().square()

    def to_parameters(self, V: torch.Tensor) -> torch.Tensor:
        """P^-1/2 v for a vector or rows: from the coordinates of this matrix to those of the weights."""
        return self._checked(V) * self._root

    def from_parameters(self, W: torch.Tensor) -> torch.Tensor:
        """P^1/2 w for a vector or rows: the inverse of `to_parameters`."""
        return self._checked(W) / self._root

    def refresh(self) -> Preconditioned:
        """Take the present weights and the optimizer's present state. Returns self."""
        super().refresh()
        self._read()
        return self

    def check_unchanged(self) -> None:
        super().check_unchanged()
        if isinstance(self._source, torch.optim.Optimizer) and self._state_marks() != self._marks:
            raise StaleOperatorError("the optimizer has stepped since the operator was built. Call refresh(), or build a new one.")

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.parts[0].apply(V * self._root, out).mul_(self._root)

    def _checked(self, V: torch.Tensor) -> torch.Tensor:
        self._check(V, "the vector")
        if V.ndim not in (1, 2) or V.shape[-1] != self.n:
            raise ShapeError(f"{_CALL}: the vector has shape {tuple(V.shape)}, expected ({self.n},) or rows (b, {self.n}).")
        return V

    def _read(self) -> None:
        """P^-1/2, computed in float64 and rounded once."""
        self._groups: list[dict[str, Any]] = []
        source = self._source
        if isinstance(source, torch.Tensor):
            self._check(source, "P")
            if source.shape != (self.n,):
                raise ShapeError(f"{_CALL}: P has shape {tuple(source.shape)}, expected its diagonal ({self.n},).")
            P = source.detach().double()
            if not bool(((P > 0) & torch.isfinite(P)).all()):
                raise InputError(f"{_CALL}: P has entries that are not finite and positive. Add a small constant.")
        else:
            P = self._of_adam(check_optimizer(source, _CALL))
            self._marks = self._state_marks()
        self._root = P.rsqrt().to(self.dtype)
        self._spread = float(P.max() / P.min())

    def _of_adam(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        if not steps_as(optimizer, *_CLASSES):
            raise InputError(
                f"{_CALL}: {type(optimizer).__name__} is not torch's Adam or AdamW, its preconditioner is not known.\n"
                "Pass the diagonal of P as a tensor (n,)."
            )
        layout_of(self.parts[0], _CALL)
        parameters = parameters_of(self.parts[0], _CALL)
        self._groups = groups_of(optimizer, parameters, _CALL)
        state = optimizer.state
        without = [name for name, p in parameters if p not in state or "exp_avg_sq" not in state[p]]
        if without:
            raise InputError(
                f"{_CALL}: the optimizer has no state yet for {listing(without)}.\n"
                "Let it step at least once with their gradients, load its state_dict, or leave them out with params=."
            )
        return torch.cat([_diagonal(name, p, group, state[p]) for (name, p), group in zip(parameters, self._groups, strict=True)])

    def _state_marks(self) -> list[Any]:
        assert isinstance(self._source, torch.optim.Optimizer)
        found: list[Any] = []
        for _, p in parameters_of(self.parts[0], _CALL):
            state = self._source.state.get(p, {})
            for key in ("step", "exp_avg_sq", "max_exp_avg_sq"):
                value = state.get(key)
                found.append((value.data_ptr(), value._version) if isinstance(value, torch.Tensor) else value)
        return found


def _diagonal(name: str, p: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> torch.Tensor:
    """P of one parameter, flat, float64."""
    b1, b2 = (float(b) for b in group["betas"])
    t = float(state["step"])
    if not t >= 1:
        raise InputError(f"{_CALL}: the optimizer counts {t:g} steps for {name!r}. Let it step at least once.")
    v = state["max_exp_avg_sq"] if group.get("amsgrad", False) else state["exp_avg_sq"]
    if v.shape != p.shape:
        raise ShapeError(f"{_CALL}: the state of {name!r} has shape {tuple(v.shape)}, the parameter {tuple(p.shape)}.")
    P: torch.Tensor = (1 - b1**t) * ((v.detach().to(p.device).double() / (1 - b2**t)).sqrt() + float(group["eps"]))
    if not bool(((P > 0) & torch.isfinite(P)).all()):
        raise InputError(f"{_CALL}: P has entries that are not finite and positive in {name!r}. Use an optimizer with eps > 0.")
    return P.reshape(-1)
