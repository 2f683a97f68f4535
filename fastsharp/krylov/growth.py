"""Growth of the known space by Krylov steps: each takes one product and moves a part of ||B||_F^2, B = P H P, into what is exact.

The part is known when the step is done, from `KrylovSpace.squares`. N samples of tr B have an error of about sqrt(2 / N) ||B||_F, so that
a block of steps that moves a share s of ||B||_F^2 saves s N samples; steps go on while that is more than the products they take. A sketch
of images, as in Hutch++, takes two products a dimension, and its dimensions lie less well: after 30 Krylov steps on four trained
networks of 1,400 to 1,950 parameters the variance of Hutch++ with 192 products is matched with 0.45 to 0.55 of them this way, with 0.70 to
0.72 where images join the space, and with 1.2 to 2.1 where nothing does (pilots not counted; with them: bench/bench_trace.py). Source: Chen and Hallman 2023 (arXiv 2205.01736) grow the space likewise, to a size of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from fastsharp.krylov.stages import BLOCK, MIN_FINAL


def grow(block: Callable[[], float], samples: float, energy: float, left: float) -> tuple[bool, float]:
    """Blocks of BLOCK steps while they pay: whether the space has grown, and the energy that the last block moved.

    block    takes BLOCK steps and tells what ||B||_F^2 lost by them; 0 where there are none to take
    samples  that a final stage would need now
    energy   ||B||_F^2 now
    left     products that may still be taken, by the steps, a pilot and a final stage
    """
    grown, moved = False, 0.0
    while left >= 2 * BLOCK + MIN_FINAL:
        left -= BLOCK
        moved = block()
        if not moved > 0.0:
            break
        grown = True
        saved = samples * min(moved / energy, 1.0) if energy > 0.0 else 0.0
        if saved <= BLOCK:
            break
        samples, energy = samples - saved, energy - moved
    return grown, moved
