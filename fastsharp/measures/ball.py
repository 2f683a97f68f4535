"""Where weights may move to: perturbations delta = D u with u in a ball of radius rho."""

from __future__ import annotations

from typing import final

import torch

from fastsharp.errors import InputError
from fastsharp.params import ParamLayout

SCALES = ("none", "adaptive", "layer", "filter")
NORMS = ("l2", "linf")


@final
class Ball:
    """{theta + D u}: D and the norm of u by `scale` and `norm`.

    scale "none"      D = 1,            ||u|| <= rho
          "adaptive"  D = diag|theta|,  ||u|| <= rho                   invariant under rescaling of single weights (Kwon et al. 2021)
          "layer"     D = ||w_g||,      ||u_g||_2 <= rho for each g    g: a module's own parameters
          "filter"    D = ||w_g||,      ||u_g||_2 <= rho for each g    g: a row of a weight; vectors stay as they are (Li et al. 2018)
    norm  "l2" or "linf"; groups take "l2"
    """

    def __init__(self, theta: torch.Tensor, layout: ParamLayout, rho: float, *, scale: str, norm: str) -> None:
        grouped = scale in ("layer", "filter")
        if grouped and norm != "l2":
            raise InputError(f"norm={norm!r} with scale={scale!r}: groups have a ball of their own in the l2 norm. Use norm='l2'.")
        self.rho, self.scale, self.norm, self.n = rho, scale, norm, len(theta)
        self._group = _groups(layout, scale).to(theta.device) if grouped else None
        self._count = 0 if self._group is None else int(self._group.max()) + 1
        if self._group is not None:
            if self._count < 1:
                raise InputError("scale='filter': no chosen parameter has rows, vectors are not perturbed. Use scale='layer'.")
            self._D = self._per_group(theta)
        else:
            self._D = theta.abs() if scale == "adaptive" else torch.ones((), dtype=theta.dtype, device=theta.device)

    def delta(self, u: torch.Tensor) -> torch.Tensor:
        """D u."""
        return self._D * u

    def pulled(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by u: D g."""
        return self._D * gradient

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        """argmax of u'g over the ball, divided by rho: the steepest step for this norm."""
        if self.norm == "linf":
            return g.sign()
        if self._group is not None:
            return g * _inverse(self._per_group(g))
        return g * _inverse(g.norm())

    def project(self, u: torch.Tensor) -> torch.Tensor:
        """The nearest point of the ball."""
        if self.norm == "linf":
            return u.clamp(-self.rho, self.rho)
        size = self._per_group(u) if self._group is not None else u.norm()
        return u * (self.rho * _inverse(size)).clamp(max=1.0)

    def on_sphere(self, z: torch.Tensor) -> torch.Tensor:
        """z scaled so that each group has norm rho; for balls without groups rho z / sqrt(n), whose length is about rho."""
        return self.rho * self.direction(z) if self._group is not None else (self.rho / self.n**0.5) * z

    @property
    def grouped(self) -> bool:
        """Whether each group has a ball of its own."""
        return self._group is not None

    def _per_group(self, v: torch.Tensor) -> torch.Tensor:
        """||v_g|| at every coordinate of g, 0 where a coordinate is in no group."""
        assert self._group is not None
        inside = self._group >= 0
        squares = torch.zeros(self._count, dtype=torch.float64, device=v.device)
        squares.index_add_(0, self._group[inside], v[inside].double().square())
        return torch.where(inside, squares.sqrt()[self._group.clamp_min(0)], 0.0).to(v.dtype)


def _inverse(size: torch.Tensor) -> torch.Tensor:
    """1 / size, 0 where size is 0."""
    return torch.where(size > 0, 1.0 / size, torch.zeros_like(size))


def _groups(layout: ParamLayout, scale: str) -> torch.Tensor:
    """The number of each coordinate's group (n,) int64, -1 for none."""
    group = torch.full((layout.n,), -1, dtype=torch.int64)
    modules: dict[str, int] = {}
    used = 0
    for name, shape, start, stop in zip(layout.names, layout.shapes, layout.offsets, layout.offsets[1:], strict=False):
        if scale == "layer":
            group[start:stop] = modules.setdefault(name.rpartition(".")[0], len(modules))
        elif len(shape) >= 2:
            rows = shape[0]
            group[start:stop] = torch.arange(used, used + rows).repeat_interleave((stop - start) // rows)
            used += rows
    return group
