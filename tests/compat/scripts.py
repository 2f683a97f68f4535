"""Scripts for other libraries, run with their imports or with fastsharp's."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(name: str, *args: str, package: str = "") -> dict[str, Any]:
    """The JSON of the script's last line; `package` takes the place of the library's name in its imports."""
    text = (HERE / name).read_text()
    library = "pyhessian" if "pyhessian" in name else "hessian_eigenthings"
    if package:
        text = text.replace(f"from {library}", f"from {package}")
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [name, *args]
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(text, str(HERE / name), "exec"), {"__name__": "__main__"})
    finally:
        sys.argv = argv
    return json.loads(printed.getvalue().splitlines()[-1])


def changed_lines(name: str, old: str, new: str) -> int:
    """Lines of a script that its change of imports touches."""
    text = (HERE / name).read_text()
    pairs = zip(text.splitlines(), text.replace(f"from {old}", f"from {new}").splitlines(), strict=True)
    return sum(a != b for a, b in pairs)
