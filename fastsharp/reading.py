"""Reading a loader: every failure says which batch of which pass it was, and workers that stand still end the wait."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from fastsharp.errors import FastsharpError, LoaderError, LoaderTimeoutError

STALL = 300.0  # seconds without a batch from the workers of a DataLoader that states no timeout of its own
_DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # torch's words for a worker that is gone

_WORKER = re.compile(r"Caught \w+ in DataLoader worker process (\d+)")


def watched(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader itself, or a copy with a time limit where it reads by workers without one: torch would wait for ever.

    The limit is DataLoader's own `timeout`, so that whoever wants another one states it there. The copy shares data set, samplers and
    generators; workers that the caller's loader keeps alive are left alone.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader
    if loader.num_workers == 0 or loader.timeout > 0:
        return loader
    twin: Any = copy.copy(loader)
    twin.timeout = STALL
    twin._iterator = None  # of persistent workers
    return twin  # type: ignore[no-any-return]


def read(loader: Iterable[Any], number: int) -> Iterator[Any]:
    """The batches of pass `number`, counted from 1. Raises LoaderTimeoutError and LoaderError, from the loader's own exception.

    MemoryError and errors of fastsharp pass as they are, as does Ctrl-C.
    """
    batches, index = None, 0
    while True:
        try:
            batches = iter(loader) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            return
        except (FastsharpError, MemoryError):
            raise
        except Exception as e:
            raise _told(e, loader, batches, f"batch {index} of pass {number}", index) from e
        yield batch
        index += 1


@contextmanager
def deaths_told() -> Iterator[None]:
    """Around work between two batches: torch reports a dead worker by a signal, that is wherever the main thread happens to be."""
    try:
        yield
    except RuntimeError as e:
        dead = None if isinstance(e, FastsharpError) else _DEAD.search(str(e))
        if dead is None:
            raise
        raise _death(str(e), dead.group(1), (), "between two batches") from e


@contextmanager
def sample_read(i: int) -> Iterator[None]:
    """Around `dataset[i]`: LoaderError from what it raises."""
    try:
        yield
    except (FastsharpError, MemoryError):
        raise
    except Exception as e:
        raise LoaderError(f"sample {i} could not be read: {_cause(e)}.\nLook at dataset[{i}]; leave it out or repair it.") from e


def _told(e: Exception, loader: Any, batches: Any, where: str, index: int) -> LoaderError:
    text = str(e)
    if isinstance(e, RuntimeError) and "DataLoader timed out" in text:
        return LoaderTimeoutError(
            f"the loader's workers gave no {where} within {loader.timeout:g} s: one hangs, or waits for a lock that was held when it was forked.\n"
            "Read the data with num_workers=0 to see where; a slow loader may be given longer by DataLoader(timeout=...)."
        )
    if isinstance(e, RuntimeError) and (dead := _DEAD.search(text)):
        return _death(text, dead.group(1), getattr(batches, "_workers", ()), f"while {where} was read")
    by_worker = _WORKER.match(text)
    sample = _sample(e, loader)
    if sample is not None:
        return LoaderError(
            f"{where} could not be read: {_cause(e)} (sample {sample!r}).\nLook at loader.dataset[{sample!r}]; leave it out or repair it."
        )
    whose = f", in worker {by_worker.group(1)}" if by_worker else ""
    return LoaderError(
        f"{where} could not be read{_range(loader, index)}{whose}: {_cause(e)}.\n"
        "The loader's own exception is the cause above; repair that sample or leave it out."
    )


def _cause(e: Exception) -> str:
    """The exception in one line; a worker's is the last line of the text that torch sends."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
    return (lines[-1] if _WORKER.match(str(e)) else f"{type(e).__name__}: {lines[0]}")[:200]


def _death(text: str, pids: str, workers: Iterable[Any], when: str) -> LoaderError:
    """The error for workers that are gone, with number and signal where they are known."""
    codes = {str(w.pid): (i, w.exitcode) for i, w in enumerate(workers)}
    number, code = codes.get(pids.strip(), (None, None))
    told = re.search(r"killed by signal: ([\w ]+?)\s*\.", text)
    name = signal.strsignal(-code) if code is not None and code < 0 else told.group(1) if told else None
    who = f"worker {number} of the loader" if number is not None else "a worker of the loader"
    how = f"was killed by a signal ({name})" if name else f"ended by itself (exit code {code})" if code is not None else "is gone"
    guess = "; as a rule the system ran out of memory" if name in (None, signal.strsignal(signal.SIGKILL)) and code in (None, -9) else ""
    return LoaderError(
        f"{who} (process {pids}) {how} {when}{guess}.\n"
        "Use fewer workers (num_workers=) or smaller batches; num_workers=0 shows an error of the data set itself."
    )


def _sample(e: BaseException, loader: Any) -> Any:
    """The index with which `loader.dataset[index]` was called when it raised, None where that is not known."""
    dataset, trace = getattr(loader, "dataset", None), e.__traceback__
    while trace is not None:
        code, values = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code.co_name == "__getitem__" and code.co_argcount > 1 and values.get(code.co_varnames[0]) is dataset is not None:
            return values.get(code.co_varnames[1])
        trace = trace.tb_next
    return None


def _range(loader: Any, index: int) -> str:
    """Which samples a batch is made of, where they are read in order."""
    in_order = isinstance(loader, DataLoader) and type(getattr(loader, "sampler", None)) is SequentialSampler
    if not in_order or type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        return ""
    first = index * loader.batch_size
    return f" (samples {first} to {min(first + loader.batch_size, len(loader.dataset)) - 1})"
