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

from fastsharp.curvature.rop.geometry import copy_of, covers, lying, place, window
from fastsharp.curvature.rop.tree import leaves, mapped, tensors

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
_NO_DERIVATIVE = {f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")} | {
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "bernoulli")
}


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


_DROPOUT = {  # position of the rate of dropout
    aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    aten._scaled_dot_product_flash_attention.default: 3,
    aten._scaled_dot_product_efficient_attention.default: 5,
    aten._scaled_dot_product_cudnn_attention.default: 5,
}


def _without_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call of attention, which torch marks as random, draws nothing."""
    at = _DROPOUT.get(func)
    return at is not None and not (args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))


_REALLOCATE = ("resize_", "resize_as_", "set_")


def _written(schema: _Schema, args: Any, kwargs: Any) -> list[torch.Tensor]:
    named = [args[i] if i < len(args) else kwargs.get(name) for i, name in schema.writes]
    return tensors(named)


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
            key = place(p, True)
            if key in at.values:
                raise Unrecorded("two parameters in the same memory")
            value = at.values[key] = Value(p.detach(), True)
            self.params.append(value)

    def call(self, func: Any, args: Any, kwargs: Any, module: str) -> Any:
        """Run a call; enter it where it is active or writes what the tape holds."""
        active = torch.is_grad_enabled() and _name(func) not in _NO_DERIVATIVE
        active = active and any(self._active(t) for t in tensors((args, kwargs)))
        schema = _schema(func)
        if schema.writes:
            if not active:
                self._overwrite(func, _written(schema, args, kwargs))
                return func(*args, **kwargs)
            if func is not aten.detach_.default:
                return self._write(func, schema, args, kwargs, module)
        if not active or func is aten.detach.default or func is aten.detach_.default:
            return func(*args, **kwargs)
        values = mapped(self._value, (args, kwargs))
        if func is aten.native_dropout.default:
            return self._dropout(values[0], func(*args, **kwargs), module)
        if schema.random and not _without_dropout(func, args, kwargs):
            raise Unrecorded(f"a random operation on active values ({func})")
        result = func(*args, **kwargs)
        if func is aten.as_strided.default and self._at(args[0]).root is not None:
            self._view(self._at(args[0]), result)  # strides count in the storage, from which its value may have moved
        else:
            self._enter(func, values, result, module)
        return result

    def _dropout(self, given: Any, result: tuple[torch.Tensor, torch.Tensor], module: str) -> Any:
        """The draw is a constant: y = x * mask / (1 - p)."""
        x, p, train = given
        keep = 1.0 if train is False else 1.0 - p
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
        value = at.values.get(place(t, active))
        if value is None and active:
            return self._view(at, t)
        if value is None:
            value = at.values[place(t, False)] = Value(t.detach(), False)
            at.inside.append(value)
        return value

    def _value(self, leaf: Any) -> Any:
        return self.read(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _view(self, at: _Storage, t: torch.Tensor) -> Value:
        """The value of an active view, read from that of the whole storage."""
        key = place(t, True)
        if key not in at.values:
            root = None if at.root is None else at.values[at.root]
            if root is None or root.tensor.dtype != t.dtype:
                raise Unrecorded("a view of memory that was written in part")
            whole = (aten.as_strided.default, (list(t.shape), list(t.stride()), t.storage_offset()))
            f, args = window(root.tensor, t) or whole
            at.values[key] = self._apply(f, (root, *args), {}, "")
        return at.values[key]

    def _active(self, t: torch.Tensor) -> bool:
        if not t.requires_grad or t.layout != torch.strided:
            return False
        at = self._storages.get(t.untyped_storage()._cdata)
        if at is None or not at.active:
            return False
        return not at.param or place(t, True) in at.values  # parameters that were not chosen may share a buffer with one that was

    def _at(self, t: torch.Tensor) -> _Storage:
        storage = t.untyped_storage()
        at = self._storages.get(storage._cdata)
        if at is None:
            at = self._storages[storage._cdata] = _Storage(storage)
        return at

    def _enter(self, func: Any, inputs: Any, result: Any, module: str) -> None:
        """Append a call that has run, and give its results their values."""
        given = [v for v in leaves(inputs) if isinstance(v, Value)]
        if not any(v.active for v in given):  # a constant was written over what had been active
            return
        outputs, new = [], False
        for t in tensors(result):
            if t.layout != torch.strided or t.is_complex():
                raise Unrecorded(f"active values that are sparse or complex ({func})")
            value = Value(t.detach(), t.is_floating_point())
            outputs.append(value)
            at, key = self._at(t), place(t, value.active)
            if value.active and key in at.values:
                continue  # a view that changes nothing
            at.values[key] = value
            at.inside.append(value)
            if value.active:
                new = at.active = True
                if at.root is None and not at.param and covers(t):
                    at.root = key
        if new:
            args, kwargs = inputs
            self.entries.append(Entry(func, args, kwargs, given, outputs, module))

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
            copy = copy_of(at.storage)
            for value in at.inside:
                t = value.tensor
                value.tensor = lying(copy, t.dtype, t.shape, t.stride(), int(t.storage_offset()))
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
            values = mapped(self._value, (args, kwargs))
            func(*args, **kwargs)
            self._enter(f, values, target, module)
            return target
        value = self._computed(f, target, args, kwargs, module)
        key = place(target, True)
        if covers(target):
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
        found = window(root.tensor, target)
        if found is not None:
            scatter = aten.select_scatter.default if found[0] is aten.select.int else aten.slice_scatter.default
            return self._apply(scatter, (root, value, *found[1]), {}, module)
        size = root.tensor.numel()
        if root.tensor.ndim != 1:
            root = self._apply(aten.as_strided.default, (root, [size], [1], 0), {}, module)
            at.root = place(root.tensor, True)
        index = torch.arange(size, device=target.device).as_strided(target.shape, target.stride(), target.storage_offset())
        return self._apply(aten.index_put.default, (root, [Value(index.contiguous(), False)], value), {}, module)

    def _root(self, at: _Storage, target: torch.Tensor) -> Value:
        """The whole of a storage before a part of it, `target`, is written."""
        if at.root is not None:
            return at.values[at.root]
        if at.active:
            raise Unrecorded("a write to a part of a tensor that is not the whole of its memory")
        base = target._base
        if base is not None and covers(base) and base.dtype == target.dtype:
            at.root = place(base, True)
            return self.read(base)
        size = at.storage.nbytes() // target.element_size()
        root = Value(lying(copy_of(at.storage), target.dtype, (size,), (1,), 0), False)
        at.root = place(root.tensor, True)
        return root

    def _computed(self, f: Any, target: torch.Tensor, args: Any, kwargs: Any, module: str) -> Value:
        """What the write leaves in its target, in the target's dtype, shape and strides."""
        if f is aten.copy.default:  # does not depend on what was there
            value = self.read(args[1])
        else:
            given_args, given_kwargs = mapped(self._value, (args, kwargs))
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
        inputs = [v for v in leaves((args, kwargs)) if isinstance(v, Value)]
        plain_args, plain_kwargs = mapped(lambda leaf: leaf.tensor if isinstance(leaf, Value) else leaf, (args, kwargs))
        value = Value(f(*plain_args, **plain_kwargs), any(v.active for v in inputs))
        self.entries.append(Entry(f, args, kwargs, inputs, [value], module))
        return value
