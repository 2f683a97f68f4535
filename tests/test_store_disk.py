"""The log on a disk that fails: each call in turn, short writes and reads, a limit on the size of files."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastsharp.errors import LogError
from fastsharp.store import Log
from tests.test_store import RECORDS, put, read, written
from tests.unchanged import check_message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, code: int, part: int = 0) -> Iterator[Callable[[], int]]:
    """Call number `at` of os.`name` fails with `code`; a write puts `part` bytes down before. Yields the number of calls."""
    real, calls = getattr(os, name), 0

    def fails(fd: int, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            if part and name == "pwritev":
                real(fd, [b"".join(bytes(b) for b in arguments[0])[:part]], arguments[1])
            raise OSError(code, os.strerror(code))
        return real(fd, *arguments)

    with monkeypatch.context() as m:
        m.setattr(os, name, fails)
        yield lambda: calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["pwritev", "fsync", "ftruncate", "preadv"])
def test_a_failure_of_any_call_is_named_and_keeps_the_records_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """Open, read two records and a torn tail, append two, close: every single call fails once, writes after 0 or 9 bytes."""
    at, calls = 1, 1
    while at <= calls:
        for part in (0, 9) if name == "pwritev" else (0,):
            path = tmp_path / f"{at}-{part}"
            whole = written(path, RECORDS[:2])
            put(path, whole + b"REC:torn")
            done = 2
            with failing(monkeypatch, name, at, code, part) as count:
                try:
                    with Log(path) as log:
                        assert [h for h, _ in iter(log.read, None)] == [h for h, _ in RECORDS[:2]]
                        for head, body in RECORDS[2:]:
                            log.append(head, body, sync=True)
                            done += 1
                except LogError as e:
                    check_message(e, str(path), os.strerror(code))
                    assert e.__cause__ is not None
                else:
                    assert done == len(RECORDS)
                calls = count()
            kept = read(path)
            assert kept == RECORDS[: len(kept)] and len(kept) >= done
        at += 1
    assert at > 1 and calls < at


@pytest.mark.parametrize("name", ["pwritev", "fsync"])
def test_a_failure_while_the_file_is_created_can_be_repaired_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "log"
    for part in (0, 9):
        with failing(monkeypatch, name, 1, errno.ENOSPC, part), pytest.raises(LogError):
            Log(path)
        assert written(path) and read(path) == RECORDS
        path.unlink()


def test_short_writes_and_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read_ = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: write(fd, [b"".join(bytes(p) for p in parts)[:3]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read_(fd, [views[0][:5]], at))
    written(path)
    assert read(path) == RECORDS


def test_a_write_of_nothing_is_a_failure_not_a_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Log(path) as log:
        monkeypatch.setattr(os, "pwritev", lambda *_: 0)
        with pytest.raises(LogError) as caught:
            log.append({})
        check_message(caught.value, "nothing was written")


def test_a_limit_on_the_size_of_files(path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Log(path) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            with pytest.raises(LogError) as caught:
                while True:
                    log.append({}, b"x" * 100)
            kept = log.index
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        check_message(caught.value, "File too large", f"record {kept} ")
        log.append({"after": 1})
    assert read(path) == [({}, b"x" * 100)] * kept + [({"after": 1}, b"")]
