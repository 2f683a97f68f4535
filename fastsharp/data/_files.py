"""Where data files are looked for, how their hashes are checked, and the one error when they are nowhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from fastsharp.errors import DataFormatError, DataNotFoundError, InputError

VARIABLE = "FASTSHARP_DATA"
HERE = Path(__file__).parent  # the embedded sample lies here


def cache_folder() -> Path:
    """The user's cache folder for data; not created by asking."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastsharp"


def places(root: str | os.PathLike[str] | None, *system: Path) -> list[Path]:
    """Folders in the order in which they are searched: root, FASTSHARP_DATA, system folders, the user's cache."""
    named = [root] if root is not None else []
    if os.environ.get(VARIABLE):
        named.append(os.environ[VARIABLE])
    return [Path(p).expanduser() for p in named] + list(system) + [cache_folder()]


def not_found(what: str, files: str, looked: Iterable[Path], remedy: str) -> DataNotFoundError:
    """The one error for absent data: what was sought, every place looked in, the command that provides it."""
    where = ", ".join(dict.fromkeys(str(p) for p in looked))
    return DataNotFoundError(f"{what} was not found: sought {files}.\nLooked in (root=, ${VARIABLE}, system, cache): {where}.\n{remedy}")


def check_split(split: str, what: str) -> None:
    if split not in ("train", "test"):
        raise InputError(f"{what}: split is {split!r}, expected 'train' or 'test'.")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path: Path, found: str, expected: str, what: str) -> None:
    """DataFormatError unless found == expected; the user's file is left as it is."""
    if found != expected:
        raise DataFormatError(
            f"{path}: sha256 of {what} is\n  {found}, expected\n  {expected}.\n"
            "The file is damaged or another version; it was left untouched. Fetch it again or point root= elsewhere."
        )


def combined(digests: Iterable[str]) -> str:
    """One digest for several files: sha256 of their hex digests, one a line."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def own_file(name: str) -> Path:
    """A file shipped in the package, checked against SHA256SUMS beside it, so that damage is an error and not a number."""
    path = HERE / name
    if not path.is_file():
        raise DataNotFoundError(f"{path} is missing from the installed package. Reinstall fastsharp.")
    check_hash(path, sha256_file(path), own_sums()[name], "the embedded file")
    return path


def own_sums() -> dict[str, str]:
    """{file name: sha256} of the shipped files, from SHA256SUMS (the format of sha256sum)."""
    lines = [line.split() for line in (HERE / "SHA256SUMS").read_text().splitlines()]
    return {name: digest for digest, name in lines}
