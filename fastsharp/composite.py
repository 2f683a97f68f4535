"""Operators made of operators: sums and multiples, diagonals, and what a made one says of its parts.

Note on numerical properties. c A + d B is rounded once per term; where terms cancel (H - G of a network whose Hessian is nearly its
Gauss-Newton matrix) the relative error of the difference is that of the terms times ||A|| / ||A - B||. Residuals of solvers are those of
the products, so they do not see it: the matrix is known to eps times the size of its terms.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, TypeVar, final

import torch

from fastsharp.errors import ArgumentTypeError, DeviceError, DtypeError, InputError, NonFiniteError, ShapeError
from fastsharp.operator import SymmetricOperator

Own = TypeVar("Own", bound="Composite")


class Composite(SymmetricOperator):
    """A matrix made of others. What they say of data, weights and checks it says too; subclasses define `_apply`, `kind` and `facts`.

    parts   the operators whose products it takes, all of one dtype and device
    """

    def __init__(self, parts: Sequence[SymmetricOperator], n: int) -> None:
        super().__init__(n, parts[0].dtype, parts[0].device)
        self.parts = tuple(parts)

    @property
    @abstractmethod
    def kind(self) -> str:
        """The matrix in a few words, for `settings["operator"]`."""

    @property
    def facts(self) -> dict[str, Any]:
        """What, beside the parts, decides which matrix it is: plain values."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for part in self.parts for note in part.notes))

    @property
    def settings(self) -> dict[str, Any]:
        own = [dict(part.settings) for part in self.parts]
        outcomes = [s.pop("preflight") for s in own if "preflight" in s]
        for s in own:
            s.pop("memory", None)  # what has no effect on the products is not what a part is known by
        backends = dict.fromkeys(s["backend"] for s in own if "backend" in s)
        found: dict[str, Any] = {"operator": self.kind, **self.facts, "parts": own}
        if backends:
            found["backend"] = ", ".join(backends)
        if outcomes:
            found["preflight"] = _together(outcomes)
        return found

    @property
    def provenance(self) -> dict[str, Any]:
        """The parts' facts, each once where they agree, else as a list."""
        found: dict[str, list[Any]] = {}
        for part in self.parts:
            for name, value in part.provenance.items():
                values = found.setdefault(name, [])
                if value not in values:
                    values.append(value)
        return {name: values[0] if len(values) == 1 else values for name, values in found.items()}

    @property
    def layout(self) -> Any:
        return next((part.layout for part in self.parts if part.layout is not None), None)

    @property
    def noise(self) -> float:
        return max(part.noise for part in self.parts)

    def cheap(self: Own, precision: str) -> Own:
        """The same matrix of its parts' cheap products; InputError where a part has none."""
        twin = copy.copy(self)
        twin.parts = tuple(part.cheap(precision) for part in self.parts)
        return twin

    def check_unchanged(self) -> None:
        for part in self.parts:
            part.check_unchanged()

    def refresh(self: Own) -> Own:
        """Take the present weights in every part that has any; data stay the frozen ones. Returns self."""
        for part in self.parts:
            if hasattr(part, "refresh"):
                part.refresh()
        return self

    def release(self) -> None:
        """Drop the graphs that the parts keep; the next product builds them again."""
        for part in self.parts:
            if hasattr(part, "release"):
                part.release()


def leaves(operator: SymmetricOperator) -> Iterator[SymmetricOperator]:
    """The operators that are not made of others, each once, in order."""
    seen: set[int] = set()
    stack = [operator]
    while stack:
        one = stack.pop()
        if isinstance(one, Composite):
            stack.extend(reversed(one.parts))
        elif id(one) not in seen:
            seen.add(id(one))
            yield one


def name_of(operator: SymmetricOperator) -> str:
    """What a composite calls a part."""
    return str(operator.settings.get("operator", type(operator).__name__))


@final
class LinearCombination(Composite):
    """sum_i c_i A_i of operators of one size, dtype, device and layout: what `+`, `-`, `*` and `/` of operators give.

    Sums of sums are one sum, and a matrix that comes twice is multiplied once. Cost: one product of each part.
    """

    def __init__(self, terms: Iterable[tuple[float, SymmetricOperator]]) -> None:
        merged: dict[int, tuple[float, SymmetricOperator]] = {}
        for c, part in _flat(terms):
            merged[id(part)] = (c + (merged[id(part)][0] if id(part) in merged else 0.0), part)
        self.coefficients = tuple(c for c, _ in merged.values())
        parts = [part for _, part in merged.values()]
        for part in parts[1:]:
            _check_alike(parts[0], part)
        layouts = [part for part in parts if part.layout is not None]
        for part in layouts[1:]:
            if part.layout != layouts[0].layout:
                a, b = layouts[0].layout, part.layout
                other = next((y for x, y in zip(a.names, b.names, strict=False) if x != y), "the shape of a parameter")
                raise ShapeError(
                    f"{name_of(layouts[0])} and {name_of(part)} are over different parameters, the first difference is {other}.\n"
                    "Build both with the same params=."
                )
        super().__init__(parts, parts[0].n)

    @property
    def kind(self) -> str:
        text = ""
        for c, part in zip(self.coefficients, self.parts, strict=True):
            size = "" if abs(c) == 1.0 else f"{abs(c):g} * "
            sign = ("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")
            text += f"{sign}{size}{name_of(part)}"
        return text

    @property
    def facts(self) -> dict[str, Any]:
        return {"coefficients": list(self.coefficients)}

    @property
    def notes(self) -> tuple[str, ...]:
        data = dict.fromkeys(str(facts["data_hash"]) for facts in (part.provenance for part in self.parts) if "data_hash" in facts)
        different = [f"the parts of {self.kind} are over different data: {len(data)} hashes"] if len(data) > 1 else []
        return (*super().notes, *different)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        first, *rest = zip(self.coefficients, self.parts, strict=True)
        c, part = first
        part.apply(V, out)
        if c != 1.0:
            out.mul_(c)
        if rest:
            held = torch.empty_like(V, memory_format=torch.contiguous_format)
            for c, part in rest:
                out.add_(part.apply(V, held), alpha=c)


