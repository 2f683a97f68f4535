"""`resume=`: one line that puts a log between a solver and its operator."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

import torch

from fastsharp._environment import __version__
from fastsharp.api.subject import sums_in
from fastsharp.errors import ArgumentTypeError
from fastsharp.operator import SymmetricOperator
from fastsharp.ops import _registry
from fastsharp.recorded import RecordedOperator
from fastsharp.store import Log

_OF_THE_MACHINE = {"torch", "python", "device"}  # in provenance
_NO_EFFECT = {"memory", "preflight", "strict"}  # on the products that a solver asks for
_MOST = 120  # characters of a value in the log, and in a message; a longer one is hashed


class recorded:
    """`with recorded(operator, resume, "lanczos", arguments) as logged:` the operator itself for None, else one with a log at that path.

    arguments   what the caller gave that decides which vectors are multiplied; a tensor stands for its bits
    may_change  those that only say how long the run goes on
    basis_bytes  what the basis may take: where it is short, restarts and storage follow from it, and with them the vectors

    Leaving the block without an exception marks the log as finished.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        path: str | os.PathLike[str] | None,
        call: str,
        arguments: Mapping[str, Any],
        may_change: Collection[str] = (),
        basis_bytes: int | None = None,
    ) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ArgumentTypeError(f"resume is a {type(path).__name__}, expected the path of a log, as a str or Path.")
        self._operator, self._path, self._call = operator, path, call
        self._arguments, self._may_change, self._basis_bytes = arguments, may_change, basis_bytes
        self._log: Log | None = None
        self._logged: RecordedOperator | None = None

    def __enter__(self) -> SymmetricOperator:
        if self._path is None:
            return self._operator
        for part in sums_in(self._operator):
            part.settle_backend()  # the log names the backend; without a preflight "auto" has not decided yet
        self._log = Log(self._path)
        try:
            run = _run(self._operator, self._call, self._arguments)
            self._logged = RecordedOperator(self._operator, self._log, run, self._machine(), self._may_change)
        except BaseException:
            self._log.close()
            raise
        return self._logged

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._log is not None:
            try:
                if self._logged is not None and error is None:
                    self._logged.finish()
            finally:
                self._log.close()

    def _machine(self) -> dict[str, Any]:
        return {
            "fastsharp": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "kernels": _registry.choose(self._operator.device).name,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "basis_bytes": self._basis_bytes,
        }


def _run(operator: SymmetricOperator, call: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it this run; `settings` and `provenance` name the matrix as exactly as the operator can."""
    facts = {
        "call": call,
        "operator": type(operator).__name__,
        "n": operator.n,
        "dtype": str(operator.dtype),
        "device": operator.device.type,
        **{k: v for k, v in operator.provenance.items() if k not in _OF_THE_MACHINE},
        **operator.settings,
        **arguments,
    }
    return {name: _short(value) for name, value in facts.items() if name not in _NO_EFFECT}


def _short(value: Any) -> Any:
    """A value that JSON holds, the hash of a long one or of a tensor, the name of a function, the type of anything else."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return f"tensor {tuple(value.shape)} {_digest(flat.view(torch.uint8).numpy().tobytes())}"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        return getattr(value, "__qualname__", type(value).__name__)
    return value if len(text) <= _MOST else f"{text[: _MOST // 2]}... {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
