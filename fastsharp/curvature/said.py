"""What an operator says of its preflight and of parameters that the loss does not reach."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from fastsharp.errors import DisconnectedLossError, UnusedParamWarning, stacklevel


def preflight_notes(outcome: dict[str, Any]) -> tuple[str, ...]:
    """What a result says of its preflight."""
    return (*outcome.get("notes", ()), *(("unchecked: preflight='off'",) if outcome["level"] == "off" else ()))


def unused_names(names: Sequence[str], unused: Collection[int]) -> tuple[str, ...]:
    """The names of the parameters with these numbers; DisconnectedLossError where they are all."""
    if len(unused) == len(names):
        raise DisconnectedLossError(
            f"the loss has no path to any of the {len(names)} chosen parameters ({names[0]}, ...).\n"
            "Choose parameters that the loss depends on, or remove the .detach() between them."
        )
    return tuple(names[i] for i in sorted(unused))


def warn_unused(unused: Sequence[str], label: str) -> None:
    """UnusedParamWarning that names them."""
    warnings.warn(
        f"no gradient path from the loss to {', '.join(unused)}: their rows of {label} are zero. Leave them out with params=.",
        UnusedParamWarning,
        stacklevel=stacklevel(),
    )
