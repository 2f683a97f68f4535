"""Single samples of what a loader yields, by number, so that random parts of the data can be formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from fastsharp.batches import Batches, Budget, count_of, head, tensors_of, tree_map
from fastsharp.errors import BatchFormatError, InputError
from fastsharp.guard import rng_restored
from fastsharp.reading import sample_read

_BATCH = 256


class Samples:
    """`count` samples; `take(indices)` gives batches of them, the same numbers at every call.

    A map-style Dataset, or a DataLoader that goes once through one, is read sample by sample: only what is asked for, each sample once,
    and kept on the host, so that a random augmentation is drawn once. Anything else is read in one pass within the memory budget, and its
    batches are cut along their first dimension.
    Raises InputError where the data exceed the budget, BatchFormatError where a batch cannot be cut.
    """

    def __init__(self, data: Any, device: torch.device, memory: str | int) -> None:
        self._device = device
        self._items: dict[int, Any] = {}
        self._batches: list[Any] = []
        mapped = _map_style(data)
        if mapped is not None:
            self._dataset, self._collate, self._size = mapped
            self.count = len(self._dataset)
            return
        frozen = Batches(data, device, Budget.of(memory, device).total)
        if frozen.streamed:
            raise InputError(
                f"the data ({frozen.nbytes:,} bytes) exceed the memory budget, and parts of a stream cannot be taken.\n"
                "Pass a Dataset that can be indexed, or raise memory=."
            )
        self.count = frozen.count
        self._batches = [batch for _, batch in frozen]
        for i, batch in enumerate(self._batches):
            if head(batch, 0, 1) is None:
                raise BatchFormatError(f"batch {i} cannot be cut into samples: a tensor has no batch dimension. Pass a Dataset, or (x, y).")
        self._sizes = [count_of(batch) for batch in self._batches]
        self._size = max(self._sizes)

    def take(self, indices: torch.Tensor) -> list[Any]:
        """Batches of the samples with these numbers (b,), in ascending order."""
        return self._drawn(indices.tolist()) if not self._batches else self._cut(indices)

    def _drawn(self, indices: list[int]) -> list[Any]:
        with rng_restored(self._device), torch.inference_mode(False):
            for i in indices:
                if i not in self._items:
                    with sample_read(i):
                        self._items[i] = self._dataset[i]
            return [self._collate([self._items[i] for i in indices[a : a + self._size]]) for a in range(0, len(indices), self._size)]

    def _cut(self, indices: torch.Tensor) -> list[Any]:
        pieces, start = [], 0
        for batch, size in zip(self._batches, self._sizes, strict=True):
            rows = indices[(indices >= start) & (indices < start + size)] - start
            start += size
            if rows.numel():
                pieces.append(tree_map(lambda t, rows=rows: t[rows.to(t.device)], batch))  # type: ignore[misc]
        return _joined(pieces, self._size)


def _map_style(data: Any) -> tuple[Any, Callable[[list[Any]], Any], int] | None:
    """(dataset, collate, batch size) where every sample is drawn once in a pass and can be drawn by its number."""
    collate, size, dataset = default_collate, _BATCH, data
    if isinstance(data, DataLoader):
        sampler = data.sampler
        once = type(sampler) is SequentialSampler or (
            type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        )
        if not once or type(data.batch_sampler) is not BatchSampler or data.drop_last or data.batch_size is None:
            return None
        dataset, collate, size = data.dataset, data.collate_fn, data.batch_size
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    return (dataset, collate, size) if len(dataset) else None


def _joined(pieces: list[Any], size: int) -> list[Any]:
    """Neighbouring pieces put together up to `size` samples where all their tensors but the first dimension agree."""
    groups: list[list[Any]] = []
    for piece in pieces:
        last = groups[-1] if groups else []
        if last and _form(last[0]) == _form(piece) and sum(map(count_of, last)) + count_of(piece) <= size:
            last.append(piece)
        else:
            groups.append([piece])
    return [_concatenated(group) for group in groups]


def _form(batch: Any) -> list[Any]:
    return [(t.shape[1:], t.dtype) for t in tensors_of(batch)]


def _concatenated(group: list[Any]) -> Any:
    columns = zip(*map(tensors_of, group), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return tree_map(lambda t: next(joined), group[0])
