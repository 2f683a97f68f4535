"""The IDX reader gives back what was written, and says where a file lies."""

from __future__ import annotations

import gzip
import hashlib
import struct

import pytest
import torch

from fastsharp.data.idx import read_idx
from fastsharp.errors import DataFormatError

SHAPE = (5, 4, 3)
BODY = bytes(range(60))
GOOD = struct.pack(">HBB3I", 0, 8, 3, *SHAPE) + BODY


@pytest.mark.parametrize("zipped", [False, True])
def test_round_trip_with_digest_of_the_uncompressed_content(tmp_path, zipped):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(GOOD) if zipped else GOOD)
    array, digest = read_idx(path, 3)
    assert torch.equal(array, torch.arange(60, dtype=torch.uint8).reshape(SHAPE))
    assert digest == hashlib.sha256(GOOD).hexdigest()
    array += 1  # owns its memory and may be written


LIES = {
    "prefix": (struct.pack(">HBB3I", 7, 8, 3, *SHAPE) + BODY, "byte 0", "0x0007"),
    "dtype": (struct.pack(">HBB3I", 0, 13, 3, *SHAPE) + BODY, "byte 2", "code 13"),
    "axes": (struct.pack(">HBB1I", 0, 8, 1, 60) + BODY, "byte 3", "found 1"),
    "empty": (b"", "byte 0", "0 bytes"),
    "header cut": (GOOD[:10], "byte 4", "6 bytes"),
    "zero size": (struct.pack(">HBB3I", 0, 8, 3, 0, 4, 3), "byte 4", "(0, 4, 3)"),
    "too large": (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "byte 4", "4294967295"),
    "short": (GOOD[:-1], "byte 16", "found 59"),
    "long": (GOOD + b"x", "byte 16", "found more"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_lying_header_is_an_error_with_offset_and_both_values(tmp_path, name, zipped):
    content, offset, found = LIES[name]
    path = tmp_path / "lying"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataFormatError, match="expected") as e:
        read_idx(path, 3)
    assert str(path) in str(e.value)
    assert offset in str(e.value)
    assert found in str(e.value)


def test_every_truncation_of_a_gzip_file_is_an_error(tmp_path):
    whole = gzip.compress(GOOD)
    path = tmp_path / "cut.gz"
    for length in range(len(whole) - 8):  # the last 8 bytes are gzip's own checksum
        path.write_bytes(whole[:length])
        with pytest.raises(DataFormatError):
            read_idx(path, 3)


def test_every_flipped_byte_is_an_error_or_changes_the_digest(tmp_path):
    path = tmp_path / "flipped"
    honest = hashlib.sha256(GOOD).hexdigest()
    for i in range(len(GOOD)):
        path.write_bytes(GOOD[:i] + bytes([GOOD[i] ^ 0x10]) + GOOD[i + 1 :])
        try:
            _, digest = read_idx(path, 3)
        except DataFormatError:
            continue
        assert digest != honest
