"""Do two strided tensors share a byte? Integer arithmetic on addresses, exact for any strides, no views made."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple


class Layout(NamedTuple):
    """Where the elements of a tensor lie: runs of `run` bytes at start + sum_d k_d strides_d, 0 <= k_d < sizes_d."""

    start: int
    run: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes

    def starts(self) -> Iterator[int]:
        """The first byte of every run."""
        each = (range(0, size * stride, stride) if stride else (0,) for size, stride in zip(self.sizes, self.strides, strict=True))
        for steps in product(*each):
            yield self.start + sum(steps)


def layout(start: int, item: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Layout:
    """The layout of a non-empty tensor from its address, its size of an element, its shape and its strides in elements."""
    run, outer = item, len(shape)
    while outer and (shape[outer - 1] == 1 or stride[outer - 1] * item == run):  # dimensions that continue the run
        run *= shape[outer - 1]
        outer -= 1
    return Layout(start, run, tuple(shape[:outer]), tuple(s * item for s in stride[:outer]))


def overlaps(x: Layout, y: Layout) -> bool:
    """True when a run of x meets a run of y. Costs a few operations per run of the one with fewer runs."""
    if _runs(x) > _runs(y):
        x, y = y, x
    inner = [y.run]  # bytes that dimension d and those inside it span
    for size, stride in zip(y.sizes[::-1], y.strides[::-1], strict=True):
        inner.append(inner[-1] + (size - 1) * stride)
    inner.reverse()
    return any(_hits(start, start + x.run, y.start, 0, y, inner) for start in x.starts())


def _runs(x: Layout) -> int:
    total = 1
    for size in x.sizes:
        total *= size
    return total


def _hits(first: int, end: int, origin: int, d: int, y: Layout, inner: list[int]) -> bool:
    """True when [first, end) meets a run of y within its dimensions d and up, which begin at `origin`."""
    if end <= origin or first >= origin + inner[d]:
        return False
    if d == len(y.sizes):
        return True
    size, stride = y.sizes[d], y.strides[d]
    if stride == 0:
        return _hits(first, end, origin, d + 1, y, inner)
    low = max(0, -(-(first - origin - inner[d + 1] + 1) // stride))  # the first index whose span ends behind `first`
    high = min(size - 1, (end - 1 - origin) // stride)
    return any(_hits(first, end, origin + k * stride, d + 1, y, inner) for k in range(low, high + 1))
