"""ImageData: one split of an image set as it was read, with the record of where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastsharp.errors import DataFormatError, InputError

Pick = Callable[[torch.Tensor, str], torch.Tensor]  # (labels (N,), name of the data) -> positions (M,)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels of one split, unscaled, in a fixed order; frozen, and nothing else of the file is kept.

    An image set with fewer images than its source says which: `indices` are positions in the source's full split.
    """

    images: torch.Tensor  # (N, H, W) or (N, H, W, C) uint8
    labels: torch.Tensor  # (N,) int64, 0 <= label < len(classes)
    classes: tuple[str, ...]
    name: str  # as results must call it: "Fashion-MNIST", "CIFAR-10 (JPEG copy)"
    split: str  # "train" | "test"
    source: str  # file or folder that was read
    sha256: str  # of the source's content: one digest, or that of the list of digests where there are several files
    pinned: bool  # the hash was compared with one that this package knows
    lossy: bool  # pixels differ from the published set
    mean: tuple[float, ...]  # per channel, of pixel / 255 over the train split
    std: tuple[float, ...]
    indices: torch.Tensor | None = None  # (N,) int64, or None for the whole split in the source's order

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64 or self.images.ndim not in (3, 4):
            raise DataFormatError(
                f"{self.name}: images are {self.images.dtype} {tuple(self.images.shape)} and labels {self.labels.dtype},\n"
                "expected uint8 (N, H, W) or (N, H, W, C) and int64."
            )
        if self.labels.shape != self.images.shape[:1]:
            raise DataFormatError(
                f"{self.name} ({self.source}): {self.images.shape[0]} images but labels of shape {tuple(self.labels.shape)}.\n"
                "The two files do not belong together; get both from the same source."
            )
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataFormatError(
                f"{self.name} ({self.source}): labels span {int(self.labels.min())}..{int(self.labels.max())}, "
                f"expected 0..{len(self.classes) - 1}.\nThe label file is damaged or belongs to another set."
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    def provenance(self) -> dict[str, Any]:
        """The record for a result, JSON-ready: everything but the arrays, with a digest of images, labels and order."""
        digest = hashlib.sha256()
        for t in (self.images, self.labels):
            digest.update(t.contiguous().numpy().tobytes())
        return {
            "name": self.name,
            "split": self.split,
            "count": len(self),
            "subset": self.indices is not None,
            "source": self.source,
            "source_sha256": self.sha256,
            "source_pinned": self.pinned,
            "content_sha256": digest.hexdigest(),
            "lossy": self.lossy,
            "classes": list(self.classes),
        }

    def picked(self, pick: Pick | None) -> ImageData:
        """The images that `pick` chooses by their labels; all of them for None."""
        return self if pick is None else self.take(pick(self.labels, self.name))

    def take(self, positions: torch.Tensor) -> ImageData:
        """The images at `positions` (M,) int64, in that order; `indices` go on pointing into the full split."""
        indices = positions if self.indices is None else self.indices[positions]
        return replace(self, images=self.images[positions], labels=self.labels[positions], indices=indices)


def balanced(labels: torch.Tensor, samples: int, seed: int, what: str) -> torch.Tensor:
    """Positions (samples,) int64 of a seeded subset with equal class counts, in seeded order.

    labels    (N,) int64
    samples   1 <= samples <= N; a remainder over the number of classes goes to classes drawn by the seed
    what      the data's name, for the message

    A class with fewer images than its share is an error: a subset that looks balanced must be.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= labels.numel():
        raise InputError(f"{what}: samples is {samples!r}, expected a whole number from 1 to {labels.numel()}, or None for all.")
    g = torch.Generator().manual_seed(seed)
    present, counts = torch.unique(labels, return_counts=True)
    share, extra = divmod(samples, present.numel())
    lucky = set(torch.randperm(present.numel(), generator=g)[:extra].tolist())
    chosen = []
    for i, (label, count) in enumerate(zip(present.tolist(), counts.tolist(), strict=True)):
        want = share + (i in lucky)
        if want > count:
            raise InputError(
                f"{what}: {samples} balanced samples need {want} of class {label}, which has {count}.\n"
                f"Ask for at most {int(counts.min()) * present.numel()} samples, or for samples=None."
            )
        members = (labels == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(count, generator=g)[:want]])
    positions = torch.cat(chosen)
    return positions[torch.randperm(samples, generator=g)]
