"""Lanczos runs of some members of an ensemble in lockstep, with the Ritz values of all of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastsharp import ops
from fastsharp.errors import NonFiniteError, NotSymmetricError
from fastsharp.krylov.batch import Lockstep
from fastsharp.krylov.rows import exponent, normalise_rows
from fastsharp.krylov.tridiagonal import SAFE_EXPONENT
from fastsharp.operator import EnsembleOperator


class Group(Lockstep):
    """Runs of some members; a run that leaves the plain path is closed, and is in `alone`."""

    def __init__(self, together: EnsembleOperator, members: Sequence[int], starts: torch.Tensor, steps: int) -> None:
        super().__init__(starts, steps)
        self._together, self._members = together, torch.tensor(members)
        self.alone: set[int] = set()

    def _multiply(self, V: torch.Tensor, runs: list[int], w: torch.Tensor) -> None:
        self._together.apply(V, self._members[runs], out=w)
        if self.size == 0:
            sizes = w.abs().amax(1).tolist()
            self.alone |= {r for r, s in zip(runs, sizes, strict=True) if math.isfinite(s) and abs(exponent(s)) > SAFE_EXPONENT[w.dtype]}

    def _fault(self, run: int | None, error: NonFiniteError | NotSymmetricError) -> None:
        if run is None:
            raise error
        self.alone.add(run)

    def _given_up(self, run: int) -> bool:
        return run in self.alone

    def ritz(self) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
        """The live runs, their Ritz values and vectors (a, m), (a, m, m) with vectors as columns, and all beta (a, m)."""
        runs = self._slots[: self._live]
        alpha = torch.tensor([self.blocks[r].alpha for r in runs], dtype=torch.float64)
        beta = torch.tensor([self.blocks[r].beta for r in runs], dtype=torch.float64)
        T = torch.diag_embed(alpha)
        T.diagonal(-1, 1, 2).copy_(beta[:, :-1])
        theta, S = torch.linalg.eigh(T)
        for r, largest in zip(runs, theta.abs().amax(1).tolist(), strict=True):
            self.norms[r] = max(self.norms[r], largest)
        return runs, theta, S, beta

    def runs(self, places: list[int]) -> list[int]:
        """The runs at these places."""
        return [self._slots[place] for place in places]

    def vectors(self, place: int, S: torch.Tensor) -> torch.Tensor:
        """Ritz vectors S V (k, n) of the run at this place, for rows S (k, m)."""
        X = torch.empty((S.shape[0], self.n), dtype=self._w.dtype, device=self._w.device)
        return normalise_rows(ops.combine(S.to(X.device).contiguous(), self._V[place, : S.shape[1], : self.n], out=X))

    def retire(self, places: list[int]) -> None:
        """No further products for the runs at these places."""
        self._retire(places, self.size + 1)
