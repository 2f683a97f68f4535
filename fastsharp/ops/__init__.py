"""Native operations, one name per kernel: the same function on the reference, CPU and CUDA backends."""

from fastsharp.ops._registry import force as force
from fastsharp.ops.krylov import alpha as alpha
from fastsharp.ops.krylov import combine as combine
from fastsharp.ops.krylov import dots as dots
from fastsharp.ops.krylov import probes as probes
from fastsharp.ops.krylov import update as update
