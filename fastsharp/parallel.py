"""Models in wrappers: taken out of them, or refused where this process holds only a part, whose curvature no one process knows."""

from __future__ import annotations

import torch
from torch import nn

from fastsharp.errors import DistributedError


def refuse_shares(model: nn.Module) -> None:
    """DistributedError for DistributedDataParallel over several processes and for sharded parameters.

    Each process of a job reads its own share of the data, or holds its own share of the weights: a product from one is not the matrix's.
    """
    for name, m in model.named_modules():
        if isinstance(m, nn.parallel.DistributedDataParallel):
            world = torch.distributed.get_world_size(m.process_group)
            if world > 1:
                raise DistributedError(
                    f"{_called(name)} is DistributedDataParallel over {world} processes, each with its own share of the data.\n"
                    "Measure .module on one process, with a loader over all samples."
                )
        if any(c.__module__.startswith("torch.distributed.fsdp") for c in type(m).__mro__):
            raise DistributedError(
                f"{_called(name)} is sharded (FSDP): this process holds a part of its parameters.\n"
                "Gather a full state_dict, and measure a plain copy of the model on one process."
            )


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model inside torch.compile, DataParallel and DistributedDataParallel, and the wrappers' names from outside in.

    A wrapper with forward hooks of its own stays, and so do parameters' longer names: the hooks are part of the function.
    """
    names = []
    while not (model._forward_hooks or model._forward_pre_hooks):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner: nn.Module = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            inner = model._orig_mod  # type: ignore[assignment]
        else:
            break
        names.append("torch.compile" if type(model).__name__ == "OptimizedModule" else type(model).__name__)
        model = inner
    return model, names


def _called(name: str) -> str:
    return f"module {name!r}" if name else "the model"
