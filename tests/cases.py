"""Small networks of every kind that fastsharp must measure, each with uneven batches and, for the oracle, one big batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SIZES = (4, 4, 3)  # uneven on purpose: a mean over batches is not a mean over samples
SAMPLES = sum(SIZES)


@dataclass(frozen=True)
class Net:
    """A model, its data in batches and as one batch, the loss as fastsharp takes it and as the oracle does."""

    name: str
    model: nn.Module
    batches: list[Any]
    whole: Any
    loss_fn: Any
    objective: Callable[[Callable[..., Any], Any], torch.Tensor]
    smooth: bool = True


class Residual(nn.Module):
    """relu(x + conv(x)) and a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.conv(x)).mean((2, 3)))


class ViTBlock(nn.Module):
    """One pre-norm attention block on patches, attention by scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, whose eval mode takes a fused path without derivatives unless that is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TiedLM(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = torch.tanh(self.mix(x)) + x.cumsum(1) / 4
        return self.head(x).transpose(1, 2)  # (N, classes, positions)


class Partly(nn.Module):
    """A network with a parameter that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(6, 7), nn.Linear(2, 3), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.left(a)) * torch.sigmoid(self.right(b)))


class HFStyle(nn.Module):
    """A token classifier that computes its own loss, a mean over the labels that are not -100, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(torch.tanh(self.hidden(self.embed(input_ids).cumsum(1))))
        output = {"logits": logits}
        if labels is not None:
            output["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return output


def _mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 3))


def _bn_cnn() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0.0, 0.5)
            m.running_var.uniform_(0.3, 2.0)
            nn.init.normal_(m.weight, 1.0, 0.2)
            nn.init.normal_(m.bias, 0.0, 0.2)
    return net.eval()


def _deep() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(6, 5)]
    for _ in range(9):
        layers += [nn.Tanh(), nn.Linear(5, 5)]
    net = nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 3))
    for p in net.parameters():
        p.data.mul_(1.7)  # without it ten layers leave nothing of the signal
    return net


def _frozen() -> nn.Module:
    net = _mlp(nn.Tanh)
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def _vectors(width: int = 6) -> torch.Tensor:
    return torch.randn(SAMPLES, width)


def _classes() -> torch.Tensor:
    return torch.arange(SAMPLES) % 3


def _cross_entropy(call: Callable[..., Any], batch: Any) -> torch.Tensor:
    return F.cross_entropy(call(batch[0]), batch[1])


def _padded(shape: tuple[int, ...], classes: int) -> torch.Tensor:
    """Labels of which some are ignored, unevenly so over the batches."""
    labels = torch.randint(classes, shape)
    labels[:4, 2:] = -100
    labels[-1, 0] = -100
    return labels


def cut(whole: Any, sizes: tuple[int, ...] = SIZES) -> list[Any]:
    """One big batch cut into batches of these sizes."""
    batches, start = [], 0
    for size in sizes:
        batches.append(_slice(whole, start, start + size))
        start += size
    return batches


def _slice(tree: Any, a: int, b: int) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree[a:b]
    if isinstance(tree, dict):
        return {k: _slice(v, a, b) for k, v in tree.items()}
    return tuple(_slice(v, a, b) for v in tree)


def _classifier(make: Callable[[], nn.Module], data: Callable[[], torch.Tensor]) -> Callable[[], tuple[Any, ...]]:
    return lambda: (make(), (data(), _classes()), nn.CrossEntropyLoss(), _cross_entropy)


def _images() -> torch.Tensor:
    return torch.randn(SAMPLES, 2, 6, 6)


def _sequences(width: int = 4) -> torch.Tensor:
    return torch.randn(SAMPLES, 5, width)


def _regression() -> tuple[Any, ...]:
    net = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 2))
    return net, (_vectors(), torch.randn(SAMPLES, 2)), nn.MSELoss(), lambda call, batch: F.mse_loss(call(batch[0]), batch[1])


def _language() -> tuple[Any, ...]:
    return TiedLM(), (torch.randint(9, (SAMPLES, 5)), _padded((SAMPLES, 5), 9)), F.cross_entropy, _cross_entropy


def _two_inputs() -> tuple[Any, ...]:
    def objective(call: Callable[..., Any], batch: Any) -> torch.Tensor:
        return F.cross_entropy(call(*batch[0]), batch[1])

    return TwoInputs(), ((_vectors(4), _vectors(3)), _classes()), F.cross_entropy, objective


def _hf_style() -> tuple[Any, ...]:
    batch = {"input_ids": torch.randint(7, (SAMPLES, 5)), "labels": _padded((SAMPLES, 5), 3)}
    return HFStyle(), batch, None, lambda call, batch: call(**batch)["loss"]


_MAKERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mlp_tanh": _classifier(lambda: _mlp(nn.Tanh), _vectors),
    "mlp_relu": _classifier(lambda: _mlp(nn.ReLU), _vectors),
    "cnn_batchnorm_eval": _classifier(_bn_cnn, _images),
    "cnn_residual": _classifier(Residual, _images),
    "vit_block": _classifier(ViTBlock, _sequences),
    "transformer_encoder": _classifier(lambda: Encoder().eval(), _sequences),
    "gru": _classifier(lambda: Recurrent(nn.GRU), lambda: _sequences(3)),
    "lstm": _classifier(lambda: Recurrent(nn.LSTM), lambda: _sequences(3)),
    "tied_language_model": _language,
    "regression": _regression,
    "frozen": _classifier(_frozen, _vectors),
    "unused": _classifier(Partly, _vectors),
    "deep": _classifier(_deep, _vectors),
    "two_inputs": _two_inputs,
    "hf_style": _hf_style,
}
NAMES = tuple(_MAKERS)
_KINKED = ("mlp_relu", "cnn_batchnorm_eval", "cnn_residual")


def net(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    """The network of that name; the same float32 numbers whatever the dtype, so that one dense Hessian serves both."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 * seed + NAMES.index(name))
        model, whole, loss_fn, objective = _MAKERS[name]()
    whole = _cast(whole, dtype)
    return Net(name, model.to(dtype), cut(whole), whole, loss_fn, objective, name not in _KINKED)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {k: _cast(v, dtype) for k, v in tree.items()}
    return tuple(_cast(v, dtype) for v in tree)
