"""Fashion-MNIST, 60,000 + 10,000 grey images of 28 x 28 in ten classes (Zalando SE, MIT).

Read from Debian's package `dataset-fashion-mnist` or from a torchvision root; the content is the same to the byte.
Source: Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms".
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastsharp.data import _files
from fastsharp.data.idx import read_idx
from fastsharp.data.record import ImageData, Pick
from fastsharp.errors import DataNotFoundError

NAME = "Fashion-MNIST"
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MEAN, STD = (0.2860,), (0.3530,)  # of the train split
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SHA256 = {  # of the uncompressed files: gzip headers differ between distributions, the content does not
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_SUBFOLDERS = ("FashionMNIST/raw", "fashion-mnist", ".")  # torchvision's, Debian's, the files themselves


def read(split: str = "train", root: str | os.PathLike[str] | None = None, download: bool = False, pick: Pick | None = None) -> ImageData:
    """One split, hash-checked, from the first place that has both of its files.

    split     "train" | "test"
    root      folder searched first; then $FASTSHARP_DATA, Debian's folder, the user's cache
    download  fetch through torchvision when it is nowhere; False never touches the network
    pick      which images to keep, chosen by their labels; None keeps all
    """
    _files.check_split(split, NAME)
    looked = _files.places(root, DEBIAN)
    names = _names(split)
    found = _find(looked, names)
    if found is None and download:
        found = _download(Path(root).expanduser() if root is not None else _files.cache_folder(), names)
    if found is None:
        raise _files.not_found(
            NAME,
            f"{names[0]}[.gz] and {names[1]}[.gz]",
            looked,
            "On Debian or Ubuntu: apt-get install dataset-fashion-mnist\n"
            "Elsewhere: fastsharp.data.load('fashion_mnist', download=True), or 'fashion_mnist_mini', which is built in.",
        )
    arrays, digests = [], []
    for path, name, ndim in zip(found, names, (3, 1), strict=True):
        array, digest = read_idx(path, ndim)
        _files.check_hash(path, digest, SHA256[name], f"the uncompressed {name}")
        arrays.append(array)
        digests.append(digest)
    return ImageData(
        images=arrays[0],
        labels=arrays[1].to(torch.int64),
        classes=CLASSES,
        name=NAME,
        split=split,
        source=str(found[0].parent),
        sha256=_files.combined(digests),
        pinned=True,
        lossy=False,
        mean=MEAN,
        std=STD,
    ).picked(pick)


def _names(split: str) -> tuple[str, str]:
    prefix = "train" if split == "train" else "t10k"
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _find(looked: list[Path], names: tuple[str, str]) -> list[Path] | None:
    for place in looked:
        for sub in _SUBFOLDERS:
            paths = [next((p for p in (place / sub / n, place / sub / f"{n}.gz") if p.is_file()), None) for n in names]
            hits = [p for p in paths if p is not None]
            if len(hits) == len(names):
                return hits
    return None


def _download(folder: Path, names: tuple[str, str]) -> list[Path] | None:
    try:
        datasets: Any = import_module("torchvision.datasets")
        datasets.FashionMNIST(str(folder), download=True)
    except ImportError as e:
        raise DataNotFoundError(f"{NAME}: download=True needs torchvision. Install it: pip install torchvision") from e
    except (OSError, RuntimeError) as e:
        raise DataNotFoundError(
            f"{NAME} was not found and its download into {folder} failed: {e}\n"
            "Check the network, or on Debian or Ubuntu: apt-get install dataset-fashion-mnist"
        ) from e
    return _find([folder], names)
