"""Trace, Frobenius norm, log-determinant and tr f(H) of a symmetric operator, each run until its interval is narrow enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastsharp.errors import ArgumentTypeError, InputError
from fastsharp.krylov.aware import KrylovSpace, check_space, space_of
from fastsharp.krylov.estimate import Budget, Exact, Kept, OnStep, Run, keeping, report_failure
from fastsharp.krylov.exchange import xtrace_run
from fastsharp.krylov.functions import Function, Quadrature, log_shifted, spectral_sum
from fastsharp.krylov.hutchinson import Complement, diagonal
from fastsharp.krylov.products import Products
from fastsharp.krylov.stages import MIN_FINAL, Interval, Target
from fastsharp.krylov.symmetry import CHECKS, PROBE_PRODUCTS, needs_probes, probe
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs, Estimate

METHODS = ("auto", "hutchinson", "hutch++", "xtrace", "krylov")

_SMALL = 64  # n up to which the whole matrix is the cheapest answer
_ASSEMBLED = 2048  # n up to which a matrix is decomposed where its n products are the cheaper way to tr f(H)
_LEAST_PRODUCTS = 64  # a pilot, one growth of the space and a smallest final stage
LEAST_SQUARES = 32  # samples of a smallest final stage for the Frobenius norm, whose variance is known less well
_STEPS = 200  # of one quadrature, unless its share of the budget is smaller


def check_arguments(
    name: str,
    *,
    rtol: float,
    atol: float | None,
    confidence: float,
    method: str,
    max_products: int,
    pairs: Any,
    seed: int,
    check: str = "auto",
) -> None:
    """The arguments of every estimate, checked before any work. Raises ArgumentTypeError or InputError."""
    _positive(name, "rtol", rtol)
    if atol is not None:
        _positive(name, "atol", atol, zero=True)
    _positive(name, "confidence", confidence)
    if not 0.5 <= confidence <= 0.999:
        raise InputError(f"{name}: confidence is {confidence}, expected a share between 0.5 and 0.999, such as 0.95.")
    for argument, value, choices in (("method", method, METHODS), ("check", check, CHECKS)):
        if value not in choices:
            raise InputError(f"{name}: {argument} is {value!r}, expected one of {', '.join(map(repr, choices))}.")
    for argument, number in (("max_products", max_products), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ArgumentTypeError(f"{name}: {argument} is {number!r}, a {type(number).__name__}; expected an int.")
    if max_products < _LEAST_PRODUCTS:
        raise InputError(f"{name}: max_products is {max_products}, too few for a pilot and a final stage. Pass at least {_LEAST_PRODUCTS}.")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"{name}: seed is {seed}, expected a 64-bit integer.")
    if pairs is not None and not isinstance(pairs, (Eigenpairs, KrylovSpace)):
        raise ArgumentTypeError(f"{name}: pairs is a {type(pairs).__name__}, expected the Eigenpairs of a lanczos run on this operator.")
    if method == "krylov" and pairs is None:
        raise InputError(f"{name}: method 'krylov' needs pairs= of a lanczos run on the same operator. Pass them, or method='auto'.")


def trace(
    operator: SymmetricOperator,
    *,
    rtol: float = 0.01,
    atol: float | None = None,
    confidence: float = 0.95,
    method: str = "auto",
    max_products: int = 2000,
    pairs: Eigenpairs | KrylovSpace | None = None,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
    on_step: OnStep | None = None,
) -> Estimate:
    """tr H = tr(V H V') + tr(P H P): the first part exact on a known space, the second by random probes, to a stated tolerance.

    rtol, atol    half the interval is to be at most max(rtol |tr H|, atol); atol None is rtol ||H||_F, since a trace that
                  cancels cannot be had to a relative tolerance
    method        "hutchinson": probes alone (and `pairs`, where given); "hutch++": the space grows by images of probes, eight at a
                  time, at least once; "krylov": probes beside the space of `pairs`, which does not grow; "xtrace": every probe serves
                  the space of the others; "auto": the space grows by Krylov steps while they are seen to pay, and all n diagonal
                  entries are taken where that is cheaper or n <= 64
    max_products  products at most, those of checks included
    pairs         Eigenpairs of a lanczos run on this operator, or the KrylovSpace of one: the space that is known. One product tests
                  that they belong to this operator
    check         as in `lanczos`: 4 products that probe symmetry and repeatability
    ->            Estimate; cost n_matvec products, (space + 24) n elements of memory

    Not converged: NotConvergedWarning with `.partial`, or NotConvergedError if `strict`. Ctrl-C raises Interrupted, any other
    exception from inside carries `.partial` too. Raised: InputError, ArgumentTypeError, ShapeError, DtypeError, DeviceError,
    NonFiniteError, NotSymmetricError, NondeterministicOperatorError, StaleOperatorError.
    Sources: `hutchinson`, `aware`, `sketch`; how sizes and intervals are chosen: `stages`.
    """
    arguments = {"rtol": rtol, "atol": atol, "confidence": confidence, "method": method, "max_products": max_products, "seed": seed}
    check_arguments("trace", pairs=pairs, check=check, **arguments)  # type: ignore[arg-type]
    return _diagonal_quantity("trace", operator, arguments, pairs, strict, check, on_step, squares=False)


def frobenius(
    operator: SymmetricOperator,
    *,
    rtol: float = 0.01,
    confidence: float = 0.95,
    method: str = "auto",
    max_products: int = 2000,
    pairs: Eigenpairs | KrylovSpace | None = None,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
    on_step: OnStep | None = None,
) -> Estimate:
    """||H||_F, from ||H||_F^2 = 2 ||H V'||^2 - ||V H V'||^2 + E ||P H P z||^2; arguments as for `trace`, without "xtrace"."""
    arguments = {"rtol": rtol, "atol": 0.0, "confidence": confidence, "method": method, "max_products": max_products, "seed": seed}
    check_arguments("frobenius", pairs=pairs, check=check, **arguments)  # type: ignore[arg-type]
    if method == "xtrace":
        raise InputError("frobenius: method 'xtrace' estimates traces only. Pass 'auto', 'hutchinson', 'hutch++' or 'krylov'.")
    return _diagonal_quantity("frobenius", operator, arguments, pairs, strict, check, on_step, squares=True)


def trace_function(
    operator: SymmetricOperator,
    f: Function,
    *,
    rtol: float = 0.01,
    atol: float | None = None,
    confidence: float = 0.95,
    max_products: int = 5000,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
    on_step: OnStep | None = None,
    name: str = "trace_function",
    assembled: int = _SMALL,
    quadrature: type[Quadrature] = Quadrature,
) -> Estimate:
    """tr f(H) = E z'f(H)z by Lanczos quadrature of each probe; f maps eigenvalues, (m,) float64, to values of the same shape.

    Every probe costs the steps that its quadrature needs; the interval includes what the quadrature may miss. The matrix is
    assembled and decomposed for n <= `assembled`, and for n <= 2048 where the probes would cost more than n products. Other arguments, result
    and errors as for `trace`; InputError too where f is not finite.
    """
    arguments = {"rtol": rtol, "atol": atol, "confidence": confidence, "method": "auto", "max_products": max_products, "seed": seed}
    check_arguments(name, pairs=None, check=check, **arguments)  # type: ignore[arg-type]
    if not callable(f):
        raise ArgumentTypeError(f"{name}: f is a {type(f).__name__}, expected a function of a float64 tensor of eigenvalues.")
    products = Products(operator, name, shift=0)
    del arguments["method"]

    def run() -> Estimate:
        if operator.n <= assembled:
            return exact()
        steps = min(_STEPS, max_products // 24)
        sampler = quadrature(products, f, seed, rtol, atol or 0.0, steps)
        ours = Run(
            products,
            sampler,
            Target(rtol, atol, confidence),
            Budget(max_products, operator.n if operator.n <= _ASSEMBLED else None),
            power=False,
            on_step=on_step,
            settings=arguments,
        )
        state.append(ours)
        try:
            return ours()
        except Exact:
            return exact()

    def exact() -> Estimate:
        value, rounding = spectral_sum(products, f)
        return _exact(products, value, rounding, arguments, power=False)

    state: list[Run | Kept] = []
    return _guarded(name, products, check, seed, strict, run, state)


def logdet(operator: SymmetricOperator, *, shift: float, **arguments: Any) -> Estimate:
    """log det(H + c I) = tr log(H + c I) for c = `shift`; InputError names a Ritz value that c does not make positive."""
    if isinstance(shift, bool) or not isinstance(shift, (int, float)):
        raise ArgumentTypeError(f"logdet: shift is {shift!r}, a {type(shift).__name__}; expected a float.")
    if not math.isfinite(shift):
        raise InputError(f"logdet: shift is {shift}, expected a finite number.")
    return trace_function(operator, log_shifted(float(shift), "logdet"), name="logdet", **arguments)


def _diagonal_quantity(
    name: str,
    operator: SymmetricOperator,
    arguments: dict[str, Any],
    pairs: Eigenpairs | KrylovSpace | None,
    strict: bool,
    check: str,
    on_step: OnStep | None,
    *,
    squares: bool,
) -> Estimate:
    """tr H, or ||H||_F if `squares`."""
    products = Products(operator, name)
    method, seed = arguments["method"], arguments["seed"]
    state: list[Run | Kept] = []

    def run() -> Estimate:
        space = space_of(pairs, operator, name)
        if space.size or pairs is not None:
            check_space(space, products, seed)
            products.shift = products.unit
            space = space.scaled(-products.unit)
        if method == "auto" and operator.n <= _SMALL:
            return exact()
        budget = Budget(arguments["max_products"], operator.n if method in ("auto", "xtrace") else None)
        atol = arguments["atol"]
        target = Target(arguments["rtol"], atol and math.ldexp(atol, -products.unit), arguments["confidence"])
        sampler = Complement(products, space, seed, squares=squares)
        notes = (f"{space.size} dimensions of a Lanczos run enter exactly",) if space.size else ()
        try:
            if method == "xtrace":
                return xtrace_run(
                    products, space, target, budget, seed, arguments, notes, lambda e: state.__setitem__(slice(None), [Kept(e)])
                )
            ours = Run(
                products,
                sampler,
                target,
                budget,
                least=LEAST_SQUARES if squares else MIN_FINAL,
                root=squares,
                absorb={"auto": sampler.lengthen, "hutch++": sampler.absorb}.get(method),
                forced=method == "hutch++",
                on_step=on_step,
                notes=notes,
                settings=arguments,
            )
            state.append(ours)
            return ours()
        except Exact:
            return exact()

    def exact() -> Estimate:
        value, rounding = diagonal(products, squares=squares)
        return _exact(products, value, rounding, arguments)

    return _guarded(name, products, check, seed, strict, run, state)


def _guarded(
    name: str, products: Products, check: str, seed: int, strict: bool, run: Callable[[], Estimate], state: list[Run | Kept]
) -> Estimate:
    """Checks before, `run`, checks after; `state` holds the run, once there is one, for what ends it early."""
    operator = products.operator
    operator.check_unchanged()
    with keeping(name, lambda: state[0].partial() if state else None):
        if needs_probes(operator, check):
            probe(operator, seed, name)
            products.count += PROBE_PRODUCTS
        result = run()
    operator.check_unchanged()
    report_failure(name, result, strict)
    return result


def _exact(products: Products, value: float, rounding: float, arguments: dict[str, Any], *, power: bool = True) -> Estimate:
    """A result without chance."""
    operator = products.operator
    scale = products.unit if power else 0
    at = Interval(value, 0.0, value - rounding, value + rounding)
    return Estimate(
        value=math.ldexp(at.value, scale),
        stderr=0.0,
        interval=(math.ldexp(at.lo, scale), math.ldexp(at.hi, scale)),
        confidence=arguments["confidence"],
        samples=0,
        n_matvec=products.count,
        converged=True,
        notes=(*operator.notes, f"all {operator.n} unit vectors were multiplied: nothing is left to chance"),
        settings={**operator.settings, **arguments, "stages": 0, "absorbed_blocks": 0},
        provenance=operator.provenance,
    )


def _positive(name: str, argument: str, value: Any, *, zero: bool = False) -> None:
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name}: {argument} is {value!r}, a {type(value).__name__}; expected a float.")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise InputError(f"{name}: {argument} is {value}, expected a finite number > 0, such as 0.01.")
