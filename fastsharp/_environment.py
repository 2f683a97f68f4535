"""What this installation runs on: versions, CPU, threads, instruction set, native modules or why they are missing, GPUs."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

import torch

from fastsharp.ops import _registry


def _version() -> str:
    try:
        return importlib.metadata.version("fastsharp")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: run from a source tree"


__version__ = _version()


def info() -> dict[str, Any]:
    """Everything that a report of a number, or of a bug, should state about the machine; plain values, JSON-ready."""
    cpu, cuda = _registry.native("cpu"), _registry.native("cuda")
    return {
        "fastsharp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "simd": "none: reference path" if isinstance(cpu, str) else cpu.simd(),
        "openmp": "none: reference path" if isinstance(cpu, str) else cpu.openmp() or "none loaded: std::thread",
        "_cpu": cpu if isinstance(cpu, str) else "built",
        "_cuda": _cuda_state(cpu, cuda),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "backend_cpu": _registry.choose(torch.device("cpu")).name,
        "backend_cuda": _registry.choose(torch.device("cuda")).name if torch.cuda.is_available() else "none: no GPU",
    }


def info_text() -> str:
    """The same as aligned lines."""
    facts = info()
    facts["gpus"] = "; ".join(facts["gpus"]) or "none"
    width = max(map(len, facts))
    lines = [f"{key:<{width}}  {value}" for key, value in facts.items()]
    if facts["_cpu"] != "built":
        lines.append(
            "The reference path computes the same numbers, slower. To build the native module: pip install -v . with a C++ compiler."
        )
    return "\n".join(lines)


def _cuda_state(cpu: Any, cuda: Any) -> str:
    """Built or not, as the build recorded it in _cpu, and whether it can be used here."""
    recorded = "no record of the build" if isinstance(cpu, str) else str(cpu.cuda_status())
    return f"{cuda} ({recorded})" if isinstance(cuda, str) else f"{recorded}, in use"


def _gpu(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    return f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})"


def _cpu_model() -> str:
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as f:
                for line in f:
                    if line.startswith(("model name", "Model")):
                        return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
