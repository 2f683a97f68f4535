"""The loss along lines and on a plane through the weights."""

from __future__ import annotations

import math

import torch

from fastsharp.errors import Interrupted, NonFiniteError
from fastsharp.measures.ball import Ball
from fastsharp.measures.landscape import Landscape
from fastsharp.params import ParamLayout
from fastsharp.results.report import Landscape2D
from fastsharp.rng import generator, normal

POINTS = 21  # on a line, odd: the weights themselves are in the middle
_ELEMENTS = 1 << 22  # of the displaced weights held at once
_RISE = 1.0  # of the loss's own size, at the ends of a line by the top eigenvector's parabola


def around(
    landscape: Landscape, layout: ParamLayout, values: torch.Tensor, vectors: torch.Tensor, gradient: torch.Tensor, *, grid: int, seed: int
) -> Landscape2D:
    """L along eigenvectors x_i (k, n), and on a plane of grid x grid points (0: none).

    Lines reach to where the largest parabola lambda s^2 / 2 has risen by max(L, 0.1). The plane's directions are normal vectors, each row of a
    weight scaled to the norm of its weights, vectors left out; coordinates from -1 to 1 (Li et al. 2018).
    Raises NonFiniteError where the loss is not finite that far out, Interrupted on Ctrl-C; both carry the lines so far as `.partial`.
    """
    loss = landscape.loss()
    top = max(float(values.abs().max()), torch.finfo(torch.float32).tiny)
    reach = math.sqrt(2 * _RISE * max(abs(loss), 0.1) / top)
    steps = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    slopes = (vectors.double() @ gradient.double()).cpu()
    axis, plane = torch.empty(0, dtype=torch.float64), torch.empty(0, 0, dtype=torch.float64)
    lines: list[torch.Tensor] = []

    def drawn() -> Landscape2D:
        k = len(lines)
        return Landscape2D(loss, steps, torch.stack(lines), values.double().cpu()[:k], slopes[:k], axis, plane)

    try:
        for x in vectors:
            lines.append(_changes(landscape, x, torch.zeros_like(x), steps))
        if grid:
            a, b = _plane_directions(landscape, layout, seed)
            across = torch.linspace(-1, 1, grid, dtype=torch.float64)
            rows = [_changes(landscape, b, float(s) * a, across) for s in across]
            axis, plane = across, torch.stack(rows)
    except (KeyboardInterrupt, NonFiniteError) as e:
        partial = drawn() if lines else None
        if isinstance(e, NonFiniteError):
            e.__dict__["partial"] = partial
            raise
        raise Interrupted(f"interrupted after {len(lines)} of {len(vectors)} lines.", partial) from e
    return drawn()


def _plane_directions(landscape: Landscape, layout: ParamLayout, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two normal vectors, each row of a weight scaled to the norm of its weights."""
    ball = Ball(landscape.theta, layout, 1.0, scale="filter", norm="l2")
    random = generator(seed)

    def one() -> torch.Tensor:
        return ball.delta(ball.on_sphere(normal(layout.n, random, landscape.theta.dtype, landscape.theta.device)))

    return one(), one()


def _changes(landscape: Landscape, x: torch.Tensor, start: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """L(theta + start + s x) - L(theta) for each s; as many weights at once as take no more room than a few models."""
    size = max(1, _ELEMENTS // len(landscape.theta))
    return torch.cat([landscape.changes(start + s[:, None].to(x.device, x.dtype) * x) for s in at.split(size)])  # type: ignore[no-untyped-call]
