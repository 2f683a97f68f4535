"""CIFAR-10, 50,000 + 10,000 RGB images of 32 x 32 in ten classes, from the user's own files.

In each place, the first of: cifar-10-binary.tar.gz, cifar-10-batches-bin/, cifar-10-batches-py/ (through torchvision's
md5 check, as these files are pickles), and the lossy JPEG copy. Source: Krizhevsky 2009, "Learning Multiple Layers of
Features from Tiny Images".
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsharp.data import _files, cifar10_jpeg
from fastsharp.data.cifar10_jpeg import CLASSES
from fastsharp.data.record import ImageData, Pick
from fastsharp.errors import DataFormatError, DataNotFoundError

NAME = "CIFAR-10"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ARCHIVE, FOLDER, PICKLED = "cifar-10-binary.tar.gz", "cifar-10-batches-bin", "cifar-10-batches-py"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # of ARCHIVE, 170,052,171 bytes
RECORDS = 10_000  # images in each of the six files
_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


def read(split: str = "train", root: str | os.PathLike[str] | None = None, download: bool = False, pick: Pick | None = None) -> ImageData:
    """One split from the first place that has any form of the set; `.name` and `.lossy` say which form it was.

    split     "train" | "test"
    root      folder searched first; then $FASTSHARP_DATA and the user's cache
    download  fetch through torchvision when it is nowhere; False never touches the network
    pick      which images to keep, chosen by their labels; None keeps all
    """
    _files.check_split(split, NAME)
    looked = _files.places(root)
    for place in looked:
        if (place / ARCHIVE).is_file():
            return _from_archive(place / ARCHIVE, split).picked(pick)
        if all((place / FOLDER / f).is_file() for f in _files_of(split)):
            return _from_folder(place / FOLDER, split).picked(pick)
        if (place / PICKLED).is_dir():
            return _from_torchvision(place, split, download=False).picked(pick)
        if (copy := cifar10_jpeg.find([place])) is not None:
            return cifar10_jpeg.read_archive(copy, split, pick)
    if download:
        folder = Path(root).expanduser() if root is not None else _files.cache_folder()
        return _from_torchvision(folder, split, download=True).picked(pick)
    raise _files.not_found(
        NAME,
        f"{ARCHIVE}, {FOLDER}/, {PICKLED}/ or {cifar10_jpeg.ARCHIVE}",
        looked,
        f"Put {ARCHIVE} (www.cs.toronto.edu/~kriz/cifar.html) into one of them and name it with root=,\n"
        "or call fastsharp.data.load('cifar10', download=True).",
    )


def _files_of(split: str) -> list[str]:
    return ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]


def _from_archive(path: Path, split: str) -> ImageData:
    digest = _files.sha256_file(path)
    _files.check_hash(path, digest, SHA256, "the archive")
    blobs = {}
    wanted = {f"{FOLDER}/{f}": f for f in _files_of(split)}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for m in tar:
                if m.name in wanted and m.isreg() and m.size == RECORDS * _RECORD:
                    content = tar.extractfile(m)
                    blobs[wanted[m.name]] = content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise DataFormatError(f"{path}: not a readable tar.gz ({e}). Fetch it again; it was left untouched.") from e
    if absent := sorted(set(wanted.values()) - blobs.keys()):
        raise DataFormatError(f"{path}: has no regular file {FOLDER}/{absent[0]} of {RECORDS * _RECORD} bytes. Fetch the archive again.")
    images, labels = _unpack([(f"{path}: {f}", blobs[f]) for f in _files_of(split)])
    return _data(images, labels, split, path, digest, pinned=True)


def _from_folder(folder: Path, split: str) -> ImageData:
    blobs = []
    for f in _files_of(split):
        size = (folder / f).stat().st_size
        if size != RECORDS * _RECORD:
            raise DataFormatError(
                f"{folder / f}: at byte {min(size, RECORDS * _RECORD)}: expected the end at {RECORDS * _RECORD} bytes "
                f"({RECORDS} records of {_RECORD}), found {size}.\nFetch the file again; it was left untouched."
            )
        blobs.append((str(folder / f), (folder / f).read_bytes()))
    images, labels = _unpack(blobs)
    digest = _files.combined(hashlib.sha256(b).hexdigest() for _, b in blobs)
    return _data(images, labels, split, folder, digest, pinned=False)  # no published hash of the single files is known


def _unpack(blobs: list[tuple[str, bytes]]) -> tuple[torch.Tensor, torch.Tensor]:
    for where, blob in blobs:
        bad = np.flatnonzero(np.frombuffer(blob, np.uint8)[::_RECORD] >= len(CLASSES))
        if bad.size:
            offset = int(bad[0]) * _RECORD
            raise DataFormatError(f"{where}: at byte {offset}: expected a label of 0..9, found {blob[offset]}. Fetch the file again.")
    records = np.frombuffer(b"".join(b for _, b in blobs), np.uint8).reshape(-1, _RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(records[:, 0].astype(np.int64))


def _from_torchvision(place: Path, split: str, download: bool) -> ImageData:
    """Through torchvision alone, which compares every pickled file with its md5 before it unpickles one."""
    try:
        datasets: Any = import_module("torchvision.datasets")
        source = datasets.CIFAR10(str(place), train=split == "train", download=download)
    except ImportError as e:
        raise DataNotFoundError(
            f"{place / PICKLED}: reading CIFAR-10's pickled form needs torchvision (pip install torchvision),\n"
            f"or put {ARCHIVE} beside it, which needs nothing."
        ) from e
    except (OSError, RuntimeError) as e:
        if download:
            raise DataNotFoundError(
                f"{NAME} was not found and its download into {place} failed: {e}\n"
                f"Check the network, or put {ARCHIVE} into a folder and name it with root=."
            ) from e
        raise DataFormatError(
            f"{place / PICKLED}: torchvision's md5 check of the batch files failed, or one is missing; nothing was unpickled.\n"
            "Unpack cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a) again; the files were left untouched."
        ) from e
    digest = _files.combined(expected for _, expected in (source.test_list if split == "test" else source.train_list))
    images, labels = torch.from_numpy(source.data.copy()), torch.tensor(source.targets, dtype=torch.int64)
    return _data(images, labels, split, place / PICKLED, digest, pinned=True)


def _data(images: torch.Tensor, labels: torch.Tensor, split: str, source: Path, digest: str, pinned: bool) -> ImageData:
    return ImageData(
        images=images,
        labels=labels,
        classes=CLASSES,
        name=NAME,
        split=split,
        source=str(source),
        sha256=digest,
        pinned=pinned,
        lossy=False,
        mean=MEAN,
        std=STD,
    )
