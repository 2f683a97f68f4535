"""RecordedOperator: products go into a log, and come out of it when the run is started again.

What is logged is v -> Av, not the state of a solver. A resumed run is executed again from its first step with products read in place of
computed, until the log ends; then it computes and appends. All else in a solver is deterministic, so every later bit is that of an
uninterrupted run, whatever the solver. Each vector is held against the checksum of the one that the recorded product belongs to.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Collection, Mapping
from typing import Any, final

import numpy as np
import torch

from fastsharp.errors import LogError, LogStoppedWarning, ResumeMismatchError, listing, stacklevel
from fastsharp.operator import SymmetricOperator
from fastsharp.store import Log

_RUN, _PRODUCT, _END = "run", "product", "end"
_REPEAT_GATE = 64.0  # of eps; sums that need not be ordered stay below it, see krylov.symmetry


@final
class RecordedOperator(SymmetricOperator):
    """The same matrix; its products are read from `log` as far as they are there, then computed and appended.

    run         what makes it this run (matrix, data, arguments), by name; all of it has to be what the log says
    machine     what only the last bits depend on (versions, threads); a difference is a note
    may_change  names in `run` that only say how long a solver goes on: where such a run leaves the recorded one, it goes on by itself

    One product is computed again when a log is continued: a matrix can change in ways that no name in `run` shows. It has to agree within
    64 eps, as repeated products do on any device, or within sqrt(eps) where `machine` differs. The disk takes one vector a product. If the log cannot grow, LogStoppedWarning, a note, and the run goes on.
    Raises ResumeMismatchError, LogError and DataFormatError.
    """

    def __init__(
        self,
        inner: SymmetricOperator,
        log: Log,
        run: Mapping[str, Any],
        machine: Mapping[str, Any],
        may_change: Collection[str] = (),
    ) -> None:
        super().__init__(inner.n, inner.dtype, inner.device)
        self._inner = inner
        self._log = log
        self._calls = 0
        self._products = 0
        self._replayed = 0
        self._agrees: str | None = None
        self._stopped: str | None = None
        self._gate = _REPEAT_GATE * torch.finfo(inner.dtype).eps
        self._differs: list[str] = []
        self._may_leave = False
        run, machine = _plain(run), _plain(machine)
        first = log.read()
        self._replaying = first is not None
        if first is None:
            self._append({"kind": _RUN, "run": run, "machine": machine})
        else:
            self._compare(first[0], run, machine, may_change)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._replayed:
            notes.append(f"{self._replayed} of {self._products} products came from the log {self._log.path}; {self._agrees}")
            notes += [f"since the log was begun: {difference}" for difference in self._differs]
        if self._log.dropped:
            notes.append(f"the last {self._log.dropped} bytes of the log were no whole record and were dropped")
        if self._stopped:
            notes.append(self._stopped)
        if not self._log.locked:
            notes.append("the file system of the log has no locks: a second run with the same path would go unnoticed")
        return (*self._inner.notes, *notes)

    @property
    def provenance(self) -> dict[str, Any]:
        return self._inner.provenance

    @property
    def settings(self) -> dict[str, Any]:
        return self._inner.settings

    @property
    def layout(self) -> Any:
        return self._inner.layout

    def cheap(self, precision: str) -> SymmetricOperator:
        """The inner matrix's cheap products, in the same log and marked there with their precision."""
        return _Cheap(self, self._inner.cheap(precision), precision)

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()

    def finish(self) -> None:
        """Mark the log as that of a run that came to its end."""
        if self._replaying:
            self._replaying = self._log.read() is not None
        if not self._replaying and not self._stopped:
            self._append({"kind": _END, "products": self._products}, sync=True)

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.multiply(self._inner, {}, V, out)

    def multiply(self, inner: SymmetricOperator, mark: dict[str, str], V: torch.Tensor, out: torch.Tensor) -> None:
        """out <- V times `inner`, from the log or into it; `mark` tells its records from those of other operators in the log."""
        head = {"kind": _PRODUCT, **mark, "rows": V.shape[0], "input": zlib.crc32(_bytes(V))}
        self._calls += 1
        self._products += V.shape[0]
        if self._replaying and self._replay(inner, head, V, out):
            return
        inner.apply(V, out)
        if not self._stopped:
            product = out.detach().cpu()
            if np.isfinite(product.numpy()).all():  # several times faster than torch's
                self._append(head, product)
            else:  # a run ends here; begun anew it shall not read the same from the log
                self._stopped = f"product {self._calls} is not finite and was not logged"

    def _replay(self, inner: SymmetricOperator, head: dict[str, Any], V: torch.Tensor, out: torch.Tensor) -> bool:
        """Put the recorded product into `out`; False where the log ends or this run leaves the recorded one."""
        place = self._log.place
        record = self._log.read()
        if record is None:
            self._replaying = False
            return False
        found, body = record
        if found != head or len(body) != V.numel() * V.element_size():
            if not self._may_leave:
                raise self._other_vector(found)
            self._replaying = False
            self._leave(place, found)
            return False
        product = torch.frombuffer(body, dtype=self.dtype).view(V.shape).to(self.device)
        if self._agrees is None:
            self._agrees = self._compute_again(inner, V[:1], product[:1])
        out.copy_(product)
        self._replayed += V.shape[0]
        return True

    def _leave(self, place: tuple[int, int], found: dict[str, Any]) -> None:
        """Go on behind `place`, unless that would drop more than the end of the recorded run: its last product and its mark."""
        following = None if found.get("kind") == _END else self._log.read()
        if following is None or following[0].get("kind") == _END:
            self._log.go_back(place)
        else:
            self._stopped = (
                f"the log goes on with products that this run did not ask for, so product {self._calls} and later ones were not logged"
            )

    def _compute_again(self, inner: SymmetricOperator, v: torch.Tensor, recorded: torch.Tensor) -> str:
        """A v against the log: what to say of it. ResumeMismatchError beyond what rounding explains."""
        computed = inner.apply(v)
        if torch.equal(computed.view(torch.uint8), recorded.contiguous().view(torch.uint8)):
            return "one was computed again and is the same bit for bit"
        size = float(torch.linalg.vector_norm(computed, dtype=torch.float64))
        difference = float(torch.linalg.vector_norm(computed - recorded, dtype=torch.float64))
        if not difference <= self._gate * size:
            raise ResumeMismatchError(
                f"resume: product 1, computed again, differs from the log {self._log.path} by {difference / size if size else math.inf:.2g} of "
                f"its norm (gate {self._gate:.2g}).\n"
                "The matrix is another one: look at the loss, the model's code, or the callable. Undo the change, or give another path."
            )
        return f"one was computed again and agrees to {difference / size:.2g} of its norm"

    def _compare(self, head: dict[str, Any], run: dict[str, Any], machine: dict[str, Any], may_change: Collection[str]) -> None:
        """Hold the first record of the log against this run."""
        then, machine_then = head.get("run"), head.get("machine")
        if not isinstance(then, dict) or not isinstance(machine_then, dict):
            raise ResumeMismatchError(f"resume: the log {self._log.path} does not begin with the record of a run. Give another path.")
        changed = _differences(then, run)
        refused = [text for name, text in changed.items() if name not in may_change]
        if refused:
            raise ResumeMismatchError(
                f"resume: the log {self._log.path} belongs to another run: {listing(refused)}.\n"
                "Call with what the log was begun with, or give another path."
            )
        self._may_leave = bool(changed)
        moved = list(_differences(machine_then, machine).values())
        if moved:
            self._gate = math.sqrt(torch.finfo(self.dtype).eps)
        self._differs = [*changed.values(), *moved]

    def _other_vector(self, found: dict[str, Any]) -> ResumeMismatchError:
        if found.get("kind") == _END:
            what = f"the recorded run ended before product {self._calls}"
        else:
            what = f"the vector of product {self._calls} is not the recorded one"
        if self._differs:
            why = f"Since the log was begun: {listing(self._differs)}. Go back to that to continue"
        else:
            why = "The start vector or the solver's code changed. Undo the change"
        return ResumeMismatchError(f"resume: {what} in the log {self._log.path}.\n{why}, or give another path.")

    def _append(self, head: dict[str, Any], product: torch.Tensor | None = None, *, sync: bool = False) -> None:
        try:
            self._log.append(head, b"" if product is None else _bytes(product), sync=sync)
        except LogError as error:
            self._stopped = f"the log {self._log.path} stopped growing after {self._log.index} records"
            warnings.warn(f"{error}\nThe run goes on without the log.", LogStoppedWarning, stacklevel=stacklevel())


@final
class _Cheap(SymmetricOperator):
    """The cheap products that belong to a recorded operator, in its log."""

    def __init__(self, recorded: RecordedOperator, inner: SymmetricOperator, precision: str) -> None:
        super().__init__(inner.n, inner.dtype, inner.device)
        self._recorded, self._inner, self._precision = recorded, inner, precision

    @property
    def notes(self) -> tuple[str, ...]:
        return self._inner.notes

    @property
    def settings(self) -> dict[str, Any]:
        return self._inner.settings

    @property
    def provenance(self) -> dict[str, Any]:
        return self._inner.provenance

    @property
    def noise(self) -> float:
        return self._inner.noise

    def check_unchanged(self) -> None:
        self._inner.check_unchanged()

    def _apply(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self._recorded.multiply(self._inner, {"precision": self._precision}, V, out)


def _bytes(t: torch.Tensor) -> memoryview:
    """The numbers of t, row after row, on the host."""
    return t.detach().cpu().contiguous().numpy().data.cast("B")


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from the log."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    return plain


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{name: what changed}."""
    names = [*then, *(name for name in now if name not in then)]
    return {
        name: f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in names
        if (name in then, then.get(name)) != (name in now, now.get(name))
    }
