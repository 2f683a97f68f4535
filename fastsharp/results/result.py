"""Result: what every measurement has in common, a place in files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar

KNOWN: dict[str, type[Result]] = {}  # by schema


class Result:
    """Base of the frozen dataclasses that measurements return: they are written to files and read back by `fastsharp.load`.

    A subclass is known by its schema, "fastsharp." and its name in snake case, and by a version, which counts up with every change
    of its fields: `class Thing(Result, version=2)`. Fields may be numbers, text, tensors, other dataclasses, and tuples, lists,
    mappings and unions of these; what is annotated `Any` comes back as JSON has it.
    """

    schema: ClassVar[str]
    schema_version: ClassVar[int]

    def __init_subclass__(cls, *, version: int = 1) -> None:
        super().__init_subclass__()
        cls.schema = "fastsharp." + re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        cls.schema_version = version
        KNOWN[cls.schema] = cls

    def save(self, path: str | os.PathLike[str], *, large: bool | None = None) -> Path:
        """Write the result as .json, .npz or .safetensors, by the suffix of `path`; `fastsharp.load` reads it back.

        large   whether tensors of more than 10,000 numbers (eigenvectors) go in; None: into .npz and .safetensors, not into .json
        -> path; the file is there whole or not at all, and replaces an older one.
        Raises InputError for another suffix or a dtype that files do not hold, OSError where the disk refuses.
        """
        from fastsharp.results._files import save

        return save(self, path, large=large)

    def to_json(self, *, large: bool = False) -> str:
        """The text that `save` writes into a .json file."""
        from fastsharp.results._files import json_text

        return json_text(self, large=large)

    def defect(self) -> str:
        """Why the fields cannot belong together, "" where they can; asked of results that come from a file."""
        return ""
