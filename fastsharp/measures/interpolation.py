"""The loss on the line between two checkpoints, L((1 - t) a + t b), and its barrier.

All parameters lie on the line. So do floating-point buffers (statistics of BatchNorm) for t in [0, 1]; beyond an end they stay as they are
there, since an extrapolated variance may be negative. Other buffers have to be the same in both.

Source: Frankle, Dziugaite, Roy, Carbin, "Linear mode connectivity and the lottery ticket hypothesis" (ICML 2020); the barrier above the straight
line between both losses is that of Entezari et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsharp.errors import InputError
from fastsharp.objective import Objective
from fastsharp.swap import with_weights

FIRST, LAST = -0.25, 1.25


def grid(points: int) -> torch.Tensor:
    """t (q,) float64 from FIRST to LAST, both 0 and 1 among them."""
    even = torch.linspace(FIRST, LAST, points, dtype=torch.float64).tolist()
    return torch.tensor(sorted({0.0, 1.0, *(round(s, 12) for s in even)}), dtype=torch.float64)  # -0.25 + 25 * 0.05 is not 1


def losses(objective: Objective, b: nn.Module, t: torch.Tensor, on_point: Callable[[int], None]) -> torch.Tensor:
    """L((1 - t) a + t b) (q,) float64, a the model of the objective; not finite where the loss is not."""
    parameters, buffers = _ends(objective.model, b)
    found = []
    for number, s in enumerate(t.tolist()):
        inside = min(max(s, 0.0), 1.0)
        weights = {name: torch.lerp(x, y, s) for name, (x, y) in parameters.items()}
        weights |= {name: torch.lerp(x, y, inside) for name, (x, y) in buffers.items()}
        found.append(_loss(objective, weights))
        on_point(number + 1)
    return torch.tensor(found, dtype=torch.float64)


def barrier(t: torch.Tensor, losses: torch.Tensor) -> tuple[float, float]:
    """(max over t in [0, 1] of L(t) - (1 - t) L(0) - t L(1), its t): at least 0, and no more than the points show."""
    inside = (t >= 0) & (t <= 1)
    s, height = t[inside], losses[inside]
    above = height - (1 - s) * height[0] - s * height[-1]
    above = torch.where(above.isnan(), torch.inf, above)
    at = int(above.argmax())
    return float(above[at]), float(s[at])


def _loss(objective: Objective, weights: dict[str, torch.Tensor]) -> float:
    total = count = 0.0
    with objective.quiet():
        for index, batch in objective.batches:
            with torch.no_grad():  # inside: reading a stream switches gradients on
                value = with_weights(objective.model, weights, partial(objective.evaluate_unchecked, index, batch))
            total, count = total + value.scale * float(value.loss.double()), count + (value.count or 0.0)
    if objective.reduction == "sum":
        return total
    return total / count if count else float("nan")


Ends = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _ends(a: nn.Module, b: nn.Module) -> tuple[Ends, Ends]:
    """{name: (in a, in b)} of all parameters, and of the floating-point buffers."""
    of_b = dict(b.named_parameters()) | dict(b.named_buffers())
    parameters = {name: (p.detach(), of_b[name].detach()) for name, p in a.named_parameters()}
    counters = {f"{name}.num_batches_tracked".lstrip(".") for name, m in a.named_modules() if isinstance(m, _BatchNorm)}
    buffers: Ends = {}
    for name, x in a.named_buffers():
        if x.is_floating_point():
            buffers[name] = (x, of_b[name])
        elif name not in counters and not torch.equal(x, of_b[name]):
            raise InputError(
                f"compare: the buffer {name!r} ({x.dtype}) differs between a and b, and there is nothing between two such values.\n"
                "Give both checkpoints the same."
            )
    return parameters, buffers
