"""The five networks on which products are timed: (model in eval mode, batches), from a seed, on random data of the stated shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.models import mlp, resnet20

Case = tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]


class ViT(nn.Module):
    """A pre-norm vision transformer for 32 x 32 images: patches of 4, mean-pooled, attention by F.scaled_dot_product_attention."""

    def __init__(self, width: int = 192, layers: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(1))
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, d))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y


class GPT(nn.Module):
    """A causal language model of GPT-2's shape, its output layer tied to the embedding; logits (tokens, vocabulary)."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12, tokens: int = 50257, length: int = 1024) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for p in (self.token.weight, self.position.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.token.weight).flatten(0, 1)


def _data(batches: int, size: int, *shape: int, classes: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, *shape, generator=g), torch.randint(classes, (size,), generator=g)) for _ in range(batches)]


def _resnet18() -> nn.Module:
    """torchvision's ResNet-18 with the stem of the CIFAR form: 3 x 3 convolution, no pooling."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """BatchNorm statistics of two passes over data, then eval mode: activations of a healthy size."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(x)
    return model.eval()


def _made(make: Callable[[], nn.Module], batches: int, size: int, *shape: int, classes: int = 10) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    data = _data(batches, size, *shape, classes=classes)
    return _settled(model, data[0][0]), data


CASES: dict[str, Callable[[int], Case]] = {  # name: by the divisor of the batch size, 1 for the figures of the table
    "tiny mlp": lambda cut: _made(lambda: mlp((2, 100, 100, 2)), 1, 1000 // cut, 2, classes=2),
    "mlp": lambda cut: _made(lambda: mlp((784, 512, 512, 10)), 4, 1024 // cut, 784),
    "resnet-20": lambda cut: _made(resnet20, 4, 128 // cut, 3, 32, 32),
    "resnet-18": lambda cut: _made(_resnet18, 2, 64 // cut, 3, 32, 32),
    "vit": lambda cut: _made(ViT, 4, 64 // cut, 3, 32, 32),
}


def _resnet50() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.resnet50()
    return model


def _tokens(cut: int) -> Case:
    """Next-token prediction on 4 x 1024 random tokens; with a cut, of a small model on few."""
    g = torch.Generator().manual_seed(1)
    vocabulary, length = (50257, 1024) if cut == 1 else (101, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT() if cut == 1 else GPT(16, 2, 2, vocabulary, length)
    text = torch.randint(vocabulary, (4, length + 1), generator=g)
    return model.eval(), [(text[:, :-1].contiguous(), text[:, 1:].flatten())]


GPU_CASES: dict[str, Callable[[int], Case]] = {  # one batch that fills a large GPU
    "resnet-50": lambda cut: _made(_resnet50, 1, 64 // cut, 3, *(2 * [224 if cut == 1 else 64]), classes=1000),
    "gpt-2": _tokens,
}
