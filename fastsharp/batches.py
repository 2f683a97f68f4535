"""The data of an objective: frozen once, or streamed with proof that every pass sees the same samples."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastsharp.errors import (
    ArgumentTypeError,
    BatchFormatError,
    EmptyLoaderError,
    InputError,
    LoaderExhaustedError,
    NondeterministicOperatorError,
    StaleOperatorError,
)
from fastsharp.guard import rng_restored, version_of
from fastsharp.reading import read, watched

_WRAPPED_BATCH = 256  # batch size when a Dataset is handed in
_DIGEST = 16
_MODULUS = 1 << (8 * _DIGEST)


def tree_map(f: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """The same nest of mappings, tuples and lists with f applied to its tensors; anything else stays as it is."""
    if isinstance(tree, torch.Tensor):
        return f(tree)
    if isinstance(tree, Mapping):
        return {k: tree_map(f, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(*(tree_map(f, v) for v in tree)) if hasattr(tree, "_fields") else type(tree)(tree_map(f, v) for v in tree)
    return tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of a nest, in order."""
    found: list[torch.Tensor] = []
    tree_map(found.append, tree)
    return found


def count_of(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor with a batch dimension."""
    for t in tensors_of(batch):
        if t.ndim:
            return int(t.shape[0])
    raise BatchFormatError(
        f"cannot tell how many examples a {type(batch).__name__} batch holds: it has no tensor with a batch dimension.\n"
        "Let the loss return (sum, count)."
    )


def head(batch: Any, start: int, stop: int) -> Any | None:
    """Examples start..stop of a batch, None where some tensor has no matching batch dimension."""
    n = count_of(batch)
    if any(t.ndim == 0 or t.shape[0] != n for t in tensors_of(batch)):
        return None
    return tree_map(lambda t: t[start:stop], batch)


def as_loader(data: Any) -> Iterable[Any]:
    """What the caller calls data as an iterable of batches.

    A DataLoader or other iterable of batches stays; a Dataset is wrapped, unshuffled; one batch becomes a list of one:
    a tensor, a mapping, or a tuple or list with at least one tensor in it (torch's default collate makes lists).
    """
    if isinstance(data, (torch.Tensor, Mapping)):
        return [data]
    if isinstance(data, (tuple, list)):
        return [data] if any(isinstance(item, torch.Tensor) for item in data) else list(data)
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=_WRAPPED_BATCH, shuffle=False)
    if not isinstance(data, Iterable):
        raise ArgumentTypeError(f"loader is a {type(data).__name__}, expected a DataLoader, a Dataset, a list of batches or one batch.")
    return data


class Batches:
    """Batches on `device`, the same ones in every pass.

    Frozen where they fit `budget` bytes: one pass over the loader (a generator will do), then the loader is not read again.
    Streamed where they do not: the loader is read in every pass, and the hashes of all samples, summed without regard to
    order, must come out as in the first pass. Where `ordered` is set, so must the samples of each batch by itself: a loss
    that looks across a batch, frozen batch statistics and masks are functions of the grouping as well. Where `in_order` is set, their
    order in the batch too: labels drawn from a model go by it.
    """

    def __init__(self, data: Any, device: torch.device, budget: int) -> None:
        self._loader = as_loader(data)
        self._source = watched(self._loader)
        self._passes = 0
        self._device = device
        self._frozen: list[Any] = []
        self.streamed = False
        self.nbytes = 0
        self.count = 0
        self.ordered = self.in_order = False
        self._hash = 0
        self._by_batch: list[int] = []  # when streamed: the hash of each batch of the first pass
        self._orders: list[int] = []  # and that of its order
        self._read_first_pass(budget)
        self._versions = self._present_versions()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(index, batch) for each batch; when streamed, a pass that ends with other samples than the first is an error."""
        if not self.streamed:
            yield from enumerate(self._frozen)
            return
        digest, count = 0, 0
        with self._draws():
            for index, batch in enumerate(b for b in self._read() if count_of(b)):
                hashes = _sample_hashes(batch)
                own = sum(hashes) % _MODULUS
                digest, count = (digest + own) % _MODULUS, count + count_of(batch)
                moved = self.in_order and self._orders[index : index + 1] != [hash(tuple(hashes))]
                if moved or (self.ordered and self._by_batch[index : index + 1] != [own]):
                    raise NondeterministicOperatorError(
                        f"batch {index} holds other samples than in the first pass, or in another order, and the products depend on how they are grouped.\n"
                        "Switch off shuffle, or raise memory= so that the data are frozen after one pass."
                    )
                yield index, self._moved(batch)
        if (digest, count) != (self._hash, self.count):
            raise NondeterministicOperatorError(
                f"the loader's passes differ: {self.count} samples (hash {self._hash:032x}) in the first, {count} (hash {digest:032x}) in this one.\n"
                "Switch off augmentation and drop_last, fix the seed, or raise memory= so that the data are frozen after one pass."
            )

    def first(self) -> Any:
        """The first batch of a pass."""
        _, batch = next(iter(self))
        return batch

    def single(self) -> Any | None:
        """The only batch, None where there are several or they are streamed."""
        return self._frozen[0] if len(self._frozen) == 1 else None

    def check_unchanged(self) -> None:
        """Frozen tensors belong to the caller where a list was handed in; an in-place edit changes the matrix."""
        if self._present_versions() != self._versions:
            raise StaleOperatorError(
                "a data tensor was changed in place after the operator was built. Build a new operator, or hand in a copy."
            )

    def redraw(self, most: int = 2) -> str:
        """Draw the first batches again and compare with what is frozen: "same", "other samples" or why it was not done.

        Samples are looked up by hash, so that a shuffled loader over the same samples passes.
        """
        if isinstance(self._loader, (list, tuple)) or self._one_shot():
            return "read once"
        with self._draws(afresh=True):
            drawn = [batch for _, batch in zip(range(most), (b for b in self._read() if count_of(b)), strict=False)]
        return "same" if self._known(drawn) else "other samples"

    def recheck(self) -> str:
        """A whole second pass: "same", "other samples" or why it was not done."""
        if isinstance(self._loader, (list, tuple)) or self._one_shot():
            return "read once"
        with self._draws(afresh=True):
            hashes = [h for batch in self._read() for h in _sample_hashes(batch)]
        return "same" if (sum(hashes) % _MODULUS, len(hashes)) == (self._hash_all(), self.count) else "other samples"

    def digest(self) -> str:
        """Hash of the multiset of samples."""
        return f"{self._hash_all():032x}"

    def _hash_all(self) -> int:
        if not self.streamed and self._hash == 0:
            self._hash = sum(h for b in self._frozen for h in _sample_hashes(b)) % _MODULUS
        return self._hash

    def _known(self, drawn: list[Any]) -> bool:
        if self.streamed:
            return True  # every pass is compared in full
        redrawn = [_sample_hashes(batch) for batch in drawn]
        if redrawn == [_sample_hashes(b) for b in self._frozen[: len(drawn)]]:
            return True
        known = {h for b in self._frozen for h in _sample_hashes(b)}
        return all(h in known for hashes in redrawn for h in hashes)

    def _read(self) -> Iterator[Any]:
        """The next pass over the loader."""
        self._passes += 1
        return read(self._source, self._passes)

    def _one_shot(self) -> bool:
        return isinstance(self._loader, Iterator)

    def _read_first_pass(self, budget: int) -> None:
        with self._draws():
            for batch in self._read():
                if count_of(batch) == 0:
                    continue
                self.count += count_of(batch)
                size = sum(t.numel() * t.element_size() for t in tensors_of(batch))
                if not self.streamed and self.nbytes + size > budget:
                    self._start_streaming(budget)
                if self.streamed:
                    hashes = _sample_hashes(batch)
                    self._by_batch.append(sum(hashes) % _MODULUS)
                    self._orders.append(hash(tuple(hashes)))
                    self._hash = (self._hash + self._by_batch[-1]) % _MODULUS
                else:
                    self._frozen.append(self._moved(batch))
                self.nbytes += size
        if self.count == 0:
            raise EmptyLoaderError(
                f"the loader ({type(self._loader).__name__}) yields no samples. Check the dataset's length and drop_last."
            )

    def _start_streaming(self, budget: int) -> None:
        if self._one_shot():
            raise LoaderExhaustedError(
                f"the data exceed the budget of {budget:,} bytes, and a generator can be read only once.\n"
                "Pass a DataLoader or a list of batches, or raise memory=."
            )
        self.streamed = True
        found = [_sample_hashes(b) for b in self._frozen]
        self._by_batch, self._orders = [sum(hashes) % _MODULUS for hashes in found], [hash(tuple(hashes)) for hashes in found]
        self._hash = sum(self._by_batch) % _MODULUS
        self._frozen.clear()

    def _present_versions(self) -> list[int]:
        return [version_of(t) for b in self._frozen for t in tensors_of(b)]

    def _moved(self, batch: Any) -> Any:
        return tree_map(lambda t: _ordinary(t.detach().to(self._device)), batch)

    @contextmanager
    def _draws(self, *, afresh: bool = False) -> Iterator[None]:
        """Around each reading of the loader: random states, the loader's own generators among them, are put back after it.

        afresh   read from other random states, so that a draw that depends on them shows
        """
        if isinstance(self._loader, (list, tuple)):  # reading one draws nothing
            with torch.inference_mode(False):
                yield
            return
        own = {g: g.get_state() for g in _generators(self._loader)}
        with rng_restored(self._device), torch.inference_mode(False):
            try:
                if afresh:
                    _stir([torch.default_generator, *own])
                yield
            finally:
                for g, state in own.items():
                    g.set_state(state)


def _generators(loader: Any) -> set[torch.Generator]:
    """The random generators a DataLoader and its samplers were given."""
    samplers = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    return {g for s in samplers if isinstance(g := getattr(s, "generator", None), torch.Generator)}


def _stir(generators: Iterable[torch.Generator]) -> None:
    """Put the global random states and these generators elsewhere; whoever calls this restores them."""
    for g in generators:
        g.manual_seed(g.initial_seed() ^ 0x5BD1E995)
    random.seed(0x5BD1E995)
    np.random.seed(0x5BD1E995)


def _ordinary(t: torch.Tensor) -> torch.Tensor:
    """t itself, or a copy that autograd can save where it was made under inference_mode."""
    return t.clone() if t.is_inference() else t


def _sample_hashes(batch: Any) -> list[int]:
    """One 128-bit hash an example, over the example's part of every tensor in the batch."""
    n = count_of(batch)
    columns = []
    for t in tensors_of(batch):
        flat = t.detach().cpu().contiguous()
        rows = flat if flat.ndim and flat.shape[0] == n else flat.expand(n, *flat.shape).contiguous()
        if rows.numel():
            columns.append(rows.reshape(n, -1).view(torch.uint8).numpy())
    joined = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
    return [int.from_bytes(hashlib.blake2b(row, digest_size=_DIGEST).digest(), "little") for row in joined]


@dataclass(frozen=True)
class Budget:
    """Bytes a run may use for frozen data and kept graphs."""

    total: int

    @classmethod
    def of(cls, memory: str | int, device: torch.device) -> Budget:
        """`"auto"`: half of what the process may still use; `"2GiB"`, `"500MB"` or a number of bytes otherwise."""
        if memory == "auto":
            return cls(available_memory(device) // 2)
        if isinstance(memory, bool) or not isinstance(memory, (str, int)):
            raise ArgumentTypeError(f"memory is a {type(memory).__name__}, expected 'auto', a text such as '2GiB' or a number of bytes.")
        amount = memory if isinstance(memory, int) else _parse_bytes(memory)
        if amount < 0:
            raise InputError(f"memory={memory!r} is negative. Pass 'auto', a text such as '2GiB' or a number of bytes.")
        return cls(amount)


def available_memory(device: torch.device) -> int:
    """Bytes the process may still use: free device memory, or the host's available memory within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        limits += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    used, cap = Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.max")
    if used.exists() and cap.exists() and cap.read_text().strip().isdigit():
        limits.append(max(0, int(cap.read_text()) - int(used.read_text())))
    return min(limits)


def _parse_bytes(text: str) -> int:
    units = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    digits = text.strip().lower()
    unit = digits.lstrip("0123456789.").strip()
    try:
        return int(float(digits[: len(digits) - len(unit)].strip()) * units[unit or "b"])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"memory={text!r} is not a size. Write '2GiB', '500MB' or a number of bytes.") from None
