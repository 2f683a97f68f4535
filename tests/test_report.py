"""The record of a result is strict JSON whatever the settings hold, and a file appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import fastsharp
from fastsharp._report import facts, plain, record, table, write_json


@pytest.fixture
def result():
    return fastsharp.lanczos(torch.diag(torch.linspace(-3.0, 5.0, 80, dtype=torch.float64)), k=3)


def test_what_json_has_no_sign_for_becomes_null_or_text(result):
    odd = {
        "inf": math.inf,
        "nan": torch.tensor([1.0, math.nan]),
        "dtype": torch.float32,
        "loss": torch.nn.functional.mse_loss,
        "path": {1, 2},
    }
    content = record(dataclasses.replace(result, settings=odd, error_bounds=torch.tensor([math.inf, 0.0, 1.0])), seconds=1.5)
    text = json.dumps(content, allow_nan=False)
    back = json.loads(text)
    assert back["settings"] == {
        "inf": None,
        "nan": [1.0, None],
        "dtype": "torch.float32",
        "loss": "torch.nn.functional.mse_loss",
        "path": [1, 2],
    }
    assert back["error_bounds"] == [None, 0.0, 1.0]
    assert back["eigenvalues"] == result.eigenvalues.tolist()
    assert (back["schema"], back["schema_version"], back["seconds"]) == ("fastsharp.eigenpairs", 1, 1.5)


def test_a_failed_write_leaves_the_older_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    monkeypatch.setattr(type(path), "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("values", [[31.2, 4.5, 1.0], [3e5, 1.0, 1e-3], [2e-9, 1e-9, 0.0], [-5.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
def test_the_table_shows_six_digits_of_the_largest_and_fits_80_columns(result, values):
    from rich.console import Console

    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(table(dataclasses.replace(result, eigenvalues=torch.tensor(values, dtype=torch.float64))))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    shown = [float(line.split()[1]) for line in lines if line.split()[:1] and line.split()[0] in "123"]
    assert shown == pytest.approx(values, rel=1e-5)


def test_an_unchecked_run_is_called_unchecked(result):
    lines = dict(facts(dataclasses.replace(result, settings={"preflight": {"level": "off"}}, verified=False), 1.0))
    assert lines["preflight"] == "off: unchecked"
    assert "estimate" in lines["verification"]


def test_plain_keeps_the_own_types():
    assert plain({"a": [1, 2.5, None, True, "x"]}) == {"a": [1, 2.5, None, True, "x"]}


def test_importing_needs_torch_and_numpy_alone():
    code = (
        "import sys, fastsharp, fastsharp.cli, fastsharp.plots, fastsharp._report, fastsharp.data, fastsharp.models\n"
        "late = {'rich', 'matplotlib', 'safetensors', 'PIL', 'torchvision', 'scipy'} & set(sys.modules)\n"
        "assert not late, late"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
