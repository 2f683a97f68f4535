"""Train fastsharp.models.demo_cnn on all of Fashion-MNIST and write fastsharp/data/demo_cnn.safetensors.

    python tools/train_demo.py [--epochs 20] [--root DIR]

Some minutes on two CPU cores, seeded; another machine or thread count may differ in the last digits of the weights.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sums import record

from fastsharp.data import _files, load, loader
from fastsharp.models import demo_cnn

BATCH, LR, WEIGHT_DECAY, SEED = 128, 4e-3, 1e-4, 0


def main() -> None:
    """Train, evaluate on both splits, write the weights with their figures as metadata, record the hash."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--root", help="folder with the Fashion-MNIST files")
    args = parser.parse_args()
    [(x, y)] = loader(load("fashion_mnist", root=args.root), batch_size=60_000)
    test = loader(load("fashion_mnist", split="test", root=args.root), batch_size=1000)
    torch.manual_seed(SEED)
    model = demo_cnn().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.2)
    began = time.perf_counter()
    for epoch in range(args.epochs):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(x)), BATCH):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        _, accuracy = evaluate(model, test)
        print(f"epoch {epoch + 1:2d}  loss {total / len(x):.4f}  test {accuracy:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    train_loss, train_accuracy = evaluate(model, [(x[i], y[i]) for i in torch.split(torch.arange(len(x)), 1000)])
    test_loss, test_accuracy = evaluate(model, test)
    path = _files.HERE / "demo_cnn.safetensors"
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        path,
        metadata={
            "model": "fastsharp.models.demo_cnn",
            "data": "Fashion-MNIST, 60,000 train and 10,000 test images",
            "train_loss": f"{train_loss:.4f}",
            "train_accuracy": f"{train_accuracy:.4f}",
            "test_loss": f"{test_loss:.4f}",
            "test_accuracy": f"{test_accuracy:.4f}",
            "recipe": f"AdamW, one cycle to lr {LR}, weight decay {WEIGHT_DECAY}, batch {BATCH}, {args.epochs} epochs, "
            f"seed {SEED}, cross-entropy, no augmentation; tools/train_demo.py",
            "licence": "weights under the licence of fastsharp; trained on Fashion-MNIST, MIT, (c) 2017 Zalando SE",
        },
    )
    record(path)
    print(f"{path}: {path.stat().st_size:,} bytes, train loss {train_loss:.4f}, test accuracy {test_accuracy:.4f}")


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all examples."""
    loss = right = count = 0.0
    for x, y in batches:
        out = model(x)
        loss += F.cross_entropy(out, y, reduction="sum").item()
        right += (out.argmax(1) == y).sum().item()
        count += len(y)
    return loss / count, right / count


if __name__ == "__main__":
    main()
