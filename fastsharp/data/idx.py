"""IDX, the file format of the MNIST family, plain or gzip; every number in the header is checked before it is believed."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from fastsharp.errors import DataFormatError

_UINT8 = 8  # the dtype code of unsigned bytes, the only one the family uses
_MAX_BYTES = 1 << 30  # no set of the family is near it; a header beyond it is a lie or a bomb


def read_idx(path: Path, ndim: int) -> tuple[torch.Tensor, str]:
    """The array in an IDX file and the sha256 of its uncompressed content.

    path      the file, gzip if it begins with 1f 8b (so .gz or not, whatever its name says)
    ndim      number of axes the caller expects: 3 for images, 1 for labels
    ->        uint8 tensor that owns its memory; hex digest

    Header, big-endian: two zero bytes, dtype code, number of axes, then one uint32 per axis; the bytes follow.
    At most one byte more than the header announces is ever decompressed.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as f:
            head = f.read(4)
            _need(path, 0, "a header of 4 bytes", len(head) == 4, f"{len(head)} bytes")
            zero, code, axes = struct.unpack(">HBB", head)
            _need(path, 0, "two zero bytes", zero == 0, f"0x{zero:04x}")
            _need(path, 2, "dtype code 8 (unsigned byte)", code == _UINT8, f"code {code}")
            _need(path, 3, f"{ndim} axes", axes == ndim, f"{axes}")
            sizes = f.read(4 * ndim)
            _need(path, 4, f"{ndim} sizes of 4 bytes", len(sizes) == 4 * ndim, f"{len(sizes)} bytes")
            shape = struct.unpack(f">{ndim}I", sizes)
            count = 1
            for s in shape:
                count *= s
            _need(path, 4, f"sizes of at most {_MAX_BYTES} elements in all", 0 < count <= _MAX_BYTES, f"{shape}")
            start = 4 + 4 * ndim
            body = f.read(count + 1)
            found = "more" if len(body) > count else str(len(body))
            _need(path, start, f"{count} bytes, as the sizes {shape} say", len(body) == count, found)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataFormatError(
            f"{path}: the gzip stream is damaged or cut short ({e}).\nFetch the file again; it was left untouched."
        ) from e
    digest = hashlib.sha256(head + sizes + body).hexdigest()
    # a copy, since frombuffer gives a read-only view and torch tensors are writable
    return torch.from_numpy(np.frombuffer(body, np.uint8).reshape(shape).copy()), digest


def _need(path: Path, offset: int, expected: str, ok: bool, found: str) -> None:
    if not ok:
        raise DataFormatError(
            f"{path}: not the IDX file it should be, at byte {offset}: expected {expected}, found {found}.\n"
            "Fetch the file again; it was left untouched."
        )
