"""Networks that benchmarks share, trained on the spot from a seed, so that nobody has to trust a file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastsharp import data
from fastsharp.errors import DataNotFoundError
from fastsharp.models import mlp

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def fashion_mlp(samples: int = 4096, batch: int = 1024, epochs: int = 10) -> tuple[nn.Sequential, Batches, str]:
    """MLP 784-512-512-10 trained on `samples` Fashion-MNIST images (Adam 1e-3, batches of 128); the images in batches; their name.

    Without the full set the embedded sample stands in, and the name says so.
    """
    try:
        images = data.load("fashion_mnist", samples=samples, seed=0)
    except DataNotFoundError:
        images = data.load("fashion_mnist_mini")
    x, y = (torch.cat(parts) for parts in zip(*data.loader(images, batch_size=len(images)), strict=True))
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=g)
    x, y = x[order], y[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp((784, 512, 512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=g).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval(), list(zip(x.split(batch), y.split(batch), strict=True)), images.name
