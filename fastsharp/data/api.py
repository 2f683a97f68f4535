"""load and loader: from the name of an image set to batches in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch

from fastsharp.data import cifar10, cifar10_jpeg, fashion_mnist, fashion_mnist_mini, synthetic
from fastsharp.data.record import ImageData, Pick, balanced
from fastsharp.errors import InputError


class _Read(Protocol):
    def __call__(self, split: str, root: str | os.PathLike[str] | None, download: bool, pick: Pick | None) -> ImageData: ...


_SOURCES: dict[str, _Read] = {
    "fashion_mnist_mini": fashion_mnist_mini.read,
    "fashion_mnist": fashion_mnist.read,
    "cifar10": cifar10.read,
    "cifar10_jpeg": cifar10_jpeg.read,
    "synthetic": synthetic.read,
}


def names() -> tuple[str, ...]:
    """The names that `load` knows; "fashion_mnist_mini" and "synthetic" need no files."""
    return tuple(_SOURCES)


def load(
    name: str,
    *,
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> ImageData:
    """One split of an image set, or a seeded subset of it with equal class counts.

    name      one of `names()`
    split     "train" | "test"
    root      folder searched first; then $FASTSHARP_DATA, the system's folder, the user's cache. The first place that
              has the data wins, and the record says which it was
    samples   None for the whole split, else a class-balanced subset; `indices` of the record say which images
    seed      of the subset
    download  False (the default) never touches the network; absent data are one DataNotFoundError saying what to do

    "cifar10" takes the lossless files where a place has them, else the JPEG copy: `.name` and `.lossy` tell.
    Damaged or foreign files are a DataFormatError and stay untouched. Nothing is unpickled, except the CIFAR-10 batch
    files that torchvision has compared with its own pinned md5 before.
    """
    if name not in _SOURCES:
        raise InputError(f"load: there is no data set {name!r}. Known: {', '.join(_SOURCES)}.")

    def pick(labels: torch.Tensor, what: str) -> torch.Tensor:
        return balanced(labels, samples or 0, seed, what)

    return _SOURCES[name](split, root, download, None if samples is None else pick)


def loader(
    data: ImageData,
    *,
    batch_size: int = 500,
    normalize: bool = True,
    target: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All images as batches (x, y) in the record's order: no shuffling, no augmentation, the last batch kept.

    x          (b, C, H, W) float32: pixel / 255, and with `normalize` (. - mean) / std per channel of the train split
    y          (b,) int64, or target(labels) of the batch
    memory     the whole split as float32, 4 bytes a pixel
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"loader: batch_size is {batch_size!r}, expected a whole number of at least 1.")
    images = data.images[:, None] if data.images.ndim == 3 else data.images.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (data.mean, data.std))
    batches = []
    for x, y in zip(torch.split(images, batch_size), torch.split(data.labels, batch_size), strict=True):
        x = x.to(torch.float32).div_(255)
        if normalize:
            x = x.sub_(mean).div_(std)
        batches.append((x.contiguous(), y.clone() if target is None else target(y)))
    return batches
