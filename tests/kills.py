"""Kills at random moments, in a process of its own: `python -m tests.kills FOLDER CALL ROUNDS [CALL ROUNDS ...]` prints what was found.

The output is one JSON object, for each CALL of "lanczos", "density", "trace" and "spectrum" what happened to it.

A process that has started threads must not be forked, so pytest's own is not. Each child runs the same small problem on the log of its
round, counts its finished products in shared memory, and is killed a random time after a random one of them. Two kills a round, then a
child that is left alone. A product is one call of the operator, of however many vectors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastsharp
from fastsharp.operator import SymmetricOperator
from fastsharp.store import Log

N, KILLS = 2000, 2
DELAY = 4e-3  # seconds at most from a finished product to the kill: about two steps


class Counted(SymmetricOperator):
    """A diagonal with five outliers plus u u' in float32; the number of finished calls lies in shared memory."""

    def __init__(self, shared: mmap.mmap) -> None:
        super().__init__(N, torch.float32, torch.device("cpu"))
        g = torch.Generator().manual_seed(3)
        self._d, self._u = torch.rand(N, generator=g), torch.randn(N, generator=g) / N**0.5
        self._d[:5] = torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])
        self._shared = shared

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(V, self._d, out=out)
        out += (V @ self._u)[:, None] * self._u
        self._shared[:8] = struct.pack("<q", calls(self._shared) + 1)


def calls(shared: mmap.mmap) -> int:
    """Finished calls of the operator in the child."""
    return int(struct.unpack("<q", shared[:8])[0])


CALLS: dict[str, Callable[..., Any]] = {
    "lanczos": lambda A, path: fastsharp.lanczos(A, k=3, resume=path),
    "density": lambda A, path: fastsharp.density(A, probes=3, steps=25, resume=path),
    "trace": lambda A, path: fastsharp.trace(A, rtol=2e-4, resume=path),
    "spectrum": lambda A, path: fastsharp.spectrum(A, k=2, steps=25, rtol=0.01, resume=path),
}


def numbers(result: Any) -> Iterator[bytes]:
    """Every bit of the numbers of a result."""
    if isinstance(result, fastsharp.Spectrum):
        for part in (result.eigenpairs, result.density, result.trace, result.frobenius):
            yield from numbers(part)
    else:
        for value in (getattr(result, f.name) for f in dataclasses.fields(result)):
            if isinstance(value, torch.Tensor):
                yield value.contiguous().numpy().tobytes()
            elif isinstance(value, (bool, int, float)) or (value and isinstance(value, tuple) and isinstance(value[0], float)):
                yield repr(value).encode()


def child(call: Callable[..., Any], shared: mmap.mmap, path: Path | None) -> int:
    """Fork a run; its process id. The hash of the result is left in shared memory."""
    shared[:24] = b"\0" * 24
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            digest = hashlib.blake2b(digest_size=16)
            for part in numbers(call(Counted(shared), path)):
                digest.update(part)
            shared[8:24] = digest.digest()
            code = 0
        finally:
            os._exit(code)
    return pid


def logged(path: Path) -> int:
    """Products in the log, in calls."""
    if not path.exists():
        return 0
    with Log(path) as log:
        return sum(head.get("kind") == "product" for head, _ in iter(log.read, None))


def kill(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """What happened: the kills, how many hit a running child, the most calls lost, the results that were the same."""
    shared, call = mmap.mmap(-1, 4096), CALLS[name]
    g = random.Random(5)
    assert os.waitpid(child(call, shared, None), 0)[1] == 0
    want, steps = bytes(shared[8:24]), calls(shared)
    found: dict[str, Any] = {"kills": 0, "hit": 0, "while_computing": 0, "most_lost": 0, "same": 0, "steps": steps}
    for number in range(rounds):
        path = folder / f"{name}{number}.log"
        for _ in range(KILLS):
            before = logged(path)
            pid = child(call, shared, path)
            after_call = g.randrange(max(steps - before + 1, 1))
            while calls(shared) < after_call and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(1e-4)
            time.sleep(g.random() * DELAY)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            after = logged(path)
            computed = calls(shared) - (before > 0)  # a continued run computes one logged product again
            found["kills"] += 1
            found["hit"] += os.WIFSIGNALED(status)
            found["while_computing"] += os.WIFSIGNALED(status) and computed > 0
            found["most_lost"] = max(found["most_lost"], before + computed - after)
        assert os.waitpid(child(call, shared, path), 0)[1] == 0
        found["same"] += bytes(shared[8:24]) == want
        path.unlink()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, where, *asked = sys.argv
    print(json.dumps({name: kill(name, Path(where), int(rounds)) for name, rounds in zip(asked[::2], asked[1::2], strict=True)}))