@final
class DiagonalOperator(SymmetricOperator):
    """diag(d) for d (n,), float32 or float64: `H + 1e-3 * fastsharp.identity_like(H)`, weight decay, any scaling.

    layout   the ParamLayout of the coordinates where they are a model's parameters
    Raises ShapeError, DtypeError, NonFiniteError.
    """

    def __init__(self, d: torch.Tensor, layout: Any = None) -> None:
        if not isinstance(d, torch.Tensor):
            raise ArgumentTypeError(f"DiagonalOperator: d is a {type(d).__name__}, expected a torch.Tensor (n,).")
        if d.ndim != 1 or d.shape[0] == 0:
            raise ShapeError(f"DiagonalOperator: d has shape {tuple(d.shape)}, expected (n,) with n >= 1.")
        super().__init__(d.shape[0], d.dtype, d.device)
        self._constant = d.stride(0) == 0  # one number, however long: written out it would take memory
        if not bool(torch.isfinite(d[:1] if self._constant else d).all()):
            raise NonFiniteError("DiagonalOperator: d holds NaN or Inf. Find where it was computed from bad data.")
        self._d = d.detach() if self._constant else d.detach().clone()
        self._layout = layout

    @property
    def settings(self) -> dict[str, Any]:
        known = f"{float(self._d[0]):g}" if self._constant else digest(self._d)
        return {"operator": "identity" if self._constant and float(self._d[0]) == 1.0 else "diagonal", "diagonal": known}

    @property
    def layout(self) -> Any:
        return self._layout

    @property
    def diagonal(self) -> torch.Tensor:
        """d, (n,), a copy."""
        return self._d.clone()

    def cheap(self, precision: str) -> SymmetricOperator:
        """Itself: its products are as cheap as they get, and exact."""
        return self

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(V, self._d, out=out)


def identity_like(A: SymmetricOperator) -> DiagonalOperator:
    """The identity of the size, dtype, device and layout of A, without memory: for shifts, `A - c * identity_like(A)`."""
    if not isinstance(A, SymmetricOperator):
        raise ArgumentTypeError(f"identity_like: got a {type(A).__name__}, expected an operator.")
    return DiagonalOperator(torch.ones(1, dtype=A.dtype, device=A.device).expand(A.n), A.layout)


def combined(*terms: tuple[Any, Any]) -> LinearCombination:
    """The sum of (factor, operator), each checked; what the arithmetic of operators calls."""
    return LinearCombination([(_factor(c), _operand(A)) for c, A in terms])


def digest(t: torch.Tensor) -> str:
    """Hash of a vector's numbers."""
    data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _flat(terms: Iterable[tuple[float, SymmetricOperator]]) -> Iterator[tuple[float, SymmetricOperator]]:
    for c, A in terms:
        if isinstance(A, LinearCombination):
            yield from ((c * inner, part) for inner, part in zip(A.coefficients, A.parts, strict=True))
        else:
            yield c, A


def _factor(c: Any) -> float:
    if isinstance(c, torch.Tensor) and c.ndim == 0 and not c.is_complex() and c.dtype != torch.bool:
        c = c.item()
    if isinstance(c, bool) or not isinstance(c, Real):
        raise ArgumentTypeError(f"an operator times a {type(c).__name__}: the factor has to be a real number. For products use A @ v.")
    if not math.isfinite(c):
        raise InputError(f"an operator times {c}: the factor has to be finite.")
    return float(c)


def _operand(A: Any) -> SymmetricOperator:
    if isinstance(A, SymmetricOperator):
        return A
    raise ArgumentTypeError(
        f"an operator plus or minus a {type(A).__name__}: both have to be operators.\n"
        "Wrap a matrix in fastsharp.DenseOperator(M); for a number c write A + c * fastsharp.identity_like(A)."
    )


def _check_alike(a: SymmetricOperator, b: SymmetricOperator) -> None:
    names = f"{name_of(a)} and {name_of(b)}"
    if a.n != b.n:
        raise ShapeError(f"{names} are of different size: n = {a.n} and n = {b.n}. Build both over the same parameters.")
    if a.dtype != b.dtype:
        raise DtypeError(f"{names} differ in dtype: {a.dtype} and {b.dtype}. Convert one of them.")
    if a.device != b.device:
        raise DeviceError(f"{names} are on different devices: {a.device} and {b.device}. Move one of them.")


def _together(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Several preflights as one: the worst of each number, "off" where one was off."""
    found: dict[str, Any] = {}
    for outcome in outcomes:
        for name, value in outcome.items():
            old = found.get(name, value)
            if isinstance(value, float) and isinstance(old, float):
                found[name] = max(old, value)
            elif name == "notes":
                found[name] = tuple(dict.fromkeys((*found.get(name, ()), *value)))
            elif name == "level":
                found[name] = min(value, old, key=("off", "fast", "full").index)
            else:
                found[name] = old if isinstance(old, str) else value  # a check that was not run on some part stays "not run"
    return found
