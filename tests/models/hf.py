"""Tiny transformers with random weights, and products by double backward of a loss written here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

tf = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[models]'")
VOCAB, CLASSES = 23, 3
_ENCODER = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": CLASSES,
}


def build(name: str, attention: str = "sdpa") -> nn.Module:
    """The model of that name in float64 and eval mode, the same weights for both kinds of attention."""
    torch.manual_seed(0)
    head, common = getattr(tf, name), {"attn_implementation": attention}
    if name.startswith("Bert"):
        model = head(tf.BertConfig(vocab_size=VOCAB, max_position_embeddings=8, **_ENCODER, **common))
    elif name.startswith("ViT"):
        model = head(tf.ViTConfig(image_size=8, patch_size=4, num_channels=1, **_ENCODER, **common))
    else:
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = head(tf.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=8, num_labels=CLASSES, **ids, **common))
    spread(model)
    return model.double().eval()


def spread(model: nn.Module) -> None:
    """Initial weights are so small that the curvature would be that of a linear model; a LoRA's second factor is zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.2)


def padded(lengths: tuple[int, ...], width: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Right-padded sequences of random tokens: input_ids, attention_mask, labels with -100 in the padding."""
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def next_token_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over all predicted tokens, sequence by sequence without padding, from logits alone."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        own = ids[: int(mask.sum())][None]
        logits = model(input_ids=own).logits
        total = total + F.cross_entropy(logits[0, :-1], own[0, 1:], reduction="sum")
        count += own.shape[1] - 1
    return total / count


def double_backward(model: nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, V H) for two vectors, by torch's own double backward."""
    params = [p for p in model.parameters() if p.requires_grad]
    V = torch.randn(2, sum(p.numel() for p in params), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        flat = _flat(torch.autograd.grad(loss(), params, create_graph=True, **options))
        rows = [_flat(torch.autograd.grad(flat @ v, params, retain_graph=True, **options)) for v in V]
    return V, torch.stack(rows).detach()


def _flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def gap(A: torch.Tensor, B: torch.Tensor) -> float:
    """||A - B|| / ||B||."""
    return float((A - B).norm() / B.norm())
