"""The import table of DESIGN.md, enforced: what each module may reach inside the package, and what `import fastsharp` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastsharp"
BELOW_OBJECTIVE = {"errors", "batches", "graph_check", "guard", "locate", "losses", "parallel", "params", "reading", "widening"}
ALLOWED = {
    "errors": {"results"},  # for types
    "rng": set(),
    "quantiles": set(),
    "ops": {"errors"},
    "operator": {"errors", "composite", "linear_map"},  # sums and wrapped maps, when they are asked for
    "composite": {"errors", "operator"},
    "linear_map": {"errors", "operator"},
    "store": {"errors"},
    "recorded": {"errors", "operator", "store"},
    "params": {"errors", "graph_check"},
    "widening": set(),
    "guard": {"errors"},
    "graph_check": {"errors"},
    "parallel": {"errors"},
    "reading": {"errors"},
    "batches": {"errors", "guard", "reading"},
    "samples": {"errors", "batches", "guard", "reading"},
    "losses": {"errors", "batches"},
    "locate": {"errors", "batches"},
    "objective": BELOW_OBJECTIVE,
    "curvature": BELOW_OBJECTIVE | {"operator", "composite", "objective", "ops", "quantiles", "results"},
    "results": {"errors", "plots", "params", "report", "_report"},
    "krylov": {"errors", "operator", "ops", "quantiles", "rng", "results"},
    "swap": set(),
    "doubling": {"losses"},
    "difference": BELOW_OBJECTIVE | {"objective", "curvature", "doubling", "swap"},
    "engine_check": BELOW_OBJECTIVE | {"objective", "curvature", "difference"},
    "score_check": BELOW_OBJECTIVE | {"objective", "curvature", "difference"},
    "preflight": BELOW_OBJECTIVE | {"objective", "curvature", "difference", "engine_check", "score_check"},
    "measures": BELOW_OBJECTIVE | {"objective", "operator", "krylov", "quantiles", "results", "rng", "swap"},
    "data": {"errors"},
    "models": {"errors"},
}
ABOVE = {"api", "cli", "compat", "plots", "progress", "training", "callbacks", "_report", "report", "_environment", "__init__"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The module or subpackage that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def reached(path: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, also inside functions and for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastsharp":
            names |= {f"fastsharp.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("fastsharp.")}


def test_every_module_has_its_row() -> None:
    assert {part_of(path) for path in FILES} == set(ALLOWED) | ABOVE


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path) -> None:
    part = part_of(path)
    if part in ALLOWED:
        assert reached(path) - {part} <= ALLOWED[part]


def test_import_needs_torch_and_numpy_alone() -> None:
    """rich, matplotlib, scipy, torchvision and safetensors are imported on first use."""
    code = "import torch, sys; before = set(sys.modules); import fastsharp; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "fastsharp" in loaded
    assert not loaded & {"rich", "matplotlib", "scipy", "torchvision", "safetensors", "triton", "PIL", "sklearn", "transformers"}
