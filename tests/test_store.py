"""The log under fire: every cut, flips of random bits, and random files."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsharp import store
from fastsharp.errors import DataFormatError, LogError
from fastsharp.store import Log
from tests.unchanged import check_message

RECORDS: list[tuple[dict[str, Any], bytes]] = [
    ({"kind": "run", "n": 3, "name": "é"}, b""),
    ({"kind": "product", "rows": 1}, bytes(range(48))),
    ({}, b"x"),
    ({"kind": "product", "rows": 2}, b"\0" * 31),
]
HEAD = 20  # bytes before the first record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what `fsync` does is not seen by a process that reads the file again."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def written(path: Path, records: list[tuple[dict[str, Any], bytes]] = RECORDS) -> bytes:
    """The file that holds these records."""
    with Log(path) as log:
        for head, body in records:
            log.append(head, body)
    return path.read_bytes()


def put(path: Path, content: bytes) -> None:
    """In place: some file systems flush a file that was emptied and written anew."""
    with path.open("r+b" if path.exists() else "wb") as f:
        f.write(content)
        f.truncate()


def read(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Every whole record from the front."""
    with Log(path) as log:
        return [(head, bytes(body)) for head, body in iter(log.read, None)]


def boundaries(path: Path) -> list[int]:
    """Sizes of the file at which it ends with a whole record; the first is that without any."""
    ends = []
    with Log(path) as log:
        while True:
            ends.append(log.place[0])
            if log.read() is None:
                return ends


