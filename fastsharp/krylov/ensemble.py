"""Eigenpairs of E symmetric matrices of one dimension by Lanczos runs in lockstep: one block product of all of them a step.

Each run is the one of `krylov.lanczos`: same start vector, recurrence, stop rule, verification, notes and messages. What leaves the plain
path goes on by itself, from its beginning, in `krylov.lanczos` on that one matrix: an invariant Krylov space, products far from one,
products that are not finite or not symmetric (the error is then that run's own, and names the member), a basis that is full. A member that
is finished takes part in no further product.

Memory: members run in groups, as many at once as have room for a basis that a typical run does not fill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fastsharp import rng
from fastsharp.errors import Interrupted, of_member
from fastsharp.krylov.basis import padded
from fastsharp.krylov.group import Group
from fastsharp.krylov.lanczos import MIX, mixed, report_failure, solve
from fastsharp.krylov.pairs import Found, assembled
from fastsharp.krylov.plan import Plan, comfortable_rows, make_plan
from fastsharp.krylov.request import Request, check_start
from fastsharp.krylov.stopping import StopRules, Targets, select
from fastsharp.krylov.symmetry import PROBE_PRODUCTS, needs_probes, probe
from fastsharp.operator import EnsembleOperator
from fastsharp.results import Eigenpairs

OnEnsembleStep = Callable[[int, tuple[float, ...], float], None]


def lanczos_ensemble(
    together: EnsembleOperator,
    request: Request,
    *,
    v0: torch.Tensor | None = None,
    memory: int | None = None,
    host_memory: int | None = None,
    on_step: OnEnsembleStep | None = None,
) -> list[Eigenpairs]:
    """A_e x_i = lambda_i x_i for e = 1..E: the k eigenpairs of each matrix that `krylov.lanczos` gives, in a list.

    together   multiplies by all of them, and knows each by itself: its notes, settings, provenance and layout go into the results
    request    from `check_arguments`
    v0         (n,), for all; as is the random start vector of the seed
    on_step    called after every step as on_step(products of all members so far, wanted values of one live member, most products)
    memory, host_memory: as in `krylov.lanczos`.

    Not converged: one NotConvergedWarning a member, or NotConvergedError if `strict`; both begin with "member e: ", as does every error
    that belongs to one. Ctrl-C raises Interrupted, whose `.partial` is a list with None for members that have no pairs yet.
    """
    if v0 is not None:
        check_start(together.member(0), v0)
    together.check_unchanged()
    run = _Run(together, request, v0, memory, host_memory, on_step)
    try:
        run.all()
    except KeyboardInterrupt as interrupt:
        message = (
            f"lanczos: interrupted after {run.n_matvec} products of {together.E} members; .partial holds the pairs so far, unverified."
        )
        raise Interrupted(message, run.so_far()) from interrupt
    together.check_unchanged()
    results = []
    for e in range(together.E):
        result, settled = run.results[e]
        report_failure(result, request, settled, f"member {e}: ")
        results.append(result)
    return results


class _Run:
    """One call: groups of members in lockstep, single runs for what leaves the path, and the results so far."""

    def __init__(
        self,
        together: EnsembleOperator,
        request: Request,
        v0: torch.Tensor | None,
        memory: int | None,
        host_memory: int | None,
        on_step: OnEnsembleStep | None,
    ) -> None:
        self.together, self.request, self.v0 = together, request, v0
        self.memory, self.host_memory, self.on_step = memory, host_memory, on_step
        self.results: dict[int, tuple[Eigenpairs, bool]] = {}
        self.n_matvec = 0
        self.probes = [0] * together.E
        self._found: dict[int, tuple[Found, bool]] = {}  # finished, not yet verified
        self._plan: Plan | None = None
        self._now: tuple[Group, list[int]] | None = None

    def all(self) -> None:
        """Results for every member."""
        request, E, n = self.request, self.together.E, self.together.n
        dtype, device = self.together.dtype, self.together.device
        typical = (comfortable_rows(request.k, request.max_iter) + 2 * request.k) * padded(n) * (torch.finfo(dtype).bits // 8)
        at_once = E if self.memory is None else min(E, self.memory // typical)
        if request.method == "dense" or at_once == 0:
            for e in range(E):
                self._single(e, request.check)
            return
        for e in range(E):
            if needs_probes(self.together.member(e), request.check):
                with of_member(e):
                    probe(self.together.member(e), request.seed, "lanczos")
                self.probes[e] = PROBE_PRODUCTS
        plan = make_plan(n, dtype, device, request, None if self.memory is None else self.memory // at_once, self.host_memory)
        self._plan = plan
        for first in range(0, E, at_once):
            members = list(range(first, min(E, first + at_once)))
            self._lockstep(members, plan)
            self._verify(plan)
        for e in range(E):
            if e not in self.results:
                self._single(e, "off" if not self.probes[e] else request.check)

    def so_far(self) -> list[Eigenpairs | None]:
        """Pairs of every member that has some, unverified where the run had not come to that."""
        if self._now is not None and self._plan is not None:
            group, members = self._now
            if group.live and group.size:
                runs, theta, S, _ = group.ritz()
                self._keep(group, members, list(range(len(runs))), theta, S, torch.zeros(len(runs), dtype=torch.bool))
        for e, (found, _) in self._found.items():
            assert self._plan is not None
            self.results[e] = assembled(found, self.request, self._plan, self.probes[e], None, settled=False), False
        return [self.results[e][0] if e in self.results else None for e in range(self.together.E)]

    def _single(self, e: int, check: str) -> None:
        """The run of `krylov.lanczos` on this member alone; what it warns of is said at the end, with the others."""
        request = replace(self.request, check=check)
        with of_member(e):
            self.results[e] = solve(self.together.member(e), request, v0=self.v0, memory=self.memory, host_memory=self.host_memory)

    def _lockstep(self, members: list[int], plan: Plan) -> None:
        """Steps until every run has stopped, left the path, or reached the last step."""
        request, n, dtype = self.request, self.together.n, self.together.dtype
        start = rng.normal(n, rng.generator(request.seed), dtype, self.together.device)
        start = start if self.v0 is None else mixed(self.v0, start)
        steps = min(request.max_iter, plan.rows - 1)
        group = Group(self.together, members, start.expand(len(members), n), steps)
        targets = Targets(request.tol, request.criterion, group.eps)
        rules = StopRules(len(members), request.k, request.which, targets, n, 1.0 if self.v0 is None else MIX)
        self._now = group, members
        before = self.n_matvec
        while group.live and group.size < steps:
            group.step()
            self.n_matvec = before + group.n_matvec
            if not group.live:
                break
            runs, theta, S, beta = group.ritz()
            residuals = beta[:, -1:] * S[:, -1].abs()
            norms = torch.tensor([group.norms[r] for r in runs], dtype=torch.float64)
            stop = rules(torch.tensor(runs), theta, residuals, beta.log().sum(1), norms)
            last = group.size == request.max_iter
            places = list(range(len(runs))) if last else stop.nonzero()[:, 0].tolist()
            self._keep(group, members, places, theta, S, stop)
            group.retire(places)
            if self.on_step is not None:
                wanted = theta[-1][select(theta[-1], request.which, request.k)]
                self.on_step(self.n_matvec, tuple(wanted.tolist()), float(request.max_iter * self.together.E))
        self._now = None

    def _keep(
        self, group: Group, members: list[int], places: list[int], theta: torch.Tensor, S: torch.Tensor, settled: torch.Tensor
    ) -> None:
        """Note the wanted pairs of runs that are over; their bases are not needed any more."""
        chosen = select(theta[places], self.request.which, self.request.k)
        for place, run, wanted, over in zip(places, group.runs(places), chosen, settled[places].tolist(), strict=True):
            e, block = members[run], group.blocks[run]
            found = Found(
                operator=self.together.member(e),
                theta=theta[place],
                estimates=block.beta[-1] * S[place, -1].abs(),
                chosen=wanted,
                X=group.vectors(place, S[place].T[wanted]),
                noise=0.0,
                eps=group.eps,
                norm=group.norms[run],
                shift=0,
                n_matvec=len(block.alpha),
                blocks=1,
                breakdowns=0,
                thick_restarts=0,
                second_passes=group.second_passes[run],
            )
            self._found[e] = found, over

    def _verify(self, plan: Plan) -> None:
        """One block product with the Ritz vectors of all runs that are over."""
        found = self._found
        if not found:
            return
        products: dict[int, torch.Tensor | None] = dict.fromkeys(found)
        if self.request.verify:
            sizes = [len(f.X) for f, _ in found.values()]
            member = torch.repeat_interleave(torch.tensor(list(found)), torch.tensor(sizes))
            Y = self.together.apply(torch.cat([f.X for f, _ in found.values()]), member)
            products = dict(zip(found, Y.split(sizes), strict=True))  # type: ignore[no-untyped-call]
        for e, (f, settled) in found.items():
            self.results[e] = assembled(f, self.request, plan, self.probes[e], products[e], settled=settled), settled
        self._found = {}
