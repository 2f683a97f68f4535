"""Tiny transformers with random weights, and products by double backward of a loss written here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.double import spread

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
    elif name.startswith("DistilBert"):
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "num_labels": CLASSES}
        model = head(tf.DistilBertConfig(vocab_size=VOCAB, max_position_embeddings=8, **sizes, **common))
    elif name.startswith("Llama"):
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = head(tf.LlamaConfig(vocab_size=VOCAB, max_position_embeddings=8, pad_token_id=0, **sizes, **common))
    elif name.startswith("T5"):
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
        model = head(tf.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0, **sizes))
    else:
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = head(tf.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=8, num_labels=CLASSES, **ids, **common))
    spread(model)
    return model.double().eval()


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
