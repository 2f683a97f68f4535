"""The command line: fastsharp demo, lanczos, measure, compare and info.

Exit codes: 0 done, 1 an error of fastsharp (its message on stderr), 2 usage, 3 a pair or a measure of the curvature missed its tolerance,
130 Ctrl-C (what there is so far is printed).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastsharp.cli.parser import parser as parser
from fastsharp.cli.shared import CTRL_C as CTRL_C
from fastsharp.cli.shared import FAILED as FAILED
from fastsharp.cli.shared import NOT_CONVERGED as NOT_CONVERGED
from fastsharp.cli.shared import OK as OK
from fastsharp.cli.shared import USAGE as USAGE
from fastsharp.cli.shared import new_console


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argv defaults to the process's arguments."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as e:  # argparse exits by itself for --help and usage errors
        return e.code if isinstance(e.code, int) else USAGE
    from fastsharp.errors import FastsharpError, Interrupted
    from fastsharp.results import Eigenpairs, Report

    try:
        return int(args.run(args))
    except Interrupted as e:
        print(f"fastsharp: {e}", file=sys.stderr)
        if isinstance(e.partial, Eigenpairs):
            from fastsharp._report import table

            new_console().print(table(e.partial))
        elif isinstance(e.partial, Report):
            new_console().print(e.partial.table())
        return CTRL_C
    except KeyboardInterrupt:
        print("fastsharp: interrupted before the first result", file=sys.stderr)
        return CTRL_C
    except FastsharpError as e:
        print(f"fastsharp: {type(e).__name__}: {e}", file=sys.stderr)
        return FAILED
