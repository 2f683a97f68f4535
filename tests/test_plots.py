"""Figures show what the result holds, mark what did not converge, and leave matplotlib's global state alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import fastsharp
from fastsharp.plots import conditions, plot_eigenpairs


@pytest.fixture
def result():
    return fastsharp.lanczos(torch.diag(torch.linspace(-3.0, 5.0, 80, dtype=torch.float64)), k=4, which="BE")


def points(ax, label):
    return [line.get_xydata().tolist() for line in ax.lines if line.get_label() == label]


def test_points_are_the_eigenvalues_and_their_relative_residuals(result, tmp_path):
    fig = plot_eigenpairs(result, tmp_path / "figure.png")
    top, bottom = fig.axes
    assert points(top, "converged") == [[[i + 1.0, v] for i, v in enumerate(result.eigenvalues.tolist())]]
    drawn = [y for _, y in points(bottom, "converged")[0]]
    expected = (result.residuals / result.eigenvalues.abs()).clamp(min=1e-16).tolist()
    assert drawn == pytest.approx(expected)
    assert bottom.get_yscale() == "log"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_that_missed_the_tolerance_look_different(result):
    flags = torch.tensor([True, False, True, True])
    top, _ = plot_eigenpairs(dataclasses.replace(result, converged=flags)).axes
    assert [x for x, _ in points(top, "not converged")[0]] == [2.0]
    assert top.get_legend() is not None


def test_the_conditions_state_n_products_and_tolerance(result):
    line = conditions(dataclasses.replace(result, verified=False))
    assert "n = 80" in line and f"{result.n_matvec} products" in line and "tol 0.001" in line and "residuals estimated" in line


def test_zero_eigenvalues_can_be_drawn(tmp_path):
    fastsharp.lanczos(torch.zeros(70, 70), k=3).plot(tmp_path / "zero.png")
    assert (tmp_path / "zero.png").stat().st_size > 0


def test_plotting_imports_no_pyplot():
    code = "import sys, torch, fastsharp\nfastsharp.lanczos(torch.eye(70), k=2).plot()\nassert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
