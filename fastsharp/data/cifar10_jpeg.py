"""CIFAR-10 as 60,000 JPEG files in one tar.xz: lossy, so results on it do not compare with published CIFAR-10 figures.

The archive is the user's and of unclear licence; it is never shipped. Its hash is checked before it is opened, its
members are read in memory by expected name alone, and nothing is ever extracted to disk.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsharp.data import _files
from fastsharp.data.record import ImageData, Pick
from fastsharp.errors import DataFormatError

NAME = "CIFAR-10 (JPEG copy)"
ARCHIVE = "cifar10_jpg.tar.xz"
SHA256 = "e5fae64732f3747506b2fff86b92b1e090259b0079d22a3f940461f396ece23b"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)  # of the copy's train split
PER_CLASS = {"train": 5000, "test": 1000}

_Member = tuple[int, int, bytes]  # class, number, the file
_MEMBER = re.compile(r"(train|test)/([a-z]+)/(\d{4})\.jpg")
_IGNORED = re.compile(r"README\.md|(train|test)(/[a-z]+)?/?")
_MAX_MEMBERS, _MAX_JPEG = 100_000, 100_000  # headers and 32 x 32 JPEGs (about 1 KB) stay far below


def read(split: str = "train", root: str | os.PathLike[str] | None = None, download: bool = False, pick: Pick | None = None) -> ImageData:
    """One split, decoded with Pillow in memory, in a fixed shuffled order; `download` is unused, there is no source.

    The archive is sorted by class; so that no contiguous part is one class, the order is a fixed permutation of it,
    and `indices` are positions in the sorted archive.
    """
    _files.check_split(split, NAME)
    looked = _files.places(root)
    path = find(looked)
    if path is None:
        raise _files.not_found(NAME, ARCHIVE, looked, "Put the archive into one of these folders, or name its folder with root=.")
    return read_archive(path, split, pick)


def find(looked: list[Path]) -> Path | None:
    """The archive in the first folder that has it."""
    return next((p / ARCHIVE for p in looked if (p / ARCHIVE).is_file()), None)


def read_archive(path: Path, split: str, pick: Pick | None = None) -> ImageData:
    """The split in one archive whose hash is the pinned one; anything unexpected inside is a DataFormatError.

    Only picked images are decoded: a subset takes seconds, the whole train split about 12 s, once per process.
    """
    digest = _files.sha256_file(path)
    _files.check_hash(path, digest, SHA256, "the archive")
    members = _members(path, split, digest)
    labels = torch.tensor([label for label, _, _ in members])
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(members)))  # RandomState's stream is frozen
    if pick is None:
        images = _all(path, split, digest)[order]
    else:
        order = order[pick(labels[order], NAME)]
        images = _decode(path, split, [members[i] for i in order.tolist()])
    return ImageData(
        images=images,
        labels=labels[order],
        classes=CLASSES,
        name=NAME,
        split=split,
        source=str(path),
        sha256=digest,
        pinned=True,
        lossy=True,
        mean=MEAN,
        std=STD,
        indices=order,
    )


@lru_cache(maxsize=2)
def _all(path: Path, split: str, digest: str) -> torch.Tensor:
    return _decode(path, split, _members(path, split, digest))


def _decode(path: Path, split: str, members: list[_Member]) -> torch.Tensor:
    images = np.empty((len(members), 32, 32, 3), np.uint8)
    for i, (label, number, raw) in enumerate(members):
        images[i] = _pixels(raw, f"{path}: {split}/{CLASSES[label]}/{number:04d}.jpg")
    return torch.from_numpy(images)


@lru_cache(maxsize=2)
def _members(path: Path, split: str, digest: str) -> list[_Member]:
    """(class, number, JPEG bytes), sorted; regular files with expected names, every class complete."""
    jpegs: dict[tuple[int, int], bytes] = {}
    try:
        with tarfile.open(path, "r:xz") as tar:
            for count, m in enumerate(tar):
                if count >= _MAX_MEMBERS or m.size > _MAX_JPEG:
                    raise DataFormatError(f"{path}: member {m.name!r} of {m.size} bytes is beyond what this set holds. It was not read.")
                match = _MEMBER.fullmatch(m.name)
                known = match is not None and match[2] in CLASSES and m.isreg()
                if not known and not (_IGNORED.fullmatch(m.name) and (m.isdir() or m.isreg())):
                    kind = "link or device" if not (m.isreg() or m.isdir()) else "name"
                    raise DataFormatError(
                        f"{path}: member {m.name!r} has an unexpected {kind}.\n"
                        "Expected regular files (train|test)/<class>/0000.jpg. Nothing was extracted; do not use this archive."
                    )
                if known and match is not None and match[1] == split:
                    content = tar.extractfile(m)
                    jpegs[CLASSES.index(match[2]), int(match[3])] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError) as e:
        raise DataFormatError(f"{path}: not a readable tar.xz ({e}). Fetch it again; it was left untouched.") from e
    counts = [sum(label == c for label, _ in jpegs) for c in range(len(CLASSES))]
    if counts != [PER_CLASS[split]] * len(CLASSES):
        raise DataFormatError(f"{path}: {split} images per class are {counts}, expected {PER_CLASS[split]} of each. It is incomplete.")
    return [(label, number, raw) for (label, number), raw in sorted(jpegs.items())]


def _pixels(raw: bytes, where: str) -> Any:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw), formats=("JPEG",)) as im:
            if im.size != (32, 32):  # before decoding, so that a huge image costs nothing
                raise DataFormatError(f"{where}: the image is {im.size[0]} x {im.size[1]} pixels, expected 32 x 32.")
            return np.asarray(im.convert("RGB"))
    except (OSError, SyntaxError) as e:
        raise DataFormatError(f"{where}: not a readable JPEG ({e}).") from e
