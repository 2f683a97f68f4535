"""Rules about the source of the kernels that no compiler checks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fastsharp.ops import _registry

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [p for folder in ("include", "cpu", "cuda") for p in sorted((ROOT / "csrc" / folder).rglob("*")) if p.is_file()]
CSRC = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in {".hpp", ".cpp", ".cu", ".cuh", ".inl"}]


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.M)


def test_there_are_kernels_to_check() -> None:
    assert len(KERNELS) >= 8 and len(CSRC) > len(KERNELS)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_know_neither_torch_nor_python(path: Path) -> None:
    for name in includes(path):
        assert not re.search(r"torch|ATen|c10|pybind11|Python\.h|nanobind", name), f"{path.name} includes {name}"


@pytest.mark.parametrize("path", [p for p in CSRC if p.parent.name == "bindings"], ids=lambda p: p.name)
def test_bindings_know_pybind11_but_not_torch(path: Path) -> None:
    for name in includes(path):
        assert not re.search(r"torch|ATen|c10", name), f"{path.name} includes {name}"


@pytest.mark.parametrize("path", [p for p in CSRC if p.suffix in {".cu", ".cuh"}], ids=lambda p: p.name)
def test_gpu_kernels_stay_within_what_the_emulation_runs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in (r"\basm\b", "cooperative_groups", r"\batomic[A-Z]", "cudaLaunchCooperative", "__threadfence"):
        assert not re.search(word, text), f"{path.name} uses {word}"
    if path.name != "launch.cuh":
        assert "<<<" not in text and "__shared__" not in text, f"{path.name} bypasses launch.cuh"


@pytest.mark.parametrize("path", [p for p in CSRC if p.suffix == ".cu"], ids=lambda p: p.name)
def test_every_cu_begins_with_its_ladder(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("#include")[0]
    assert "v1" in head and "this file" in head


def test_only_the_border_takes_addresses() -> None:
    """Calls that hand memory to native code: `operator` and `objective` compare addresses to see changes, and say so themselves."""
    for path in sorted((ROOT / "fastsharp" / "ops").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "data_ptr"]
        assert not calls or path.name == "_border.py", f"{path.name} calls data_ptr()"


def test_native_modules_are_reached_through_the_registry_alone() -> None:
    for path in sorted((ROOT / "fastsharp").rglob("*.py")):
        if path.name == "_registry.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from fastsharp import .*_(cpu|cuda)\b|import fastsharp\._(cpu|cuda))", text, flags=re.M), path.name


def test_ops_import_nothing_of_the_rest_of_the_package() -> None:
    for path in sorted((ROOT / "fastsharp" / "ops").rglob("*.py")):
        for name in re.findall(r"^\s*(?:from|import)\s+(fastsharp[\w.]*)", path.read_text(encoding="utf-8"), flags=re.M):
            assert name.startswith("fastsharp.ops") or name == "fastsharp.errors", f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_stub_lists_exactly_what_the_module_exports(name: str) -> None:
    import importlib

    try:
        module = importlib.import_module(f"fastsharp._{name}")
    except ImportError as e:
        pytest.skip(str(e))
    stub = ast.parse((ROOT / "fastsharp" / f"_{name}.pyi").read_text(encoding="utf-8"))
    declared = {f.name for f in stub.body if isinstance(f, ast.FunctionDef)}
    declared |= {name.id for a in stub.body if isinstance(a, ast.Assign) for name in a.targets if isinstance(name, ast.Name)}
    assert declared == {k for k in vars(module) if not k.startswith("__")}


def test_every_op_has_its_column() -> None:
    """The same name in the reference, both native modules, the tests and the bench."""
    for op in ("alpha", "dots", "update"):
        assert op in _registry.Backend.__dataclass_fields__
        for path in ("fastsharp/ops/reference/krylov.py", "csrc/include/fastsharp/krylov.hpp", "csrc/cpu/krylov.cpp", f"csrc/cuda/{op}.cu",
                     "tests/ops/test_krylov.py", "bench/bench_krylov.py"):  # fmt: skip
            assert re.search(rf"\b{op}\b", (ROOT / path).read_text(encoding="utf-8")), f"{op} is missing in {path}"


def test_every_dual_op_has_its_column() -> None:
    """Reference, CPU, CUDA and Triton columns, tests and bench."""
    texts = {
        p: (ROOT / p).read_text(encoding="utf-8") for p in ("tests/ops/test_dual.py", "tests/ops/dual_cases.py", "bench/bench_dual.py")
    }
    for op in _registry.Dual.__dataclass_fields__:
        header = {"activation": "dual_activation", "norm": "dual_norm", "softmax": "dual_softmax_ce"}[op.split("_")[0]]
        for path in (
            "fastsharp/ops/dual.py",
            "fastsharp/ops/reference/dual.py",
            f"csrc/include/fastsharp/{header}.hpp",
            f"csrc/cpu/{header}.cpp",
            f"csrc/cuda/{header}.cu",
            "fastsharp/ops/triton/dual.py",
        ):
            assert re.search(rf"\b{op}\b", (ROOT / path).read_text(encoding="utf-8")), f"{op} is missing in {path}"
        assert any(re.search(rf"\b{op}\b", text) for text in texts.values()), f"{op} is not tested"
