"""Eigenpairs of a symmetric operator by Lanczos: drive the recurrence, stop, verify, and say what is known."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch

from fastsharp import rng
from fastsharp.errors import Interrupted, NotConvergedError, NotConvergedWarning, NotSymmetricError, StaleOperatorError, stacklevel
from fastsharp.krylov.dense import dense
from fastsharp.krylov.pairs import pairs
from fastsharp.krylov.plan import Plan, make_plan
from fastsharp.krylov.request import Request, check_start
from fastsharp.krylov.request import check_arguments as check_arguments
from fastsharp.krylov.rows import normalised
from fastsharp.krylov.stopping import StopRule, Targets, select
from fastsharp.krylov.symmetry import PROBE_PRODUCTS, needs_probes, probe
from fastsharp.krylov.tridiagonal import Tridiagonal
from fastsharp.operator import SymmetricOperator
from fastsharp.results import Eigenpairs

OnStep = Callable[[int, tuple[float, ...], float], None]

MIX = 0.1  # random part of a given start vector, see `lanczos`


def lanczos(
    operator: SymmetricOperator,
    *,
    k: int = 5,
    which: str = "LA",
    tol: float = 1e-3,
    criterion: str = "residual",
    max_iter: int | None = None,
    method: str = "auto",
    verify: bool = True,
    v0: torch.Tensor | None = None,
    seed: int = 0,
    strict: bool = False,
    check: str = "auto",
    memory: int | None = None,
    host_memory: int | None = None,
    on_step: OnStep | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Eigenpairs:
    """k eigenpairs A x_i = lambda_i x_i at the end of the spectrum that `which` names, from A V' = V' T + r e_m'.

    which      "LA" largest, "SA" smallest, "LM" largest modulus, "BE" both ends (the odd one from the top)
    tol        relative to |lambda|: of ||Ax - lambda x|| (criterion "residual") or of min(r, r^2/gap) (criterion "value");
               a pair also counts as converged at the rounding floor 32 eps ||A||, and a note says so
    max_iter   most Krylov products; None is min(n, max(20 k, 300))
    method     "lanczos", "dense" (n products, float64 LAPACK), or "auto": dense for n <= max(64, 2k)
    verify     one block product A X (k matvecs) gives Rayleigh quotients and true residuals; False reports estimates
    v0         (n,) start vector in the operator's dtype and device. A random vector of a tenth of its length is added, since an
               eigenvector orthogonal to v0 would otherwise stay invisible while everything else converges
    check      "auto" probes the symmetry of every operator but a DenseOperator (4 matvecs), "on" of all, "off" of none
    memory     bytes for the basis and the Ritz vectors: see `krylov.plan`; None is no limit. `host_memory`: bytes left beside them
    on_plan    called with the Plan before the first product
    on_step    called after every product as on_step(step, values, expected): products so far, the wanted Ritz values (at most k,
               in result order), and the products expected in all (max_iter while there is no trend). What it raises ends the run
    ->         Eigenpairs; cost: n_matvec + n_verify + settings["probe_products"] matvecs, (n_matvec + 1 + 2 k) n elements of memory, or
               what `memory` allows

    Not converged: NotConvergedWarning with `.partial`, or NotConvergedError if `strict`. Ctrl-C raises Interrupted, whose
    `.partial` holds min(k, steps) unverified pairs (None before the first step); any other exception from inside the run except
    NotSymmetricError and StaleOperatorError gets the same as its attribute `.partial`. Also raised: InputError, ArgumentTypeError,
    NonFiniteError, NotSymmetricError, NondeterministicOperatorError.

    Not promised: all copies of a multiple eigenvalue, and that no eigenvalue is missing from the list (`krylov.stopping`).
    Sources: Parlett 1998, section 13; stop rule and numerical properties in `stopping` and `tridiagonal`.
    """
    request = check_arguments(
        operator.n,
        k=k,
        which=which,
        tol=tol,
        criterion=criterion,
        max_iter=max_iter,
        method=method,
        verify=verify,
        seed=seed,
        strict=strict,
        check=check,
    )
    result, settled = solve(operator, request, v0=v0, memory=memory, host_memory=host_memory, on_step=on_step, on_plan=on_plan)
    report_failure(result, request, settled)
    return result


def solve(
    operator: SymmetricOperator,
    request: Request,
    *,
    v0: torch.Tensor | None = None,
    memory: int | None = None,
    host_memory: int | None = None,
    on_step: OnStep | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> tuple[Eigenpairs, bool]:
    """The run of `lanczos` for checked arguments, and whether its list settled; says nothing of pairs that did not converge."""
    if v0 is not None:
        check_start(operator, v0)
    operator.check_unchanged()
    if request.method == "dense":
        with no_pairs_yet():
            result, settled = dense(operator, request), True
    else:
        probed = needs_probes(operator, request.check)
        if probed:
            with no_pairs_yet():
                probe(operator, request.seed, "lanczos")
        plan = make_plan(operator.n, operator.dtype, operator.device, request, memory, host_memory)
        if on_plan is not None:
            on_plan(plan)
        result, settled = _iterate(operator, request, plan, v0, PROBE_PRODUCTS if probed else 0, on_step)
    operator.check_unchanged()
    return result, settled


def _iterate(
    operator: SymmetricOperator, request: Request, plan: Plan, v0: torch.Tensor | None, probes: int, on_step: OnStep | None
) -> tuple[Eigenpairs, bool]:
    """Krylov steps until the stop rule or max_iter, then verification; whatever ends it early leaves the pairs so far."""
    state, randomness = begin(operator, request, plan, v0)
    targets = Targets(request.tol, request.criterion, state.eps)
    rule = StopRule(request.k, request.which, targets, operator.n, randomness=randomness)

    def so_far() -> Eigenpairs | None:
        return pairs(state, request, plan, probes, verify=False, settled=False) if state.size else None

    try:
        settled = False
        while not settled and state.n_matvec < request.max_iter:
            state.step()
            settled = rule(*state.ritz(), state.blocks, state.norm)
            if on_step is not None:
                values = tuple(math.ldexp(t, state.shift or 0) for t in rule.values)
                on_step(state.n_matvec, values, rule.expected(state.n_matvec, request.max_iter))
        return pairs(state, request, plan, probes, verify=request.verify, settled=settled), settled
    except KeyboardInterrupt as interrupt:  # a second one, while the partial result is assembled, passes through
        message = f"lanczos: interrupted after {state.n_matvec} products; .partial holds the pairs so far, unverified."
        raise Interrupted(message, so_far()) from interrupt
    except (NotSymmetricError, StaleOperatorError):  # there is no one matrix that the pairs would belong to
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            error.__dict__["partial"] = so_far()
        raise


@contextlib.contextmanager
def no_pairs_yet() -> Iterator[None]:
    """What ends the work in here has `.partial` None."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted("lanczos: interrupted before there were any pairs.", None) from interrupt
    except (NotSymmetricError, StaleOperatorError):
        raise
    except Exception as error:
        with contextlib.suppress(Exception):
            error.__dict__["partial"] = None
        raise


