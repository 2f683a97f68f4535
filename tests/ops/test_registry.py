"""Which backend runs, what can be forced, and what is said about one that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastsharp import _environment
from fastsharp.errors import InputError, KernelError
from fastsharp.ops import _border, _registry, alpha, force
from tests.ops.cases import case, poisoned

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world in which neither module was built."""

    def missing(name: str) -> ModuleType:
        raise ImportError(f"no module {name}")

    _registry.available.cache_clear()
    _registry.native.cache_clear()
    monkeypatch.setattr(_registry.importlib, "import_module", missing)
    yield
    _registry.available.cache_clear()
    _registry.native.cache_clear()


def python(code: str, **env: str) -> str:
    """The output of a fresh interpreter on the same source tree."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_native_backend_is_chosen_where_it_is_built() -> None:
    built = not isinstance(_registry.native("cpu"), str)
    assert _registry.choose(CPU).name == ("cpu" if built else "reference")


def test_without_native_modules_the_reference_runs_and_info_says_why(no_native: None) -> None:
    k = case(1, 5, torch.float32)
    assert _registry.choose(CPU).name == "reference"
    assert float(alpha(k.V[0], k.w, out=poisoned(1, CPU))) == float(k.V[0].double() @ k.w.double())
    facts = _environment.info()
    assert facts["_cpu"] == "fastsharp._cpu is not built, or does not load: no module fastsharp._cpu"
    assert facts["backend_cpu"] == "reference"
    assert "with a C++ compiler" in _environment.info_text()


def test_forcing_a_missing_backend_lists_what_is_registered_and_why_it_is_missing(no_native: None) -> None:
    with (
        pytest.raises(
            KernelError, match=r"'cpu' cannot be used.\nRegistered: cuda \(.*not built.*\); cpu \(.*not built.*\); reference \(ready\)"
        ),
        force("cpu"),
    ):
        pass


def test_forcing_an_unknown_backend_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"(?s)'tpu' cannot be used.*reference \(ready\)"), force("tpu"):
        pass


def test_force_ends_with_its_block_and_nests() -> None:
    outer = _registry.choose(CPU)
    with force("reference"):
        assert _registry.choose(CPU).name == "reference"
        with force(replace(outer, name="mine")):
            assert _registry.choose(CPU).name == "mine"
        assert _registry.choose(CPU).name == "reference"
    with pytest.raises(ZeroDivisionError), force("reference"):
        raise ZeroDivisionError
    assert _registry.choose(CPU) is outer


def test_a_forced_backend_of_another_device_is_refused() -> None:
    elsewhere = replace(_registry.choose(CPU), name="elsewhere", device_types=("cuda",))
    with force(elsewhere), pytest.raises(KernelError, match="'elsewhere' is forced, but the tensors are on cpu"):
        _registry.choose(CPU)


def test_a_native_failure_becomes_a_kernel_error_with_its_text() -> None:
    def kernel(*_: int) -> None:
        raise RuntimeError("dots: an illegal memory access was encountered")

    with pytest.raises(KernelError, match="native kernel failed: dots: an illegal memory access"):
        _border.call(kernel, 1, 2)


def test_environment_variable_forces_a_lower_instruction_set() -> None:
    if isinstance(_registry.native("cpu"), str):
        pytest.skip("no native module")
    code = "import torch, fastsharp._cpu as c; print(c.simd())"
    assert python(code, FASTSHARP_SIMD="scalar") == "scalar"
    assert (
        python(code, FASTSHARP_SIMD="nonsense")
        == python(code, FASTSHARP_SIMD="")
        == python("import fastsharp._cpu as c; print(c.simd_supported())")
    )


def test_one_openmp_runtime_in_the_process_and_it_is_torchs() -> None:
    if isinstance(_registry.native("cpu"), str):
        pytest.skip("no native module")
    code = (
        "import torch, re; torch.set_num_threads(2); from fastsharp import _cpu; from fastsharp.ops import alpha\n"
        "x = torch.ones(10**6); print(float(alpha(x, x, out=torch.zeros(1, dtype=torch.float64))))\n"
        "print(_cpu.openmp())\n"
        "print(*sorted({l.split()[-1] for l in open('/proc/self/maps') if re.search(r'/lib(gomp|iomp5|omp)[^/]*$', l)}))"
    )
    value, used, loaded = python(code).splitlines()
    assert float(value) == 1e6
    assert len(loaded.split()) == 1, f"OpenMP runtimes loaded: {loaded}"
    assert Path(used).resolve() == Path(loaded).resolve()


def test_info_is_plain_data_and_its_text_names_every_key() -> None:
    import json

    facts = _environment.info()
    assert json.loads(json.dumps(facts)) == facts
    text = _environment.info_text()
    assert all(line.startswith(key) for key, line in zip(facts, text.splitlines(), strict=False))


@pytest.mark.parametrize("stub", [{}, {"stub": lambda: 1}], ids=["none", "another"])
def test_a_module_of_another_version_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch, stub: dict[str, Any]) -> None:
    stale = ModuleType("fastsharp._cpu")
    stale.__dict__.update({"__file__": "/elsewhere/_cpu.so"} | stub)
    _registry.available.cache_clear()
    _registry.native.cache_clear()
    try:
        monkeypatch.setattr(_registry.importlib, "import_module", lambda name: stale)
        reason = _registry.native("cpu")
        assert isinstance(reason, str)
        assert "/elsewhere/_cpu.so) was built for another version of this source" in reason
        assert "pip install -v ." in reason
        assert _registry.choose(CPU).name == "reference"
        assert _environment.info()["_cpu"] == reason
    finally:
        _registry.available.cache_clear()
        _registry.native.cache_clear()
