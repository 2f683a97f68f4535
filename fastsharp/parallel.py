"""Models of which this process holds a part only: refused, since no one process knows their curvature."""

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


def _called(name: str) -> str:
    return f"module {name!r}" if name else "the model"
