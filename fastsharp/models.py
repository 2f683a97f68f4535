"""Small networks for demos, tests and experiments on 28 x 28 and 32 x 32 images; random initialisation, no weights inside.

Checkpoints are safetensors files and nothing else: they hold numbers, so that loading one cannot run code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastsharp.errors import DataFormatError, DataNotFoundError, InputError, listing


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Fully connected net on flattened input: sizes = (in, hidden..., out), an activation between the layers.

    Parameters: sum over layers of (in + 1) out; mlp((784, 512, 512, 10)) has 669,706.
    """
    if len(sizes) < 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise InputError(f"mlp: sizes is {tuple(sizes)}, expected at least two positive whole numbers (in, hidden..., out).")
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += ([activation()] if i else []) + [nn.Linear(a, b)]
    return nn.Sequential(*layers)


def demo_cnn() -> nn.Sequential:
    """Three convolutions and a linear layer for (N, 1, 28, 28) -> (N, 10); 29,738 parameters.

    GELU and average pooling are smooth, so the Hessian exists everywhere and finite differences may check it;
    there is no BatchNorm and no Dropout, so train and eval mode are one function.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


class _Block(nn.Module):
    """conv-BN-ReLU-conv-BN plus a shortcut; the shortcut has no parameters: every second pixel, zeros for new channels."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.extra = c_out - c_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(y + x)


class ResNetCIFAR(nn.Module):
    """The CIFAR form of a residual net, 6 depth + 2 layers, for (N, C, 32, 32) -> (N, num_classes)."""

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        c_in = 16
        for c_out in (16, 32, 64):
            for i in range(depth):
                blocks.append(_Block(c_in, c_out, 2 if c_out > 16 and i == 0 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, C, H, W), through global average pooling."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNetCIFAR:
    """ResNet-20 with parameter-free shortcuts, 269,722 parameters for ten classes of RGB; call .eval() before measuring.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2, shortcut option A.
    """
    return ResNetCIFAR(3, num_classes, in_channels)


def load_weights(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Copy the tensors of a safetensors file into the model, all or none; returns the file's metadata.

    Keys must be those of model.state_dict() exactly, shapes must agree, and a conversion of dtype must lose nothing.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise InputError(
            f"{path}: weights are read from .safetensors alone, as a pickle can run code. Convert where you trust the file:\n"
            '  python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() for k, v in '
            f"torch.load('{path.name}', weights_only=True).items()}}, '{path.stem}.safetensors')\""
        )
    if not path.is_file():
        raise DataNotFoundError(f"weights: there is no file {path}. Give the path of a .safetensors file.")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            metadata = dict(f.metadata() or {})
            given = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as e:
        raise DataFormatError(f"{path}: not a readable safetensors file ({e}).\nSave it again with safetensors.torch.save_file.") from e
    _check_keys(model, given, path)
    model.load_state_dict(given, strict=True)
    return metadata


def _check_keys(model: nn.Module, given: dict[str, torch.Tensor], path: Path) -> None:
    wanted = model.state_dict()
    faults = []
    for label, keys in (("missing", wanted.keys() - given.keys()), ("unexpected", given.keys() - wanted.keys())):
        if keys:
            faults.append(f"{label}: {listing(sorted(keys), 5)}")
    both = sorted(wanted.keys() & given.keys())
    shapes = [f"{k} {tuple(given[k].shape)} for {tuple(wanted[k].shape)}" for k in both if given[k].shape != wanted[k].shape]
    dtypes = [
        f"{k} {given[k].dtype} into {wanted[k].dtype}"
        for k in both
        if torch.promote_types(given[k].dtype, wanted[k].dtype) != wanted[k].dtype
    ]
    faults += [f"{label}: {listing(v, 5)}" for label, v in (("wrong shape", shapes), ("would lose precision", dtypes)) if v]
    if faults:
        lines = "\n  ".join(faults)
        raise InputError(f"{path} does not fit {type(model).__name__}:\n  {lines}\nGive the weights of this very architecture.")
