"""The embedded sample: 1,000 + 1,000 images of Fashion-MNIST, 100 per class in each split, in a fixed shuffled order.

It has its own name so that no figure from the sample passes for the full set. Built by tools/build_mini.py; licence
notice in LICENSE-fashion-mnist.txt beside it.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from fastsharp.data import _files
from fastsharp.data.fashion_mnist import CLASSES, MEAN, STD
from fastsharp.data.record import ImageData, Pick

NAME = "Fashion-MNIST mini"
FILE = "fashion_mnist_mini.npz"


def read(split: str = "train", root: str | os.PathLike[str] | None = None, download: bool = False, pick: Pick | None = None) -> ImageData:
    """One split of the sample; root and download are accepted and unused, since the file is part of the package.

    `indices` are positions in the full Fashion-MNIST split; mean and std are those of the full train split, so that a
    network trained on the full set sees the same input.
    """
    _files.check_split(split, NAME)
    path = _files.own_file(FILE)
    with np.load(path, allow_pickle=False) as z:
        images, labels, index = (torch.from_numpy(z[f"{split}_{key}"]) for key in ("images", "labels", "index"))
    return ImageData(
        images=images,
        labels=labels.to(torch.int64),
        classes=CLASSES,
        name=NAME,
        split=split,
        source=f"fastsharp/data/{FILE}",
        sha256=_files.sha256_file(path),
        pinned=True,
        lossy=False,
        mean=MEAN,
        std=STD,
        indices=index.to(torch.int64),
    ).picked(pick)
