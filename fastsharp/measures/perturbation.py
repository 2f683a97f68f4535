"""Sharpness by perturbing weights: average over random directions, or the worst found by projected ascent.

Every number is a difference of two losses on the same frozen data, so shuffling and augmentation cannot enter. What is left is rounding:
`noise_floor` is what the measure gives for steps of one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastsharp.errors import InputError, Interrupted
from fastsharp.measures.ball import NORMS, SCALES, Ball
from fastsharp.measures.landscape import Landscape, Part
from fastsharp.quantiles import student
from fastsharp.results.sharpness import Sharpness
from fastsharp.rng import generator, normal

KINDS = ("sam", "average", "worst", "ascent")
_FLOOR_DRAWS = 8
_MOMENTUM = 0.75  # of the ascent, as in APGD (Croce and Hein 2020)
_CHUNK_ELEMENTS = 1 << 24  # of the directions held at once

OnStep = Callable[[int, Any, Any], None]


def check_arguments(*, kind: str, rho: float, directions: int, norm: str, scale: str, m: int | None, steps: int, confidence: float) -> None:
    """InputError for the first argument that makes no sense, by name."""
    for name, value, choices in (("kind", kind, KINDS), ("norm", norm, NORMS), ("scale", scale, SCALES)):
        if value not in choices:
            raise InputError(f"sharpness: {name}={value!r} is none of {', '.join(map(repr, choices))}.")
    if not (isinstance(rho, (int, float)) and not isinstance(rho, bool) and 0.0 < rho < math.inf):
        raise InputError(f"sharpness: rho={rho!r}, expected a positive number: the radius of the perturbation.")
    for name, count, least in (("directions", directions, 6), ("steps", steps, 1), ("m", m, 1)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise InputError(f"sharpness: {name}={count!r}, expected an integer of at least {least}.")
    if not 0.0 < confidence < 1.0:
        raise InputError(f"sharpness: confidence={confidence!r}, expected a number between 0 and 1.")
    if kind == "sam" and norm != "l2":
        raise InputError("sharpness: kind='sam' moves by rho in the l2 norm. Use kind='average' for norm='linf'.")
    if m is not None and kind in ("sam", "average"):
        raise InputError(f"sharpness: m= is the size of the parts that kind='worst' ascends on, kind={kind!r} is an average over all data.")


def random_sharpness(
    landscape: Landscape, ball: Ball, *, kind: str, directions: int, confidence: float, seed: int, on_step: OnStep
) -> Sharpness:
    """mean_k f(L(theta + D u_k) - L(theta)) over random u_k: |.| / rho for "sam", the signed change for "average"."""
    random = generator(seed)
    changes: list[float] = []
    size = max(1, min(32, _CHUNK_ELEMENTS // ball.n))
    try:
        while len(changes) < directions:
            rows = [ball.delta(_random(ball, kind, random, landscape.theta)) for _ in range(min(size, directions - len(changes)))]
            changes += landscape.changes(torch.stack(rows)).tolist()
            on_step(len(changes), _values(changes, kind, ball.rho)[-1:], directions)
        floor = noise_floor(landscape, seed) / (ball.rho if kind == "sam" else 1.0)
    except KeyboardInterrupt as e:
        partial = _of_directions(changes, landscape, ball, kind, confidence, math.nan) if len(changes) > 1 else None
        raise Interrupted(f"interrupted after {len(changes)} of {directions} directions.", partial) from e
    return _of_directions(changes, landscape, ball, kind, confidence, floor)


def noise_floor(landscape: Landscape, seed: int) -> float:
    """rms of L(theta (1 + eps s)) - L(theta) over random signs s: changes this small are rounding, whatever the landscape."""
    if seed in landscape.floors:
        return landscape.floors[seed]
    eps = torch.finfo(landscape.theta.dtype).eps
    random = generator(seed + 1)
    rows = [normal(len(landscape.theta), random, landscape.theta.dtype, landscape.theta.device).sign() for _ in range(_FLOOR_DRAWS)]
    changes = landscape.changes(torch.stack([eps * landscape.theta.abs() * row for row in rows]))
    landscape.floors[seed] = float(changes.square().mean().sqrt())
    return landscape.floors[seed]


def worst_sharpness(
    landscape: Landscape, ball: Ball, *, kind: str, m: int | None, steps: int, confidence: float, seed: int, on_step: OnStep
) -> Sharpness:
    """max of L(theta + D u) - L(theta) over the ball by projected ascent, a lower bound; with m the mean of it over parts of m samples.

    kind "ascent": one step along the gradient to the sphere, what the SAM optimiser sees.
    """
    found: list[float] = []
    weights: list[float] = []
    parts: list[Part | None] = [None] if m is None else list(landscape.parts(m))
    try:
        for number, part in enumerate(parts):
            of = None if part is None else [part]
            weight = 1.0 if part is None else landscape.weight(part)
            if weight == 0.0:
                continue  # nothing but ignored labels
            if kind == "ascent":
                found.append(_one_step(landscape, ball, of))
            else:
                found.append(_ascend(landscape, ball, of, steps, seed))
            weights.append(weight)
            on_step(number + 1, found[-1:], len(parts))
    except KeyboardInterrupt as e:
        partial = _of_parts(found, weights, landscape, ball, kind, m, steps, confidence, math.nan) if found and m is not None else None
        raise Interrupted(f"interrupted after {len(found)} of {len(parts)} parts.", partial) from e
    return _of_parts(found, weights, landscape, ball, kind, m, steps, confidence, noise_floor(landscape, seed))


def _one_step(landscape: Landscape, ball: Ball, of: list[Part] | None) -> float:
    g = landscape.gradient() if of is None else landscape.ascent(torch.zeros_like(landscape.theta), of)[1]
    u = ball.rho * ball.direction(ball.pulled(g))
    return float(landscape.changes(ball.delta(u)[None], of)[0])


def _ascend(landscape: Landscape, ball: Ball, of: list[Part] | None, steps: int, seed: int) -> float:
    """Projected ascent with momentum from a random point; the step is halved where it brings nothing."""
    start = ball.on_sphere(normal(ball.n, generator(seed), landscape.theta.dtype, landscape.theta.device))
    u = ball.project(0.5 * start)
    before, step = u, 2.0 * ball.rho
    best, best_u, best_g = -math.inf, u, u
    stalled = 0
    for _ in range(steps):
        change, g = landscape.ascent(ball.delta(u), of)
        if change > best:
            best, best_u, best_g, stalled = change, u, g, 0
        else:
            stalled += 1
            if stalled >= 2:
                step, u, before, g, stalled = step / 2, best_u, best_u, best_g, 0
        z = ball.project(u + step * ball.direction(ball.pulled(g)))
        u, before = ball.project(u + _MOMENTUM * (z - u) + (1.0 - _MOMENTUM) * (u - before)), u
    last = float(landscape.changes(ball.delta(u)[None], of)[0])
    return max(best, last, 0.0)  # theta itself is in the ball


def _random(ball: Ball, kind: str, random: torch.Generator, theta: torch.Tensor) -> torch.Tensor:
    """One random u: on the sphere of radius about rho ("sam", groups), else each coordinate with the standard deviation or bound rho."""
    if ball.norm == "linf":
        z = torch.rand(ball.n, generator=random, dtype=torch.float32).to(theta.device, theta.dtype)
        return ball.rho * (2.0 * z - 1.0)
    z = normal(ball.n, random, theta.dtype, theta.device)
    return ball.on_sphere(z) if kind == "sam" or ball.grouped else ball.rho * z


def _values(changes: list[float], kind: str, rho: float) -> list[float]:
    return [abs(c) / rho for c in changes] if kind == "sam" else changes


def _of_directions(changes: list[float], landscape: Landscape, ball: Ball, kind: str, confidence: float, floor: float) -> Sharpness:
    values = torch.tensor(_values(changes, kind, ball.rho), dtype=torch.float64)
    value, stderr = float(values.mean()), float(values.std()) / len(values) ** 0.5
    half = student((1 + confidence) / 2, len(values) - 1) * stderr
    settings = {"kind": kind, "rho": ball.rho, "norm": ball.norm, "scale": ball.scale, "directions": len(values)}
    return _result(value, stderr, half, confidence, len(values), changes, floor, landscape, settings, [])


def _of_parts(
    found: list[float],
    weights: list[float],
    landscape: Landscape,
    ball: Ball,
    kind: str,
    m: int | None,
    steps: int,
    confidence: float,
    floor: float,
) -> Sharpness:
    each, share = torch.tensor(found, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    share /= share.sum()
    value = float(each @ share)
    stderr = half = 0.0
    if len(each) > 1:
        # of a weighted mean of independent parts
        n = len(each)
        stderr = float((share.square() @ (each - value).square()).sqrt() * math.sqrt(n / (n - 1)))
        half = student((1 + confidence) / 2, n - 1) * stderr
    notes = []
    if kind == "worst":
        notes.append(f"a lower bound on the maximum: the largest change found by {steps} steps of projected ascent")
    if 1 < len(each) < 6:
        notes.append(f"the interval rests on {len(each)} parts and is rough")
    settings = {"kind": kind, "rho": ball.rho, "norm": ball.norm, "scale": ball.scale, "m": m, "steps": steps if kind == "worst" else 1}
    return _result(value, stderr, half, confidence, len(each) if m else 0, found, floor, landscape, settings, notes)


def _result(
    value: float,
    stderr: float,
    half: float,
    confidence: float,
    samples: int,
    changes: list[float],
    floor: float,
    landscape: Landscape,
    settings: dict[str, Any],
    notes: list[str],
) -> Sharpness:
    objective = landscape.objective
    if value < 10 * floor:
        notes.append(f"within ten times the rounding of the losses ({floor:.1e}): model.double() or a larger rho gives more digits")
    return Sharpness(
        value=value,
        stderr=stderr,
        interval=(value - half, value + half),
        confidence=confidence,
        samples=samples,
        n_matvec=0,
        converged=True,
        notes=(*notes, *objective.notes()),
        settings={**settings, "stacked": landscape.stacked, "reduction": objective.reduction},
        provenance=objective.provenance(),
        noise_floor=floor,
        changes=torch.tensor(changes, dtype=torch.float64),
        passes=landscape.passes,
    )
