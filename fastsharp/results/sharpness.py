"""Sharpness: the change of the loss under perturbations of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastsharp.results.estimate import Estimate


@dataclass(frozen=True, eq=False)
class Sharpness(Estimate):
    """An estimate from changes L(theta + delta) - L(theta); `float(result)` is the measure, `changes` what it was made of.

    The interval speaks of the directions (or of the parts of m samples), not of the choice of the data.
    """

    noise_floor: float = float("nan")  # the measure of a step by one unit in the last place: below it nothing can be seen
    changes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))  # signed, by direction or part
    passes: float = 0.0  # evaluations of the whole data; a gradient counts as three

    @property
    def signed(self) -> float:
        """The mean change with its sign; to second order rho^2 tr H / 2n for isotropic steps of length rho."""
        return float(self.changes.mean())
