"""Losses of whole batches as tasks have them: pixels that are ignored, targets of varying number, in any split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from tests.oracles.dense import dense_hessian

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SPLITS = [(5,), (1, 4), (2, 2, 1)]


def conv() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()


def gap(operator: fastsharp.Hessian, H: torch.Tensor) -> float:
    return float((operator.apply(torch.eye(operator.n, dtype=torch.float64)) - H).norm() / H.norm())


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_segmentation_counts_the_pixels_that_are_labelled(sizes: tuple[int, ...]) -> None:
    labels = torch.randint(3, (5, 4, 4), generator=torch.Generator().manual_seed(2))
    labels[0, 1:], labels[3, :, 2:] = 255, 255
    H = dense_hessian(conv(), lambda call, b: F.cross_entropy(call(b[0]), b[1], ignore_index=255), (IMAGES, labels))
    batches = list(zip(IMAGES.split(sizes), labels.split(sizes), strict=True))
    assert gap(fastsharp.Hessian(conv(), batches, nn.CrossEntropyLoss(ignore_index=255)), H) <= 1e-10


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_detection_with_a_dict_of_losses_and_targets_of_varying_number(sizes: tuple[int, ...]) -> None:
    numbers = (2, 0, 3, 1, 2)
    targets = [{"pixels": torch.arange(n) * 5, "classes": torch.arange(n) % 3} for n in numbers]

    def losses(call: Any, images: torch.Tensor, wanted: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        scores = call(images).flatten(2).transpose(1, 2)
        found = [F.cross_entropy(s[t["pixels"]], t["classes"], reduction="sum") for s, t in zip(scores, wanted, strict=True)]
        return {"classes": torch.stack(found).sum(), "size": 0.1 * scores.square().sum()}

    def loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        return sum(losses(model, batch["images"], batch["targets"]).values()), len(batch["images"])

    def whole(call: Any, images: torch.Tensor) -> torch.Tensor:
        return sum(losses(call, images, targets).values()) / 5

    H, batches, start = dense_hessian(conv(), whole, IMAGES), [], 0
    for size in sizes:
        batches.append({"images": IMAGES[start : start + size], "targets": targets[start : start + size]})
        start += size
    assert gap(fastsharp.Hessian(conv(), batches, fastsharp.batch_loss(loss)), H) <= 1e-10
