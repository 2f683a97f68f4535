"""Which value a tensor holds: memory that is written becomes a chain of values that are not.

Two tensors hold the same value where they are the same numbers of the same storage at the same time, so a value goes by
(storage, offset, shape, strides, dtype) until the storage is written. A call that writes is entered as the call that computes the new
value; after a write to a part of a storage the whole of it is a new value too (slice_scatter and its like), from which other
views of it are read again. Numbers that a write would destroy and the tape holds are copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten


class Unrecorded(Exception):
    """This evaluation has no tape; the reason completes "autograd, because of ..."."""


class Value:
    """A tensor that nobody writes; active: it depends on the parameters as autograd sees it."""

    __slots__ = ("active", "tensor")

    def __init__(self, tensor: torch.Tensor, active: bool) -> None:
        self.tensor = tensor
        self.active = active


class Entry(NamedTuple):
    """A call in terms of values."""

    func: Any
    args: Any
    kwargs: Any
    inputs: list[Value]
    outputs: list[Value]
    module: str


class _Storage:
    """The values that lie in one storage at present.

    values   by (offset, shape, strides, dtype, active)
    root     key of the value that covers the whole storage, from which all others can be read
    inside   values whose numbers are in this storage itself, of the past as well: a write would destroy them
    """

    __slots__ = ("active", "inside", "param", "root", "storage", "values")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage  # held, so that its address is not given to another
        self.values: dict[Any, Value] = {}
        self.root: Any = None
        self.inside: list[Value] = []
        self.active = self.param = False


class _Schema(NamedTuple):
    writes: tuple[tuple[int, str], ...]  # position and name of the arguments that are written
    random: bool
    turns: bool  # changes the shape or strides of its argument, not its numbers


@cache
def _name(func: Any) -> str:
    return str(func._schema.name.split("::")[1])


# what makes a tensor in the image of another one; its numbers have no part in it
_NO_DERIVATIVE = frozenset(
    ["empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "bernoulli"]
    + ["new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"]
)


@cache
def _schema(func: Any) -> _Schema:
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return _Schema(tuple(written), torch.Tag.nondeterministic_seeded in func.tags, torch.Tag.inplace_view in func.tags)


@cache
def _functional(func: Any) -> Any:
    """The overload that computes what this one writes into its first argument, None where there is none."""
    name = _name(func)
    packet = getattr(aten, name[:-1], None) if func.namespace == "aten" and name.endswith("_") and name not in _REALLOCATE else None
    if packet is None or [i for i, _ in _schema(func).writes] != [0]:
        return None
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]  # overloads of the two are not always named alike: transpose.int
    alike = [o for o in packet.overloads() if [(a.name, str(a.type)) for a in getattr(packet, o)._schema.arguments] == wanted]
    return getattr(packet, alike[0]) if alike else None


_REALLOCATE = ("resize_", "resize_as_", "set_")


def _written(schema: _Schema, args: Any, kwargs: Any) -> list[torch.Tensor]:
    named = [args[i] if i < len(args) else kwargs.get(name) for i, name in schema.writes]
    return [t for t in tree_flatten(named)[0] if isinstance(t, torch.Tensor)]


def _key(t: torch.Tensor, active: bool) -> Any:
    return t.storage_offset(), t.shape, t.stride(), t.dtype, active


def _covers(t: torch.Tensor) -> bool:
    """Whether t is the whole of its storage, each number once."""
    if t.storage_offset() or t.numel() * t.element_size() != t.untyped_storage().nbytes():
        return False
    return t.is_contiguous() or bool(aten.is_non_overlapping_and_dense.default(t))


class Memory:
    """Values of the tensors of one evaluation, and the calls between them."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.entries: list[Entry] = []
        self._storages: dict[int, _Storage] = {}
        self.params: list[Value] = []
        for p in params:
            if p.layout != torch.strided or p.is_complex():
                raise Unrecorded("parameters that are sparse or complex")
            at = self._at(p)
            at.active = at.param = True
            key = _key(p, True)
            if key in at.values:
                raise Unrecorded("two parameters in the same memory")
            value = at.values[key] = Value(p.detach(), True)
            self.params.append(value)

    def call(self, func: Any, args: Any, kwargs: Any, module: str) -> Any:
        """Run a call; enter it where it is active or writes what the tape holds."""
        leaves, spec = tree_flatten((args, kwargs))
        active = torch.is_grad_enabled() and _name(func) not in _NO_DERIVATIVE
        active = active and any(self._active(t) for t in leaves if isinstance(t, torch.Tensor))
        schema = _schema(func)
        if schema.writes:
            if not active:
                self._overwrite(func, _written(schema, args, kwargs))
                return func(*args, **kwargs)
            if func is not aten.detach_.default:
                return self._write(func, schema, args, kwargs, module)
        if not active or func is aten.detach.default or func is aten.detach_.default:
            return func(*args, **kwargs)
        values = [self.read(t) if isinstance(t, torch.Tensor) else t for t in leaves]
        if func is aten.native_dropout.default:
            return self._dropout(values, func(*args, **kwargs), module)
        if schema.random:
            raise Unrecorded(f"a random operation on active values ({func})")
        result = func(*args, **kwargs)
        if func is aten.as_strided.default and self._at(args[0]).root is not None:
            self._view(self._at(args[0]), result)  # strides count in the storage, from which its value may have moved
        else:
            self._enter(func, tree_unflatten(values, spec), result, module)
        return result

    def _dropout(self, values: list[Any], result: tuple[torch.Tensor, torch.Tensor], module: str) -> Any:
        """The draw is a constant: y = x * mask / (1 - p)."""
        x, p = values[:2]
        keep = 1.0 if values[2:3] == [False] else 1.0 - p
        mask = Value(result[1].to(result[0].dtype) * (1.0 / keep if keep else 0.0), False)
        self._enter(aten.mul.Tensor, ((x, mask), {}), result[0], module)
        return result

    def read(self, t: torch.Tensor) -> Value:
        """The value of a tensor at present."""
        if t.layout != torch.strided:
            return Value(t.detach(), False)
        at = self._at(t)
        active = self._active(t)
        if active and (t.is_complex() or type(t) not in (torch.Tensor, torch.nn.Parameter)):
            raise Unrecorded(f"active values that are complex or of a class of their own ({type(t).__name__})")
        value = at.values.get(_key(t, active))
        if value is None and active:
            return self._view(at, t)
        if value is None:
            value = at.values[_key(t, False)] = Value(t.detach(), False)
            at.inside.append(value)
        return value

    def _view(self, at: _Storage, t: torch.Tensor) -> Value:
        """The value of an active view, read from that of the whole storage."""
        key = _key(t, True)
        if key not in at.values:
            root = None if at.root is None else at.values[at.root]
            if root is None or root.tensor.dtype != t.dtype:
                raise Unrecorded("a view of memory that was written in part")
            whole = (aten.as_strided.default, (list(t.shape), list(t.stride()), t.storage_offset()))
            f, args = _window(root.tensor, t) or whole
            at.values[key] = self._apply(f, (root, *args), {}, "")
        return at.values[key]

    def _active(self, t: torch.Tensor) -> bool:
        if not t.requires_grad or t.layout != torch.strided:
            return False
        at = self._storages.get(t.untyped_storage()._cdata)
        if at is None or not at.active:
            return False
        return not at.param or _key(t, True) in at.values  # parameters that were not chosen may share a buffer with one that was

    def _at(self, t: torch.Tensor) -> _Storage:
        storage = t.untyped_storage()
        at = self._storages.get(storage._cdata)
        if at is None:
            at = self._storages[storage._cdata] = _Storage(storage)
        return at

    def _enter(self, func: Any, inputs: Any, result: Any, module: str) -> None:
        """Append a call that has run, and give its results their values."""
        given = [v for v in tree_flatten(inputs)[0] if isinstance(v, Value)]
        if not any(v.active for v in given):  # a constant was written over what had been active
            return
        outputs, new = [], False
        for t in tree_flatten(result)[0]:
            if not isinstance(t, torch.Tensor):
                continue
            if t.layout != torch.strided or t.is_complex():
                raise Unrecorded(f"active values that are sparse or complex ({func})")
            value = Value(t.detach(), t.is_floating_point())
            outputs.append(value)
            at, key = self._at(t), _key(t, value.active)
            if value.active and key in at.values:
                continue  # a view that changes nothing
            at.values[key] = value
            at.inside.append(value)
            if value.active:
                new = at.active = True
                if at.root is None and not at.param and _covers(t):
                    at.root = key
        if new:
            self.entries.append(Entry(func, *inputs, given, outputs, module))

    def _overwrite(self, func: Any, written: Sequence[torch.Tensor]) -> None:
        """Before constants, or an active memory unseen by autograd, are written."""
        for t in written:
            at = None if t.layout != torch.strided else self._storages.get(t.untyped_storage()._cdata)
            if at is not None:
                if at.active:
                    raise Unrecorded(f"a write to active memory that autograd does not see ({func})")
                self._save(at)
                at.values.clear()

    def _save(self, at: _Storage) -> None:
        """Copy the numbers that the tape needs from a storage that is about to be written."""
        if at.inside:
            copy = at.storage.clone()
            for value in at.inside:
                t = value.tensor
                value.tensor = _lying(copy, t.dtype, t.shape, t.stride(), t.storage_offset())
            at.inside = []

    def _write(self, func: Any, schema: _Schema, args: Any, kwargs: Any, module: str) -> Any:
        """Run a call that writes active values into its first argument."""
        if schema.random:
            raise Unrecorded(f"a random operation on active values ({func})")
        f = _functional(func)
        if f is None:
            raise Unrecorded(f"a write without a functional form ({func})")
        target = args[0]
        at = self._at(target)
        if at.param or (at.active and not target.requires_grad):
            raise Unrecorded(f"a write to active memory that autograd does not see ({func})")
        if schema.turns:
            leaves, spec = tree_flatten((args, kwargs))
            values = tree_unflatten([self.read(t) if isinstance(t, torch.Tensor) else t for t in leaves], spec)
            func(*args, **kwargs)
            self._enter(f, values, target, module)
            return target
        value = self._computed(f, target, args, kwargs, module)
        key = _key(target, True)
        if _covers(target):
            at.root, root = key, value
        else:
            root = self._scattered(at, target, value, module)
        self._save(at)
        target.copy_(value.tensor)
        at.values = {at.root: root, key: value}
        at.active = True
        return target

    def _scattered(self, at: _Storage, target: torch.Tensor, value: Value, module: str) -> Value:
        """The whole of a storage of which a part is written; not by as_strided_scatter, whose derivative in torch 2.10 to 2.14 is wrong."""
        root = self._root(at, target)
        if root.tensor.dtype != target.dtype:
            raise Unrecorded("a write to memory that is seen as another dtype")
        window = _window(root.tensor, target)
        if window is not None:
            scatter = aten.select_scatter.default if window[0] is aten.select.int else aten.slice_scatter.default
            return self._apply(scatter, (root, value, *window[1]), {}, module)
        size = root.tensor.numel()
        if root.tensor.ndim != 1:
            root = self._apply(aten.as_strided.default, (root, [size], [1], 0), {}, module)
            at.root = _key(root.tensor, True)
        index = torch.arange(size, device=target.device).as_strided(target.shape, target.stride(), target.storage_offset())
        return self._apply(aten.index_put.default, (root, [Value(index.contiguous(), False)], value), {}, module)

    def _root(self, at: _Storage, target: torch.Tensor) -> Value:
        """The whole of a storage before a part of it, `target`, is written."""
        if at.root is not None:
            return at.values[at.root]
        if at.active:
            raise Unrecorded("a write to a part of a tensor that is not the whole of its memory")
        base = target._base
        if base is not None and _covers(base) and base.dtype == target.dtype:
            at.root = _key(base, True)
            return self.read(base)
        size = at.storage.nbytes() // target.element_size()
        root = Value(_lying(at.storage.clone(), target.dtype, (size,), (1,), 0), False)
        at.root = _key(root.tensor, True)
        return root

    def _computed(self, f: Any, target: torch.Tensor, args: Any, kwargs: Any, module: str) -> Value:
        """What the write leaves in its target, in the target's dtype, shape and strides."""
        if f is aten.copy.default:  # does not depend on what was there
            value = self.read(args[1])
        else:
            leaves, spec = tree_flatten((args, kwargs))
            inputs = [self.read(t) if isinstance(t, torch.Tensor) else t for t in leaves]
            given_args, given_kwargs = tree_unflatten(inputs, spec)
            value = self._apply(f, given_args, given_kwargs, module)
        if value.tensor.dtype != target.dtype:
            value = self._apply(aten._to_copy.default, (value,), {"dtype": target.dtype}, module)
        if value.tensor.shape != target.shape:
            value = self._apply(aten.expand.default, (value, list(target.shape)), {}, module)
        if value.tensor.stride() != target.stride() or value.tensor.storage_offset():
            strided = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype, device=target.device)
            laid = Value(strided.copy_(value.tensor), value.active)
            self.entries.append(Entry(aten.clone.default, (value,), {}, [value], [laid], module))
            value = laid
        return value

    def _apply(self, f: Any, args: Any, kwargs: Any, module: str) -> Value:
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [v for v in leaves if isinstance(v, Value)]
        plain_args, plain_kwargs = tree_unflatten([v.tensor if isinstance(v, Value) else v for v in leaves], spec)
        value = Value(f(*plain_args, **plain_kwargs), any(v.active for v in inputs))
        self.entries.append(Entry(f, args, kwargs, inputs, [value], module))
        return value


def _lying(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Any, stride: Any, offset: int) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, stride)


def _window(whole: torch.Tensor, t: torch.Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The call, select or slice, by which t can be had from a whole that begins where the storage does; None where neither can."""
    shape, stride, offset = tuple(t.shape), tuple(t.stride()), t.storage_offset()
    for d in range(whole.ndim):
        size, step = whole.shape[d], whole.stride(d)
        start, rest = divmod(offset, step) if step else (0, offset)
        if rest or not start < size:
            continue
        others = [k for k in range(whole.ndim) if k != d]
        if shape == tuple(whole.shape[k] for k in others) and stride == tuple(whole.stride(k) for k in others):
            return aten.select.int, (d, start)
        if t.ndim != whole.ndim or any(shape[k] != whole.shape[k] or stride[k] != whole.stride(k) for k in others):
            continue
        if stride[d] == step and start + shape[d] <= size:
            return aten.slice.Tensor, (d, start, start + shape[d])
        every, rest = divmod(stride[d], step)
        if not rest and every > 0 and shape[d] and start + every * (shape[d] - 1) < size:
            return aten.slice.Tensor, (d, start, start + every * (shape[d] - 1) + 1, every)
    return None
