"""What the command line shows of a result: a table for 80 columns and the lines under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from fastsharp.results import Eigenpairs, LayerSpectra


def table(result: Eigenpairs) -> Table:
    """One row per pair; relative is residual / |eigenvalue|, bound the distance within which an eigenvalue is certain."""
    from rich import box
    from rich.table import Table

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("#", justify="right", style="dim")
    for name in ("eigenvalue", "residual", "relative", "error bound"):
        t.add_column(name, justify="right")
    t.add_column("converged", justify="center")
    relative = relative_residuals(result)
    show = _aligned(result.eigenvalues.tolist())
    rows = zip(result.eigenvalues.tolist(), result.residuals.tolist(), relative, result.error_bounds.tolist(), strict=True)
    for i, (value, residual, rel, bound) in enumerate(rows):
        done = "[green]yes[/]" if bool(result.converged[i]) else "[bold red]NO[/]"
        t.add_row(str(i + 1), f"[bold]{show(value)}[/]", f"{residual:.1e}", f"{rel:.1e}", f"{bound:.1e}", done)
    return t


def _aligned(values: list[float]) -> Callable[[float], str]:
    """Six significant digits for the largest, the same number of decimals for all; exponents where decimals would hide one."""
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    top = math.floor(math.log10(max(sizes))) if sizes else 0
    if not -3 <= top <= 6 or (sizes and min(sizes) < max(sizes) * 1e-4):
        return lambda v: f"{v:.5e}"
    return lambda v: f"{v:.{max(0, 5 - top)}f}"


def relative_residuals(result: Eigenpairs) -> list[float]:
    """||Hv - lambda v|| / |lambda| per pair; inf where lambda is zero and the residual is not."""
    pairs = zip(result.residuals.tolist(), result.eigenvalues.tolist(), strict=True)
    return [r / abs(v) if v else (math.inf if r else 0.0) for r, v in pairs]


def facts(result: Eigenpairs, seconds: float) -> list[tuple[str, str]]:
    """(label, text) of the lines under the table: parameters, products, verification, time, preflight, backend."""
    known = {**result.provenance, **result.settings}
    checked = "true residuals, one product per pair" if result.verified else "off: residuals are the recurrence's estimate"
    lines = [
        ("parameters", f"{result.eigenvectors.shape[1]:,}"),
        ("products", f"{result.n_matvec} Hessian-vector products"),
        ("verification", f"{result.n_verify} products more ({checked})"),
        ("seconds", f"{seconds:.1f}"),
    ]
    if "preflight" in known:
        lines.append(("preflight", _preflight(known["preflight"])))
    if "backend" in known:
        lines.append(("backend", str(known["backend"])))
    return lines


def _preflight(outcome: Any) -> str:
    """What the checks measured: a run that got this far passed them, unless they were off."""
    if not isinstance(outcome, Mapping):
        return str(outcome)
    if outcome.get("level") == "off":
        return "off: unchecked"
    measured = [
        f"{k.replace('_', ' ')} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in outcome.items() if k != "level" and v != ()
    ]
    return f"passed ({outcome.get('level')}): {', '.join(measured)}"


def layer_table(result: LayerSpectra) -> Table:
    """One row a layer. The coupling is ||H_l: without H_ll||_F, with its standard error; it is left out where it was not asked for."""
    from rich import box
    from rich.table import Table

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("layer", overflow="fold")
    coupled = result.coupling is not None
    for name in ("n", "top eigenvalue", "error bound", "trace", *(["coupling"] if coupled else [])):
        t.add_column(name, justify="right")
    t.add_column("block by")
    for layer in result:
        done = bool(layer.converged.all())
        top, bound = (float(values[0]) for values in (layer.eigenvalues, layer.error_bounds))
        columns = [layer.name, f"{layer.n:,}", f"[bold]{top:.5g}[/]" if done else f"[bold red]{top:.5g} NOT CONVERGED[/]", f"{bound:.0e}"]
        t.add_row(
            *columns,
            _measured(layer.trace.value, layer.trace.stderr),
            *([_measured(*(layer.coupling or (0.0, 0.0)))] * coupled),
            layer.route,
        )
    return t


def _measured(value: float, stderr: float) -> str:
    return f"{value:.4g}" if stderr == 0.0 else f"{value:.4g} ± {stderr:.2g}"
