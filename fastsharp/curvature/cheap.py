"""Which cheaper products there are, and how far they are from the exact ones."""

from __future__ import annotations

import torch

from fastsharp.errors import DeviceError, DtypeError, InputError
from fastsharp.operator import BF16_NOISE, TF32_NOISE

NOISE = {"bf16": BF16_NOISE, "tf32": TF32_NOISE}


def check_precision(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """InputError, DtypeError or DeviceError where products of parameters of this dtype, there, cannot be taken in this precision."""
    if precision not in NOISE:
        raise InputError(f"precision={precision!r} is none of {', '.join(map(repr, NOISE))}.")
    if dtype != torch.float32:
        raise DtypeError(f"precision={precision!r}: the parameters are {dtype}, cheap products need float32. Use precision='auto'.")
    if precision == "tf32" and device.type != "cuda":
        raise DeviceError(f"precision='tf32': the model is on {device}, TF32 units are on CUDA devices. Use precision='auto'.")
