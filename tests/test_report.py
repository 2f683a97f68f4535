"""What the command line shows of a result fits a terminal and says what was not checked."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import fastsharp
from fastsharp._report import facts, table


@pytest.fixture
def result():
    return fastsharp.lanczos(torch.diag(torch.linspace(-3.0, 5.0, 80, dtype=torch.float64)), k=3)


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


def test_importing_needs_torch_and_numpy_alone():
    code = (
        "import sys, fastsharp, fastsharp.cli, fastsharp.plots, fastsharp._report, fastsharp.data, fastsharp.models\n"
        "late = {'rich', 'matplotlib', 'safetensors', 'PIL', 'torchvision', 'scipy'} & set(sys.modules)\n"
        "assert not late, late"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
