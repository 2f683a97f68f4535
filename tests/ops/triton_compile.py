"""Compiles every Triton kernel ahead of time for the GPUs named on the command line; needs triton and its ptxas, and no GPU.

What is compiled is what the ops launch: the host functions run on small tensors with `launch` replaced by a recorder. One JSON
line a kernel. A process of its own, since triton chooses between compiler and interpreter as it is imported.

    python -m tests.ops.triton_compile 80 90          every kernel and dtype, the targets taking turns
    python -m tests.ops.triton_compile --all 80 90    every kernel, dtype and number of vectors for every target
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsharp.ops.reference.dual import Norm, Second
from fastsharp.ops.triton import dual, krylov

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
STORAGE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
N = 4096
Launch = tuple[Any, tuple[Any, ...], dict[str, int]]


def launches(everything: bool) -> dict[str, Launch]:
    """Every kernel by a name. Krylov: every dtype, one vector with removal and a next row; eight and (everything) two without. The
    dual ops with all that they take: float32, and (everything) float64; paired products in bfloat16 too.
    """
    recorded: list[Launch] = []
    krylov.launch = lambda kernel, programs, device, *args, **constants: recorded.append((kernel, args, constants))  # type: ignore[assignment]
    for storage in STORAGE:
        dtype = torch.float64 if storage == torch.float64 else torch.float32
        V = torch.zeros(1, 3, N, dtype=storage)
        for b in (1, 2, 8) if everything else (1, 8) if storage == torch.float32 else (1,):
            w, c, out = torch.zeros(1, b, N, dtype=dtype), doubles(1, b, 3), doubles(1, b, 4)
            last = torch.zeros(1, N, dtype=dtype)
            krylov.dots(V, w, (doubles(1, 2), last, last.clone()) if b == 1 else None, out)
            krylov.update(V, w, c, (torch.zeros(1, N, dtype=storage), doubles(1)) if b == 1 else None, out[..., 0])
        krylov.combine(doubles(9, 3), V[0], torch.zeros(9, N, dtype=dtype))
    for dtype in (torch.float32, torch.float64):
        krylov.alpha(torch.zeros(1, N, dtype=dtype), torch.zeros(1, N, dtype=dtype), doubles(1))
        for kind in ("rademacher", "normal"):
            krylov.probes(kind, 1, 0, torch.zeros(2, N, dtype=dtype))
    for dtype in (torch.float32, torch.float64) if everything else (torch.float32,):
        duals(dtype)
    return {name(x): x for x in recorded}


def duals(dtype: torch.dtype) -> None:
    """Every dual op with everything that it can be given."""
    x, t, columns = torch.zeros(32, N, dtype=dtype), torch.zeros(2, 32, N, dtype=dtype), torch.zeros(2, N, dtype=dtype)
    f, sums = Norm(x, x[0], doubles(32, 2), True), doubles(2, 32, 2)
    dual.activation_prepare("gelu", (0.0, 0.0, 0.0), x, x[0], x, x)
    dual.activation_tangent(x, t, columns, t)
    dual.activation_adjoint(x, t, x, t, t, columns)
    dual.norm_prepare(x, 1e-5, True, f.stats)
    dual.norm_tangent(f, t, columns, columns, t, sums)
    dual.norm_adjoint(f, t, Second(x, doubles(1, 32, 2), t, sums, columns), t, sums, columns, columns)
    dual.softmax_gradient(x, torch.zeros(32, dtype=torch.int64), x[:, 0].contiguous(), 0.1, x, x)
    dual.softmax_product(x, x[:, 0].contiguous(), t, t)
    for half in (dtype, torch.bfloat16) if dtype == torch.float32 else ():
        dual.paired(None, (x.to(half), x.t().to(half)), (t.to(half), x.t().to(half)), 2, 1.0)


def doubles(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def name(launch: Launch) -> str:
    """The kernel, the dtypes of what it takes, and how many vectors at once."""
    kernel, args, constants = launch
    dtypes = [POINTERS[a.dtype].removeprefix("*") for a in args if isinstance(a, Tensor)]
    return f"{kernel.__name__}[{','.join(dict.fromkeys(dtypes))}]" + (f" B={constants['B']}" if "B" in constants else "")


def compiled(launch: Launch, arch: int) -> Any:
    """As the just-in-time compiler would: pointers and divisible sizes aligned to 16, the rest unknown."""
    kernel, args, constants = launch
    options = {k: v for k, v in constants.items() if k not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in constants.items() if k in kernel.arg_names}
    fixed = {k: v for k, v in values.items() if v is None or k in constants}
    signature = {k: "constexpr" if k in fixed else POINTERS[v.dtype] if isinstance(v, Tensor) else "i64" for k, v in values.items()}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    aligned = [k for k, v in values.items() if k not in fixed and k not in free and (isinstance(v, Tensor) or v % 16 == 0)]
    attributes = {(kernel.arg_names.index(k),): [["tt.divisibility", 16]] for k in aligned}
    return triton.compile(ASTSource(kernel, signature, fixed, attributes), target=GPUTarget("cuda", arch, 32), options=options)


def facts(kernel: Any, binary: Any) -> dict[str, Any]:
    """What the tests assert: machine code, no atomics, 16-byte loads, rows counted at run time, bfloat16 rounded and not cut."""
    ptx = binary.asm["ptx"]
    return {
        "bytes": len(binary.asm["cubin"]),
        "atomics": len(re.findall(r"\b(atom|red)\.", ptx)),
        "vector_loads": len(re.findall(r"ld\.global[.\w:]*\.v(2\.b64|4\.b32)|cp\.async[.\w:]+ \[[^]]+\], \[[^]]+\], 0x10", ptx)),
        "rounds_bf16": "cvt.rn.bf16" in ptx,
        "recompiled_for": [p.name for p in kernel.params if p.name in ("j", "k", "b", "seed", "first") and not p.do_not_specialize],
    }


def main(arguments: list[str]) -> None:
    everything = "--all" in arguments
    archs = [int(a) for a in arguments if a.isdigit()]
    try:
        found = triton.knobs.nvidia.ptxas.path
    except RuntimeError as e:
        print(json.dumps({"skipped": f"no ptxas: {e}"}))
        return
    print(json.dumps({"triton": triton.__version__, "ptxas": found}))
    for k, (label, launch) in enumerate(launches(everything).items()):
        for arch in archs if everything else [archs[k % len(archs)]]:
            print(json.dumps({"kernel": label, "sm": arch, **facts(launch[0], compiled(launch, arch))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
