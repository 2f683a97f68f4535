"""A result as JSON values with arrays beside them, and back by the types of its fields.

    {"schema": "fastsharp.eigenpairs", "schema_version": 2, FIELD: value, ...,
     "tensors":    {POINTER: {"dtype", "shape", "values": "inline" | "file" | "left out", "sha256" where in the file}},
     "not_finite": {POINTER: "inf" | "-inf" | "nan"},
     "sha256":     of all the rest}

POINTER is a JSON pointer (RFC 6901). A tensor is a nested list in its place, or null where its values are elsewhere; a number that JSON
has no sign for is null, and `not_finite` says which it was. Results and dataclasses inside are objects. Reading goes by the annotations
of the fields, so that a file can only make what the class states. The hash tells damage, not forgery.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastsharp.errors import InputError
from fastsharp.results.result import KNOWN, Result

LARGE = 10_000  # numbers
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.bool)}
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_META = ("schema", "schema_version", "tensors", "not_finite", "sha256")


class Unreadable(ValueError):
    """What a file holds is not a result; the text says why."""


# --- to JSON ----------------------------------------------------------------------------------------------------------


def encode(result: Result, *, large: bool, apart: bool, extra: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(content, arrays): the JSON object of a result, and numpy arrays by pointer without its slash.

    large   whether tensors of more than LARGE numbers keep their values
    apart   tensors go into the arrays, not into the JSON
    extra   further sections of the object (data, model, seconds); reading passes them over
    """
    encoder = _Encoder(large, apart)
    content = encoder.result(result, "")
    for name, value in (extra or {}).items():
        if name in content or name in _META:
            raise InputError(f"{name!r} is a field of {result.schema}, no further section. Give it another name.")
        content[name] = encoder.value(value, _joined("", name))
    content["tensors"], content["not_finite"] = encoder.tensors, encoder.not_finite
    content["sha256"] = checksum(content)
    return content, encoder.arrays


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON object without its own "sha256", whatever its order and spacing."""
    rest = {k: v for k, v in content.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


class _Encoder:
    def __init__(self, large: bool, apart: bool) -> None:
        self._large, self._apart = large, apart
        self.tensors: dict[str, dict[str, Any]] = {}
        self.not_finite: dict[str, str] = {}
        self.arrays: dict[str, Any] = {}

    def result(self, result: Result, at: str) -> dict[str, Any]:
        return {"schema": result.schema, "schema_version": result.schema_version, **self._fields(result, at)}

    def _fields(self, value: Any, at: str) -> dict[str, Any]:
        return {f.name: self.value(getattr(value, f.name), _joined(at, f.name)) for f in dataclasses.fields(value)}

    def value(self, value: Any, at: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                self.not_finite[at] = str(value)
                return None
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, at)
        if isinstance(value, np.ndarray | np.generic):
            return self.value(value.tolist(), at)
        if isinstance(value, Result):
            return self.result(value, at)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._fields(value, at)
        if isinstance(value, Mapping):
            return {str(k): self.value(v, _joined(at, str(k))) for k, v in value.items()}
        if isinstance(value, set | frozenset):
            value = sorted(value, key=str)
        if isinstance(value, list | tuple):
            return [self.value(v, _joined(at, str(i))) for i, v in enumerate(value)]
        if callable(value):  # its str() holds an address, which differs from run to run
            return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        return str(value)

    def _tensor(self, t: torch.Tensor, at: str) -> Any:
        dtype = str(t.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise InputError(f"{at[1:]} is {t.dtype}; result files hold {', '.join(_DTYPES)}. Convert it first.")
        entry = self.tensors[at] = {"dtype": dtype, "shape": list(t.shape), "values": "inline"}
        if t.is_meta or (t.numel() > LARGE and not self._large):
            entry["values"] = "left out"
            return None
        t = t.detach().cpu().contiguous()
        if self._apart:
            array = self.arrays[at[1:]] = t.numpy()
            entry.update(values="file", sha256=_array_hash(array))
            return None
        return t.tolist() if bool(t.isfinite().all()) else self.value(t.tolist(), at)


# --- and back -----------------------------------------------------------------------------------------------------------


def decode(content: Any, arrays: Mapping[str, Any]) -> Result:
    """The result that `content` and `arrays` hold; Unreadable where they hold none, a newer one, or a damaged one."""
    if not isinstance(content, dict) or not isinstance(content.get("schema"), str):
        raise Unreadable("it holds no result of fastsharp: there is no schema in it")
    name, version = content["schema"], content.get("schema_version")
    cls = KNOWN.get(name)
    if cls is None:
        raise Unreadable(f"its schema {name!r} is none of {', '.join(sorted(KNOWN))}")
    if type(version) is not int or not 1 <= version <= cls.schema_version:
        raise Unreadable(f"its schema {name!r} has version {version!r}, this fastsharp reads up to {cls.schema_version}")
    if "sha256" in content or (name, version) not in _WITHOUT_CHECKSUM:
        _compare(content)
    return _Decoder(content, arrays).result(cls, content, "")


def _compare(content: dict[str, Any]) -> None:
    try:
        found = checksum(content)
    except ValueError as e:
        raise Unreadable(f"it is not strict JSON ({e})") from e
    if content.get("sha256") != found:
        raise Unreadable("its checksum is missing or wrong: the file is damaged or was edited")


class _Decoder:
    def __init__(self, content: dict[str, Any], arrays: Mapping[str, Any]) -> None:
        self._content, self._arrays = content, arrays
        self._tensors = self._section("tensors")
        self._not_finite = self._section("not_finite")

    def _section(self, name: str) -> dict[str, Any]:
        found = self._content.get(name, {})
        if not isinstance(found, dict):
            raise Unreadable(f"its section {name!r} is no object")
        return found

    def result(self, cls: type[Result], value: Any, at: str) -> Result:
        """A result of class cls or of one below it, of its present or an older version."""
        stated = KNOWN.get(str(value.get("schema"))) if isinstance(value, dict) else None
        cls = stated if stated is not None and issubclass(stated, cls) else cls
        self._must(isinstance(value, dict) and value.get("schema") == cls.schema, at, f"a {cls.schema}")
        version = value.get("schema_version")
        self._must(type(version) is int and 1 <= version <= cls.schema_version, at, f"a version of {cls.schema} up to {cls.schema_version}")
        while version < cls.schema_version:
            value, tensors, not_finite = _UPGRADES[cls.schema, version](value)
            self._tensors = {**self._tensors, **{at + p: entry for p, entry in tensors.items()}}
            self._not_finite = {**self._not_finite, **{at + p: sign for p, sign in not_finite.items()}}
            version += 1
        made: Result = self._dataclass(cls, value, at)
        if defect := made.defect():
            raise Unreadable(f"the fields of its {cls.schema} do not belong together: {defect}")
        left_out = [p[1:] for p, entry in self._tensors.items() if isinstance(entry, dict) and entry.get("values") == "left out"]
        if not at and left_out and hasattr(made, "notes"):
            note = f"not in the file, without values here: {', '.join(left_out)}"
            made = made if note in made.notes else dataclasses.replace(made, notes=(*made.notes, note))  # type: ignore[type-var]
        return made

    def read(self, kind: Any, value: Any, at: str) -> Any:
        """value as the annotation `kind` has it."""
        if kind is Any:
            return self._free(value, at)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, value, at)
        if kind is torch.Tensor:
            return self._tensor(value, at)
        if kind is float and value is None and at in self._not_finite:
            return self._sign(at)
        if kind is float:
            self._must(type(value) in (int, float), at, "a number")
            return float(value)
        if kind in (bool, int, str, type(None)):
            self._must(type(value) is kind, at, f"of type {kind.__name__}")
            return value
        if origin is tuple and args[-1] is not Ellipsis:
            self._must(isinstance(value, list) and len(value) == len(args), at, f"a list of {len(args)}")
            return tuple(self.read(a, v, _joined(at, str(i))) for i, (a, v) in enumerate(zip(args, value, strict=True)))
        if isinstance(origin, type) and issubclass(origin, Sequence):
            self._must(isinstance(value, list), at, "a list")
            items = [self.read(args[0], v, _joined(at, str(i))) for i, v in enumerate(value)]
            return tuple(items) if origin is tuple else items
        if isinstance(origin, type) and issubclass(origin, Mapping):
            self._must(isinstance(value, dict), at, "an object")
            return {k: self.read(args[1], v, _joined(at, k)) for k, v in value.items()}
        if isinstance(kind, type) and issubclass(kind, Result):
            return self.result(kind, value, at)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, at)
        raise TypeError(f"{at}: fields of results cannot be {kind!r}; see fastsharp.results.result.Result")

    def _dataclass(self, cls: Any, value: Any, at: str) -> Any:
        self._must(isinstance(value, dict), at, "an object")
        read = {}
        for name, kind in _kinds(cls).items():
            self._must(name in value, _joined(at, name), "there")
            read[name] = self.read(kind, value[name], _joined(at, name))
        return cls(**read)

    def _union(self, kinds: tuple[Any, ...], value: Any, at: str) -> Any:
        complaint: Unreadable | None = None
        for kind in kinds:
            try:
                return self.read(kind, value, at)
            except Unreadable as e:
                complaint = e if complaint is None or kind is not type(None) else complaint
        assert complaint is not None
        raise complaint

    def _free(self, value: Any, at: str) -> Any:
        """JSON values as they are, with tensors and numbers that are not finite put back."""
        if at in self._tensors:
            return self._tensor(value, at)
        if value is None and at in self._not_finite:
            return self._sign(at)
        if isinstance(value, dict):
            return {k: self._free(v, _joined(at, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self._free(v, _joined(at, str(i))) for i, v in enumerate(value)]
        return value

    def _sign(self, at: str) -> float:
        sign = self._not_finite[at]
        self._must(isinstance(sign, str) and sign in _NOT_FINITE, at, "inf, -inf or nan")
        return _NOT_FINITE[sign]

    def _tensor(self, value: Any, at: str) -> torch.Tensor:
        entry = self._tensors.get(at)
        if not isinstance(entry, dict):
            raise Unreadable(f"{at[1:]} is not a tensor")
        stated: list[Any] = [entry.get(key) for key in ("dtype", "shape", "values")]
        dtype, shape, where = stated
        self._must(isinstance(dtype, str) and dtype in _DTYPES, at, f"of a dtype among {', '.join(_DTYPES)}")
        self._must(isinstance(shape, list) and all(type(s) is int and s >= 0 for s in shape), at, "of a shape")
        self._must(math.prod(shape) < 2**48, at, "of a size that memories have")
        if where == "left out":
            return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        if where == "file":
            array = self._arrays.get(at[1:])
            if array is None or (array.dtype, array.shape) != (np.dtype(dtype), tuple(shape)):
                raise Unreadable(f"the array {at[1:]} is missing, or not {dtype} {tuple(shape)} as stated")
            self._must(entry.get("sha256") == _array_hash(array), at, "whole: its checksum is wrong, the file is damaged")
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        self._must(where == "inline", at, "inline, in the file or left out")
        numbers = (bool,) if dtype == "bool" else (int,) if dtype.startswith("int") else (int, float)
        try:
            t = torch.tensor(self._filled(value, at, numbers), dtype=_DTYPES[dtype])
            if t.numel() and list(t.shape) != shape:
                raise ValueError(f"its shape is {tuple(t.shape)}")
            return t.reshape(shape)
        except (ValueError, TypeError, RuntimeError, OverflowError) as e:
            raise Unreadable(f"{at[1:]} is not {dtype} {tuple(shape)}, as it says ({e})") from e

    def _filled(self, value: Any, at: str, numbers: tuple[type, ...]) -> Any:
        """Nested lists of numbers with those that are not finite put back."""
        if isinstance(value, list):
            return [self._filled(v, f"{at}/{i}", numbers) for i, v in enumerate(value)]
        if value is None and at in self._not_finite:
            return self._sign(at)
        self._must(type(value) in numbers, at, f"of type {numbers[-1].__name__}")
        return value

    @staticmethod
    def _must(holds: bool, at: str, expected: str) -> None:
        if not holds:
            raise Unreadable(f"{at[1:] or 'the file'} is not {expected}")


def _array_hash(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _joined(at: str, name: str) -> str:
    return f"{at}/{name.replace('~', '~0').replace('/', '~1')}"


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    """{field: its annotation}."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


