"""The stamp of a measurement: what a row must say so that its number means something later."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from fastsharp import _environment

ROOT = Path(__file__).resolve().parents[1]


def stamp() -> dict[str, Any]:
    """Machine, versions, threads, commit (with a mark if the tree differs from it), load and time."""
    facts = _environment.info()
    machine = {k: facts[k] for k in ("cpu", "simd", "threads", "gpus", "torch", "python", "_cuda")}
    return {
        **machine,
        "machine_id": hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12],
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "load": round(os.getloadavg()[0], 2),
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*args: str) -> str:
    run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"
