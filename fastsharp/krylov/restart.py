"""Thick restart: the basis shrinks to the Ritz vectors that matter, and the Krylov space goes on from there.

    A X' = X' diag(theta) + w s',   s_i = beta_m S_{m,i},   w the next Lanczos vector

so the kept Ritz vectors X = S V and w are a Krylov basis again, with an arrowhead in T (`block`). What is kept: the wanted values and
their neighbours towards the rest of the spectrum, half of the rows or a few more than wanted (`plan`), so that the space continues
to grow where it is needed.

Locking. A kept pair whose s_i is below 8 eps ||T|| is an eigenpair to working precision: its coupling is dropped, and it stays in the
basis, where reorthogonalisation keeps everything else away from it.
Note on numerical properties: S V is summed in float64 and rounded once, so that the relation above holds to eps ||A|| (for float16
rows to 2^-11 ||A||, which `verify` sees). The part of A w along X is removed before the dots, as alpha and beta are.
Source: Wu & Simon 2000; the choice of half the rows is that of Krylov-Schur codes (Stewart 2002; Hernandez, Roman, Tomas & Vidal 2007).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from fastsharp.krylov.basis import Basis
from fastsharp.krylov.block import Block

_LOCKED = 8.0  # units of eps ||T||

Keep = Callable[[torch.Tensor], torch.Tensor]


def compress(basis: Basis, blocks: list[Block], keep: Keep, eps: float, norm: float) -> list[Block]:
    """Shrink the basis to the l Ritz vectors that keep(theta) names by position; returns the blocks that describe it.

    Row number l is then the next Lanczos vector. Costs one pass over the basis and no matvec. Closed blocks become one closed
    block of kept values: their space stays invariant. A Ctrl-C during the pass is delivered when it is over.
    """
    theta = torch.cat([block.solve()[0] for block in blocks])
    chosen = set(keep(theta).tolist())
    S = torch.zeros(len(chosen), sum(block.size for block in blocks), dtype=torch.float64)
    closed, opened = Block(0, closed=True), Block(0)
    row = 0
    for block in blocks:
        values, vectors = block.solve()
        residuals = block.residuals()
        target = closed if block.closed else opened
        if not block.closed:
            opened.start, opened.origin, opened.past = row, block.complement_of, [*block.past, block.epoch()]
        for i in range(block.size):
            if block.start + i not in chosen:
                continue
            S[row, block.start : block.start + block.size] = vectors[i]
            signed = float(residuals[i]) if vectors[i, -1] >= 0 else -float(residuals[i])
            locked = abs(signed) <= _LOCKED * eps * norm
            target.head.append(float(values[i]))
            target.coupling.append(0.0 if locked and not block.closed else signed)
            row += 1
    with _uninterrupted():
        basis.compress(S)
        blocks[:] = [*([closed] if closed.head else []), *([] if blocks[-1].closed else [opened])]
    return blocks


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: rows half overwritten would leave nothing to return. Other threads never get signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before: Any = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending and callable(before):
            before(*pending[-1])