# --- older versions -----------------------------------------------------------------------------------------------------

Upgraded = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # fields, and their entries in "tensors" and "not_finite"


def _eigenpairs_1(value: dict[str, Any]) -> Upgraded:
    """Version 1 is the `result.json` of the command line before `fastsharp.load`: no vectors, layout, dtypes or signs."""
    try:
        k, n = len(value["eigenvalues"]), value["n_parameters"]
        dtype = str(value["provenance"].get("dtype", "torch.float64")).removeprefix("torch.")
        tensors: dict[str, Any] = {
            f"/{name}": {"dtype": "bool" if name == "converged" else "float64", "shape": [k], "values": "inline"}
            for name in ("eigenvalues", "residuals", "error_bounds", "converged")
        }
        not_finite = {f"{p}/{i}": "nan" for p in tensors for i, v in enumerate(value[p[1:]]) if v is None}
    except (KeyError, TypeError, AttributeError) as e:
        raise Unreadable(f"its fields are not those of a fastsharp.eigenpairs of version 1 ({type(e).__name__}: {e})") from e
    tensors["/eigenvectors"] = {"dtype": dtype, "shape": [k, n], "values": "left out"}
    return {**value, "eigenvectors": None, "layout": None}, tensors, not_finite


_WITHOUT_CHECKSUM = {("fastsharp.eigenpairs", 1)}
_UPGRADES: dict[tuple[str, int], Callable[[dict[str, Any]], Upgraded]] = {("fastsharp.eigenpairs", 1): _eigenpairs_1}