def begin(operator: SymmetricOperator, request: Request, plan: Plan, v0: torch.Tensor | None) -> tuple[Tridiagonal, float]:
    """A run that has taken no product yet, on the planned basis, and the random part of its start vector."""
    g = rng.generator(request.seed)

    def draw() -> torch.Tensor:
        return rng.normal(operator.n, g, operator.dtype, operator.device)

    basis = plan.basis(operator.n, operator.dtype, operator.device)
    start = draw() if v0 is None else mixed(v0, draw())
    state = Tridiagonal(operator, start, draw, basis, lambda theta: select(theta, request.which, plan.kept))
    return state, 1.0 if v0 is None else MIX


def mixed(v0: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """v0 / ||v0|| + 0.1 z / ||z||."""
    return normalised(v0) + MIX * normalised(z)


def report_failure(result: Eigenpairs, request: Request, settled: bool, whose: str = "") -> None:
    """Warn or raise if a pair missed its tolerance, or if the run ended before the list of wanted values settled.

    whose   what the message begins with, where there are several runs
    """
    good = int(result.converged.sum())
    if settled and good == request.k:
        return
    worst = int((result.residuals / result.eigenvalues.abs().clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    message = (
        f"{whose}lanczos: {good} of {request.k} pairs converged to tol = {request.tol:g} ({request.criterion}) in {result.n_matvec} products; "
        f"worst residual {float(result.residuals[worst]):.2g} at eigenvalue {float(result.eigenvalues[worst]):.6g}.\n"
    )
    if good == request.k:
        message += "The list had not settled: a wanted eigenvalue may be missing from it.\n"
    if settled:
        message += f"The precision of {str(result.eigenvectors.dtype).removeprefix('torch.')} is reached: raise tol, or use float64."
    else:
        message += f"Raise max_iter (now {request.max_iter}) or tol."
    if request.strict:
        raise NotConvergedError(message, result)
    warnings.warn(NotConvergedWarning(message, result), stacklevel=stacklevel())
