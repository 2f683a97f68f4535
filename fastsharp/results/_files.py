"""Files of results: strict JSON, NPZ and safetensors. Nothing is ever unpickled.

In NPZ and safetensors the JSON object stands beside the arrays, as member "fastsharp" of the one and in the metadata of the other.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastsharp.errors import DataFormatError, DataNotFoundError, InputError
from fastsharp.results._export import Unreadable, decode, encode
from fastsharp.results.result import Result

SUFFIXES = (".json", ".npz", ".safetensors")
_HEADER = "fastsharp"


def save(result: Result, path: str | os.PathLike[str], *, large: bool | None = None, extra: Mapping[str, Any] | None = None) -> Path:
    """`Result.save`, with further sections of the JSON object."""
    path = _checked(path)
    apart = path.suffix != ".json"
    content, arrays = encode(result, large=apart if large is None else large, apart=apart, extra=extra)
    with whole(path) as part:
        if path.suffix == ".json":
            part.write_text(_text(content), encoding="utf-8")
        elif path.suffix == ".npz":
            _write_npz(part, {_HEADER: np.frombuffer(_text(content).encode(), dtype=np.uint8), **arrays})
        else:
            from safetensors.numpy import save_file

            part.touch()
            mode = part.stat().st_mode  # that of any new file; save_file makes one that others cannot read
            save_file(arrays, part, metadata={_HEADER: _text(content)})
            part.chmod(mode)
    return path


def load(path: str | os.PathLike[str]) -> Result:
    """The result in a file that `Result.save` or the command line wrote, of this or an older version; tensors are on the host.

    Tensors that were left out (large ones, in JSON) have their dtype and shape, but no values: they are on the device "meta".
    Raises DataFormatError for a file that is damaged, of a newer version or no result at all, DataNotFoundError where there is none,
    InputError for another suffix than .json, .npz or .safetensors.
    """
    path = _checked(path)
    if not path.exists():
        raise DataNotFoundError(f"there is no file {path}. Check the folder and the name.")
    try:
        return decode(*_READERS[path.suffix](path))
    except (Unreadable, RecursionError) as e:
        raise DataFormatError(
            f"{path}: {e}.\nTake another copy, or write it again with save(); a file of a newer fastsharp needs that version."
        ) from e


def json_text(result: Result, *, large: bool = False) -> str:
    """The text of a .json file."""
    return _text(encode(result, large=large, apart=False)[0])


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name when all is on the disk, and is gone where writing failed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        yield part
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, indent=2) + "\n"


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: a result is kept in a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}. Give it one of these."
        )
    return path


def _parsed(text: str | bytes) -> Any:
    """Strict JSON."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    def number(token: str) -> float:
        value = float(token)
        if math.isinf(value):
            raise ValueError(f"{token} is beyond float64")
        return value

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as e:
        raise Unreadable(f"it is not strict JSON ({e})") from e


def _read_json(path: Path) -> tuple[Any, dict[str, Any]]:
    return _parsed(path.read_bytes()), {}


def _write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """As np.savez does, but with a fixed date, so that equal results make equal files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, array, version=(1, 0), allow_pickle=False)


def _read_npz(path: Path) -> tuple[Any, dict[str, Any]]:
    """Members that add up to no more than the file: what is read is never more than what is there."""
    try:
        with path.open("rb") as f, zipfile.ZipFile(f) as archive:
            members = archive.infolist()
            if sum(m.file_size for m in members) > path.stat().st_size:
                raise Unreadable("its members are larger than the file: compressed or overlapping, which save() never makes")
            arrays = {m.filename.removesuffix(".npy"): _array(archive.read(m)) for m in members}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError, struct.error) as e:
        raise e if isinstance(e, Unreadable) else Unreadable(f"it is not a whole NPZ file ({e})") from e
    if _HEADER not in arrays:
        raise Unreadable(f"it holds no result of fastsharp: there is no array {_HEADER!r} in it")
    return _parsed(arrays.pop(_HEADER).tobytes()), arrays


def _array(raw: bytes) -> Any:
    """The array of a .npy file; its header is compared with what is there before anything is allocated."""
    f = io.BytesIO(raw)
    if np.lib.format.read_magic(f) != (1, 0):
        raise Unreadable("an array in it is not in version 1.0 of the NPY format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
    count = 1
    for size in shape:
        count *= size
    if (fortran and len(shape) > 1) or count * dtype.itemsize != len(raw) - f.tell():
        raise Unreadable("an array in it has another size than it says, or another order")
    return np.frombuffer(raw, dtype, count, f.tell()).reshape(shape)  # which refuses objects


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as f:
            header = (f.metadata() or {}).get(_HEADER)
            arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise Unreadable(f"it is not a whole safetensors file ({e})") from e
    if header is None:
        raise Unreadable(f"it holds no result of fastsharp: there is no {_HEADER!r} in its metadata")
    return _parsed(header), arrays


_READERS = {".json": _read_json, ".npz": _read_npz, ".safetensors": _read_safetensors}
