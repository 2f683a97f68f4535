"""Generated images, 28 x 28 grey in ten classes: for doctests and timings, no files and no meaning."""

from __future__ import annotations

import hashlib
import os

import torch

from fastsharp.data import _files
from fastsharp.data.record import ImageData, Pick

NAME = "synthetic (noisy class patterns)"
_COUNT = {"train": 2000, "test": 1000}


def read(split: str = "train", root: str | os.PathLike[str] | None = None, download: bool = False, pick: Pick | None = None) -> ImageData:
    """Each class is one smooth random pattern, each image its pattern plus noise; always the same pixels.

    root and download are accepted and unused. The integer generator is used alone, so that the pixels do not depend on
    how a platform rounds.
    """
    _files.check_split(split, NAME)
    coarse = torch.randint(0, 256, (10, 7, 7), generator=torch.Generator().manual_seed(2022))
    pattern = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)  # (10, 28, 28)
    g = torch.Generator().manual_seed(0 if split == "train" else 1)
    labels = torch.arange(_COUNT[split]) % 10
    noise = torch.randint(0, 256, (labels.numel(), 28, 28), generator=g)
    images = ((pattern[labels] + noise) // 2).to(torch.uint8)
    return ImageData(
        images=images,
        labels=labels,
        classes=tuple(f"pattern {i}" for i in range(10)),
        name=NAME,
        split=split,
        source="generated",
        sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        pinned=False,
        lossy=False,
        mean=(0.5,),
        std=(0.2,),
    ).picked(pick)
