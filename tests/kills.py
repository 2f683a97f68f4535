"""100 kills at random moments, in a process of its own: `python -m tests.kills FOLDER` prints what was found as JSON.

A process that has started threads must not be forked, so pytest's own is not. Each child runs the same small problem on the log of its
round, counts its finished products in shared memory, and is killed a random time after a random one of them. Two kills a round, then a
child that is left alone.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastsharp
from fastsharp.operator import SymmetricOperator
from fastsharp.store import Log

N, ROUNDS, KILLS = 2000, 50, 2
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


def bits(result: fastsharp.Eigenpairs) -> bytes:
    """16 bytes that stand for every bit of the numbers of a result."""
    digest = hashlib.blake2b(digest_size=16)
    for t in (result.eigenvalues, result.eigenvectors, result.residuals, result.error_bounds):
        digest.update(t.contiguous().numpy().tobytes())
    digest.update(repr((result.n_matvec, result.n_verify)).encode())
    return digest.digest()


def child(shared: mmap.mmap, path: Path | None) -> int:
    """Fork a run; its process id. The hash of the result is left in shared memory."""
    shared[:24] = b"\0" * 24
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            shared[8:24] = bits(fastsharp.lanczos(Counted(shared), k=3, resume=path))
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


def main(folder: Path) -> dict[str, Any]:
    """What happened: the kills, how many hit a running child, the most steps lost, the results that were the same."""
    torch.set_num_threads(1)
    shared = mmap.mmap(-1, 4096)
    g = random.Random(5)
    assert os.waitpid(child(shared, None), 0)[1] == 0
    want, steps = bytes(shared[8:24]), calls(shared)
    found: dict[str, Any] = {"kills": 0, "hit": 0, "while_computing": 0, "most_lost": 0, "same": 0, "steps": steps}
    for number in range(ROUNDS):
        path = folder / f"{number}.log"
        for _ in range(KILLS):
            before = logged(path)
            pid = child(shared, path)
            after_call = g.randrange(steps - before + 1)
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
        assert os.waitpid(child(shared, path), 0)[1] == 0
        found["same"] += bytes(shared[8:24]) == want
        path.unlink()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
