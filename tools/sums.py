"""SHA256SUMS of the files shipped in fastsharp/data: read by the package at run time, rewritten by the build scripts."""

from __future__ import annotations

from pathlib import Path

from fastsharp.data import _files


def record(path: Path) -> None:
    """Set the line of `path` in SHA256SUMS, others unchanged, sorted by name (the format of sha256sum)."""
    sums = _files.HERE / "SHA256SUMS"
    known = _files.own_sums() if sums.exists() else {}
    known[path.name] = _files.sha256_file(path)
    sums.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(known.items())))