# --- what comes back ---------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(path: Path) -> None:
    written(path)
    assert read(path) == RECORDS
    with Log(path) as log:
        assert log.read() is not None and log.index == 1
    assert read(path) == RECORDS, "a log that was read in part stays whole"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), max_size=3),
            st.binary(max_size=99),
        )
    ),
    st.data(),
)
def test_any_records_come_back_after_any_number_of_reopenings(records: list[tuple[dict[str, Any], bytes]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, done = Path(folder) / "log", 0
        while done < len(records):
            upto = data.draw(st.integers(done + 1, len(records)))
            with Log(path) as log:
                assert [(h, bytes(b)) for h, b in iter(log.read, None)] == records[:done]
                for head, body in records[done:upto]:
                    log.append(head, body)
            done = upto
        assert read(path) == records


def test_going_back_replaces_what_followed(path: Path) -> None:
    written(path)
    with Log(path) as log:
        log.read()
        place = log.place
        log.read()
        log.go_back(place)
        log.append({"new": 1}, b"new")
        assert log.index == 2
    assert read(path) == [RECORDS[0], ({"new": 1}, b"new")]


def test_a_record_of_the_same_size_does_not_bring_back_what_followed(path: Path) -> None:
    """The old record behind it would be whole and have the right index."""
    written(path)
    with Log(path) as log:
        log.read()
        place = log.place
        log.read()
        log.go_back(place)
        log.append(RECORDS[1][0], bytes(48))
    assert read(path) == [RECORDS[0], (RECORDS[1][0], bytes(48))]


def test_a_new_file_is_for_its_owner_alone_and_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), real(fd))[1])
    Log(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert synced == [False, True], "first the file, then the folder that holds its name"


def test_fsync_follows_each_record_where_it_is_cheap_and_is_shared_where_it_is_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: an fsync takes 1 s; records every 21 s, then every 3 s."""
    now, syncs = 0.0, 0

    def fsync(fd: int) -> None:
        nonlocal now, syncs
        now += 1.0
        syncs += 1

    monkeypatch.setattr(store.time, "monotonic", lambda: now)
    log = Log(path)
    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(10):
        now += 21.0
        log.append({})
    assert syncs == 10
    began = now
    for _ in range(100):
        now += 3.0
        log.append({})
    assert syncs - 10 <= 0.05 * (now - began) and syncs >= 20
    before = syncs
    log.append({}, sync=True)
    assert syncs == before + 1
    log.append({})
    log.close()
    assert syncs == before + 2, "what was not synced yet is synced at the end"


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_cut_leaves_the_whole_records_before_it_and_can_be_continued(path: Path) -> None:
    whole = written(path)
    ends = boundaries(path)
    assert ends[0] == HEAD and ends[-1] == len(whole)
    for cut in range(len(whole) + 1):
        put(path, whole[:cut])
        kept = sum(end <= cut for end in ends[1:])
        with Log(path) as log:
            assert [(h, bytes(b)) for h, b in iter(log.read, None)] == RECORDS[:kept]
            assert log.dropped == (cut - ends[kept] if cut >= HEAD else 0)
            for head, body in RECORDS[kept:]:
                log.append(head, body)
        assert path.read_bytes() == whole, f"cut at {cut}, continued"


def test_1000_random_bit_flips_are_detected(path: Path) -> None:
    """What is read is a proper prefix of what was written; a damaged head of the file is an error that leaves the file as it is."""
    whole = written(path)
    ends = boundaries(path)
    g = random.Random(1)
    for _ in range(1000):
        at, bit = g.randrange(len(whole)), g.randrange(8)
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        put(path, damaged)
        if at < HEAD:
            with pytest.raises(DataFormatError) as caught:
                read(path)
            check_message(caught.value, str(path), "another path")
            assert path.read_bytes() == damaged
        else:
            assert read(path) == RECORDS[: sum(end <= at for end in ends[1:])]


def test_a_record_of_another_place_is_not_taken(path: Path) -> None:
    """A whole record with a true checksum, but not the next one."""
    whole = written(path)
    ends = boundaries(path)
    put(path, whole[: ends[1]] + whole[ends[2] :])
    assert read(path) == RECORDS[:1]


def test_random_files_give_records_or_our_errors(path: Path) -> None:
    """Random bytes behind nothing, behind the head of a log, and behind the start of a record: no other exception, nothing large read."""
    g = random.Random(2)
    whole = written(path)
    for i in range(1500):
        junk = g.randbytes(g.randrange(120))
        put(path, whole[: (0, HEAD, HEAD + 4, g.randrange(len(whole)))[i % 4]] + junk)
        try:
            assert all(record in RECORDS for record in read(path))
        except (LogError, DataFormatError) as e:
            check_message(e, str(path))


@pytest.mark.parametrize("head", [b"[1]", b"{", b"\xff", b"[" * 100_000, b"1" * 5000], ids=["list", "cut", "utf8", "deep", "number"])
def test_a_record_that_no_log_writes_is_refused(path: Path, head: bytes) -> None:
    """A true checksum over a head that is not a JSON object."""
    whole = written(path, [])
    start = store._RECORD.pack(b"REC:", 0, len(head), 0)
    put(path, whole + start + store._CRC.pack(zlib.crc32(start + head)) + head)
    with pytest.raises(DataFormatError) as caught:
        read(path)
    check_message(caught.value, str(path), "record 0")


def test_lengths_beyond_the_file_are_not_allocated(path: Path) -> None:
    whole = written(path, [])
    for head, body in ((1 << 31, 0), (0, 1 << 62), ((1 << 20) + 1, 0)):
        put(path, whole + store._RECORD.pack(b"REC:", 0, head, body) + b"\0" * 64)
        assert read(path) == []


def test_a_newer_version_is_named(path: Path) -> None:
    start = store._FILE.pack(b"fastsharplog", 2)
    put(path, start + store._CRC.pack(zlib.crc32(start)))
    with pytest.raises(DataFormatError) as caught:
        Log(path)
    check_message(caught.value, "version 2", "version 1")


def test_a_file_that_is_no_log_is_left_as_it_is(path: Path) -> None:
    put(path, b"the only copy of something dear")
    with pytest.raises(DataFormatError) as caught:
        Log(path)
    check_message(caught.value, str(path), "left as it is")
    assert path.read_bytes() == b"the only copy of something dear"


# --- who may write --------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_in_this_process_and_in_another(path: Path) -> None:
    with Log(path) as log:
        log.append({"a": 1})
        for _ in range(2):
            with pytest.raises(LogError) as caught:
                Log(path)
            check_message(caught.value, str(path), "in use")
        code = f"import fcntl, os; fcntl.lockf(os.open({str(path)!r}, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1 and "BlockingIOError" in other.stderr
        log.append({"a": 2})
    assert [head["a"] for head, _ in read(path)] == [1, 2]


def test_a_lock_held_by_another_process_is_named(path: Path) -> None:
    code = (
        "import fcntl, os, sys\n"
        f"fcntl.lockf(os.open({str(path)!r}, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)\n"
        "print(1, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(LogError) as caught:
            Log(path)
        check_message(caught.value, "in use by another run")
        other.communicate()
    Log(path).close()


def test_a_file_system_without_locks_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "lockf", lockf)
    with Log(path) as log:
        assert not log.locked


def test_what_cannot_be_a_log_is_refused(tmp_path: Path) -> None:
    for path, word in ((tmp_path, "directory"), (tmp_path / "no" / "log", "No such file"), (Path("/dev/null"), "regular")):
        with pytest.raises(LogError) as caught:
            Log(path)
        check_message(caught.value, str(path), word)


def test_a_head_beyond_the_cap_is_refused(path: Path) -> None:
    with Log(path) as log:
        with pytest.raises(LogError) as caught:
            log.append({"long": "x" * store.MAX_HEAD})
        check_message(caught.value, "at most")
        log.append({"short": 1})
    assert read(path) == [({"short": 1}, b"")]
