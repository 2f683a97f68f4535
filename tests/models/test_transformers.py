"""transformers' models with random weights: products against double backward, padding in any split, checkpoints, adapters."""

from __future__ import annotations

import copy
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import DisconnectedLossError
from tests.models.double import double_backward, gap, spread
from tests.models.hf import CLASSES, build, next_token_loss, padded, tf
from tests.unchanged import refuses, unchanged

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
GATE = 1e-10
ROUNDED = 8 * torch.finfo(torch.float32).eps  # where the reference itself casts to float32: RMS norms, rotations, T5's softmax
LM = padded((6, 3, 5, 2, 6), 6)
TEXT = {"input_ids": LM["input_ids"], "attention_mask": LM["attention_mask"], "labels": torch.arange(5) % CLASSES}
TAGS = LM | {"labels": LM["labels"].remainder(CLASSES).masked_fill(LM["labels"] == -100, -100)}
IMAGES = {
    "pixel_values": torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "labels": torch.arange(4) % CLASSES,
}
FAMILIES = {
    "BertForSequenceClassification": TEXT,
    "BertForTokenClassification": TAGS,
    "BertForMaskedLM": LM,
    "GPT2LMHeadModel": LM,
    "GPT2ForSequenceClassification": TEXT,
    "ViTForImageClassification": IMAGES,
    "DistilBertForSequenceClassification": TEXT,
    "LlamaForCausalLM": LM,
    "T5ForConditionalGeneration": LM,
}


def own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy from logits in float64; transformers' own would round them to float32 first."""
    given = batch if "Conditional" in type(model).__name__ else {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = model(**given).logits, batch["labels"]  # an encoder and decoder shifts the labels to get its inputs
    if "LM" in type(model).__name__ and "Masked" not in type(model).__name__:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_products_are_those_of_double_backward(name: str, attention: str) -> None:
    batch, reference, model = FAMILIES[name], build(name), build(name, attention)
    V, HV = double_backward(reference, lambda: own_loss(reference, batch))  # sdpa casts nothing; eager attention does
    with unchanged(model):
        hessian, ggn = fastsharp.Hessian(model, [batch]), fastsharp.GGN(model, [batch])
        assert gap(hessian.apply(V), HV) <= (ROUNDED if name.startswith(("Llama", "T5")) else GATE)
        assert gap(ggn.apply(V), fastsharp.GGN(model, [batch], backend="autograd").apply(V)) <= GATE
        fastsharp.lanczos(model, [batch], k=1, tol=1e-2)
    assert gap(ggn.apply(V), HV) > 1e-4
    found = fastsharp.explain(model, batch)
    assert found.backend == "rop" and set(found.islands) <= {"cat.default"}


def test_tied_embeddings_count_once() -> None:
    model = build("GPT2LMHeadModel")
    operator = fastsharp.Hessian(model, [LM])
    assert operator.n == sum(p.numel() for p in model.parameters())
    assert any("lm_head.weight = transformer.wte.weight" in note for note in operator.notes)


SPLITS = [(5,), (1, 4), (2, 3), (4, 1), (1, 1, 1, 1, 1), (3, 1, 1)]


def parts(batch: dict[str, torch.Tensor], sizes: tuple[int, ...], *, trimmed: bool) -> list[Any]:
    """The batch cut into these sizes, each as a BatchEncoding; `trimmed` pads each to its own longest sequence alone."""
    found = []
    for a, b in pairwise(accumulate(sizes, initial=0)):
        width = int(batch["attention_mask"][a:b].sum(1).max()) if trimmed else batch["input_ids"].shape[1]
        found.append(tf.BatchEncoding({k: v[a:b, :width] for k, v in batch.items()}))
    return found


@pytest.mark.parametrize("trimmed", [False, True], ids=["one width", "own widths"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_padded_batches_in_any_split_are_the_unpadded_whole(sizes: tuple[int, ...], trimmed: bool) -> None:
    model = build("GPT2LMHeadModel")
    V, HV = double_backward(model, lambda: next_token_loss(model, LM))
    assert gap(fastsharp.Hessian(model, parts(LM, sizes, trimmed=trimmed)).apply(V), HV) <= GATE


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = build("GPT2LMHeadModel")
    V, HV = double_backward(model, lambda: next_token_loss(model, LM))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with unchanged(model):
        operator = fastsharp.Hessian(model, [LM], dropout="eval")
        assert gap(operator.apply(V), HV) <= GATE


@pytest.mark.parametrize("merged", [False, True])
def test_lora_takes_the_adapters_alone(merged: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[models]'")
    base = build("BertForSequenceClassification")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["query", "value"])).double().eval()
    spread(model)
    V, HV = double_backward(model, lambda: own_loss(model, TEXT))
    with unchanged(model):
        operator = fastsharp.Hessian(model, [TEXT])
        assert gap(operator.apply(V), HV) <= GATE
    assert operator.n == 2 * 2 * (2 * 8 + 0) and all("lora_" in name for name in operator.layout.names)
    if merged:  # the weights hold the adapters' product: the adapters themselves no longer reach the loss
        model.merge_adapter()
        with refuses(DisconnectedLossError, "no path to any parameter", model=model):
            fastsharp.Hessian(model, [TEXT]).apply(V)
