"""Append-only log of records, each with its own checksum: whatever ends the process, the records before it are whole.

    file    "fastsharplog" | version u32 | CRC32 u32 of these 16 bytes | record | record | ...
    record  "REC:" | index u64 | head length u32 | body length u64 | CRC32 u32 | head, a JSON object | body, raw bytes

All integers are little-endian. A record's CRC covers index, lengths, head and body, so that a record is either as written or not
there: reading ends at the first one that is cut off, damaged or out of order, and the next `append` takes its place. Nothing
is ever unpickled.

Durability. Every record is handed to the operating system before `append` returns, so that a killed process loses none. `fsync`
follows at once where it costs at most 1/20 of the time since the last one; quicker records share one. So a power cut costs the last
record, or the work of about twenty fsyncs' time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fastsharp.errors import DataFormatError, LogError

Buffer = bytes | bytearray | memoryview

MAX_HEAD = 1 << 20  # bytes of JSON; a length beyond it is damage, not a record
_VERSION = 1
_FILE = struct.Struct("<12sI")
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<4sQIQ")
_FILE_MAGIC, _RECORD_MAGIC = b"fastsharplog", b"REC:"
_SYNC_SHARE = 0.05  # of the wall time, at most

# (process, device, inode) of the logs open here. POSIX locks are taken by processes, so two logs of one process need this as well.
# flock would see them, but it is inherited: the orphaned workers of a killed process would keep the file locked for seconds.
_OPEN: set[tuple[int, int, int]] = set()


class Log:
    """One log file, locked for this process: `read` from the front, then `append`.

    path      created if absent (mode 0600), its folder has to exist
    index     records read or appended so far
    dropped   bytes of the file that were no whole record when reading ended
    locked    False where the file system has no locks

    Raises LogError (in use, not writable, an I/O error), DataFormatError (not a log of this kind). A file that is not a log is
    left as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = 0
        self.dropped = 0
        self.locked = True
        self._fd = -1
        with contextlib.suppress(OSError):  # before opening: closing a second descriptor would release the lock of the first
            self._refuse_if_open(os.stat(self.path))
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            found = os.fstat(self._fd)
        except OSError as e:
            raise self._error("cannot be opened", e, "Give the path of a file in a folder that exists and can be written to.") from e
        self._key = (os.getpid(), found.st_dev, found.st_ino)
        try:
            if not stat.S_ISREG(found.st_mode):
                raise LogError(f"log {self.path}: not a regular file. Give the path of a file, or of none yet.")
            self._lock()
            self._end = self._begin()
        except BaseException:
            os.close(self._fd)
            raise
        _OPEN.add(self._key)
        self._trimmed = self._end == os.fstat(self._fd).st_size
        self._dirty = False
        self._synced_at, self._sync_cost = time.monotonic(), 0.0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what was appended is on the disk then, as far as the disk allows."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            _OPEN.discard(self._key)
            with contextlib.suppress(OSError):
                if self._dirty:
                    os.fsync(fd)
            with contextlib.suppress(OSError):
                os.close(fd)

    def read(self) -> tuple[dict[str, Any], bytearray] | None:
        """Head and body of the next record, None where the whole records end. LogError if the disk cannot be read."""
        try:
            record = self._next()
            if record is None:
                self.dropped = max(os.fstat(self._fd).st_size - self._end, 0)
                return None
        except OSError as e:
            raise self._error(f"record {self.index} cannot be read", e, "Copy the file to another disk and resume from there.") from e
        raw, body = record
        try:
            head = json.loads(raw)
            if not isinstance(head, dict):
                raise ValueError(f"a {type(head).__name__}")
        except (ValueError, RecursionError) as e:
            raise DataFormatError(
                f"log {self.path}: the head of record {self.index} is not a JSON object ({e}), though its checksum holds.\n"
                "The file was not written by fastsharp. Give another path."
            ) from e
        self._end += _RECORD.size + _CRC.size + len(raw) + len(body)
        self.index += 1
        return head, body

    @property
    def place(self) -> tuple[int, int]:
        """Where the next record is read or appended, for `go_back`."""
        return self._end, self.index

    def go_back(self, place: tuple[int, int]) -> None:
        """To a `place` of before; the next `append` drops what follows it."""
        (self._end, self.index), self._trimmed = place, False

    def append(self, head: Mapping[str, Any], body: Buffer = b"", *, sync: bool = False) -> None:
        """Write a record behind the last one read or appended; `sync` forces it to the disk.

        LogError if that fails; the records before it are whole then, and a part of the new one is taken back if the disk allows.
        """
        raw = json.dumps(head, separators=(",", ":")).encode()
        if len(raw) > MAX_HEAD:
            raise LogError(
                f"log {self.path}: the head of record {self.index} has {len(raw)} bytes, at most {MAX_HEAD} are allowed. Shorten it."
            )
        view = memoryview(body).cast("B")
        start = _RECORD.pack(_RECORD_MAGIC, self.index, len(raw), view.nbytes)
        crc = _CRC.pack(zlib.crc32(view, zlib.crc32(raw, zlib.crc32(start))))
        try:
            if not self._trimmed:
                os.ftruncate(self._fd, self._end)
                self._trimmed = True
            self._write([start, crc, raw, view], self._end)
            self._dirty = True
            if sync or (time.monotonic() - self._synced_at) * _SYNC_SHARE >= self._sync_cost:
                self._sync()
        except OSError as e:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise self._error(
                f"record {self.index} cannot be written", e, "Free space or choose another disk; the records before it are whole."
            ) from e
        self._end += len(start) + len(crc) + len(raw) + view.nbytes
        self.index += 1

    # --- the file ---

    def _begin(self) -> int:
        """Check or write the head of the file; returns where the records begin."""
        start = _FILE.pack(_FILE_MAGIC, _VERSION)
        whole = start + _CRC.pack(zlib.crc32(start))
        try:
            there = bytes(self._read(0, len(whole)))
            if there == whole:
                return len(whole)
            if len(there) < len(whole) and whole.startswith(there):  # empty, or killed while it was created
                self._write([whole], 0)
                os.fsync(self._fd)
                self._sync_folder()
                return len(whole)
        except OSError as e:
            raise self._error("the head of the file cannot be read or written", e, "Free space or choose another disk.") from e
        if there.startswith(_FILE_MAGIC) and len(there) == len(whole) and _CRC.pack(zlib.crc32(there[: _FILE.size])) == there[_FILE.size :]:
            version = _FILE.unpack(there[: _FILE.size])[1]
            raise DataFormatError(
                f"log {self.path}: version {version}, this fastsharp reads version {_VERSION}. Use the fastsharp that wrote it."
            )
        raise DataFormatError(
            f"log {self.path}: not a log of fastsharp, or its first bytes are damaged. The file is left as it is; give another path."
        )

    def _next(self) -> tuple[bytearray, bytearray] | None:
        """The bytes of the record at `_end`, None unless it is whole."""
        fixed = self._read(self._end, _RECORD.size + _CRC.size)
        if len(fixed) < _RECORD.size + _CRC.size:
            return None
        magic, index, head, body = _RECORD.unpack_from(fixed)
        at = self._end + len(fixed)
        if magic != _RECORD_MAGIC or index != self.index or head > MAX_HEAD or body > os.fstat(self._fd).st_size - at - head:
            return None
        raw = self._read(at, head)
        content = self._read(at + head, body)
        crc = zlib.crc32(content, zlib.crc32(raw, zlib.crc32(fixed[: _RECORD.size])))
        return (raw, content) if _CRC.unpack_from(fixed, _RECORD.size)[0] == crc else None

    def _read(self, offset: int, length: int) -> bytearray:
        """Up to `length` bytes from `offset`, fewer only at the end of the file."""
        out = bytearray(length)
        view, done = memoryview(out), 0
        while done < length:
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                view.release()
                del out[done:]
                break
            done += got
        return out

    def _write(self, parts: list[Buffer], offset: int) -> None:
        """All bytes of `parts` at `offset`, in as many calls as it takes."""
        left = [memoryview(p) for p in parts if len(p)]
        while left:
            done = os.pwritev(self._fd, left, offset)
            if done == 0:
                raise OSError(errno.EIO, "nothing was written")
            offset += done
            while left and done >= left[0].nbytes:
                done -= left.pop(0).nbytes
            if done:
                left[0] = left[0][done:]

    def _sync(self) -> None:
        began = time.monotonic()
        os.fsync(self._fd)
        self._dirty = False
        self._synced_at = time.monotonic()
        self._sync_cost = self._synced_at - began

    def _sync_folder(self) -> None:
        """Put the name of a new file on the disk, too; some file systems refuse it and need it not."""
        with contextlib.suppress(OSError):
            folder = os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise self._in_use() from e
            self.locked = False

    def _refuse_if_open(self, found: os.stat_result) -> None:
        if (os.getpid(), found.st_dev, found.st_ino) in _OPEN:
            raise self._in_use()

    def _in_use(self) -> LogError:
        return LogError(f"log {self.path}: in use by another run. Wait until that has ended, or give another path.")

    def _error(self, what: str, e: OSError, advice: str) -> LogError:
        return LogError(f"log {self.path}: {what} ({e.strerror or e}).\n{advice}")
