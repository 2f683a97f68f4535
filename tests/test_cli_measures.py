"""fastsharp measure and compare: the numbers of the Python calls, files where they are asked for, and no result lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastsharp
from fastsharp import cli
from fastsharp.api.measure import PARTS
from fastsharp.errors import Interrupted
from fastsharp.models import mlp
from tests.test_cli import folder as folder

QUICK = ("--samples", "40", "-k", "1", "--steps", "10", "--directions", "6", "--grid", "3")


def run(*extra: str, command: str = "measure", net: str = "nets_of_mine:net", weights: tuple[str, ...] = ("net.safetensors",)) -> int:
    given = [part for name in weights for part in ("--weights", name)]
    return cli.main([command, net, *given, "--data", "synthetic", *extra])


def the_same_in_python(**options: Any) -> fastsharp.Report:
    from fastsharp import data
    from fastsharp.models import load_weights

    model = mlp((784, 4, 10)).eval()
    load_weights(model, "net.safetensors")
    loader = data.loader(data.load("synthetic", samples=40, seed=3), batch_size=500)
    return fastsharp.measure(model, loader, torch.nn.functional.cross_entropy, seed=3, **options)


def test_page_record_and_figures_hold_the_numbers_of_python(folder, capsys):
    argv = (
        "--seed",
        "3",
        "--report",
        "new/out.html",
        "--json",
        "out.json",
        "--plots",
        "plots",
        "--parts",
        "function",
        "--parts",
        "trajectory",
    )
    assert run(*QUICK, *argv) == cli.OK
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "written" in printed and "products" in printed
    page = (folder / "new" / "out.html").read_text()
    assert page.startswith("<!doctype html>") and "data:image/png" in page
    assert {p.name for p in (folder / "plots").iterdir()} == {"eigenvalues.png", "density.png"}
    json.loads((folder / "out.json").read_text(), parse_constant=lambda token: pytest.fail(token))
    report = fastsharp.load("out.json")
    same = the_same_in_python(k=1, steps=10, parts=["function", "trajectory"])
    assert isinstance(report, fastsharp.Report) and set(report.measures) == set(same.measures)
    assert all(report[name].value == same[name].value for name in same.measures)
    assert all(f"{same[name].value:.4g}" in printed for name in same.measures)


def test_options_reach_the_call(folder, monkeypatch):
    seen: dict[str, Any] = {}

    def measure(model: Any, loader: Any, loss_fn: Any, **options: Any) -> Any:
        seen.update(options, loss=loss_fn, target=loader[0][1])
        raise Interrupted("measure: interrupted", None)

    monkeypatch.setattr(fastsharp, "measure", measure)
    assert run(*QUICK, "--rho", "0.1", "--rtol", "0.2", "--params", "1.*", "--loss", "mse", "--backend", "autograd") == cli.CTRL_C
    assert seen["rho"] == 0.1 and seen["rtol"] == 0.2 and seen["params"] == ["1.*"] and seen["backend"] == "autograd"
    assert (seen["k"], seen["steps"], seen["directions"], seen["grid"]) == (1, 10, 6, 3) and "parts" not in seen
    assert seen["loss"] is torch.nn.functional.mse_loss and seen["target"].shape[1:] == (10,)


def test_the_parts_on_offer_are_those_of_the_library():
    from fastsharp.cli.parser import PARTS as offered

    assert offered == PARTS


def test_ctrl_c_writes_and_prints_what_there_is(folder, capsys, monkeypatch):
    partial = the_same_in_python(k=1, steps=10, parts="trajectory")

    def interrupted(*args: Any, **options: Any) -> Any:
        raise Interrupted("measure: interrupted in the part 'function'", partial)

    monkeypatch.setattr(fastsharp, "measure", interrupted)
    assert run(*QUICK, "--report", "out.html", "--json", "out.json") == cli.CTRL_C
    captured = capsys.readouterr()
    assert "lambda_max" in captured.out and "interrupted in the part 'function'" in captured.err
    assert (folder / "out.html").exists() and fastsharp.load("out.json").measures.keys() == partial.measures.keys()


def test_a_missed_tolerance_is_exit_code_3_and_the_page_is_written(folder, capsys):
    assert (
        run("--samples", "40", "-k", "1", "--steps", "5", "--rtol", "1e-7", "--parts", "curvature", "--report", "out.html")
        == cli.NOT_CONVERGED
    )
    captured = capsys.readouterr()
    assert "did not reach the tolerance; raise --steps or --rtol" in captured.err and (folder / "out.html").exists()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--json", "out.pkl"), "--json out.pkl: the suffix"),
        (("--report", "."), "--report . is a folder"),
        (("--plots", "net.safetensors"), "--plots net.safetensors is a file"),
        (("--rho", "-1"), "rho=-1.0"),
        (("--grid", "1"), "grid=1"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(folder, capsys, monkeypatch, extra, said):
    monkeypatch.setattr(fastsharp.Hessian, "__init__", lambda *a, **k: pytest.fail("the work has begun"))
    assert run(*QUICK, *extra) == cli.FAILED
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_compare_holds_the_numbers_of_python(folder, capsys):
    from fastsharp import data
    from fastsharp.models import load_weights

    torch.manual_seed(1)
    save_file(mlp((784, 4, 10)).state_dict(), "after.safetensors")
    weights = ("net.safetensors", "after.safetensors")
    quick = ("--samples", "40", "--points", "7", "-k", "2", "--steps", "10", "--seed", "3")
    assert run(*quick, "--json", "c.json", "--plots", "figs", command="compare", weights=weights) == cli.OK
    printed = capsys.readouterr().out
    assert "comparison.png" in printed and (folder / "figs" / "comparison.png").stat().st_size > 0
    found = fastsharp.load("c.json")
    assert isinstance(found, fastsharp.Comparison)
    models = [mlp((784, 4, 10)).eval() for _ in weights]
    for model, path in zip(models, weights, strict=True):
        load_weights(model, path)
    loader = data.loader(data.load("synthetic", samples=40, seed=3), batch_size=500)
    exact = fastsharp.compare(*models, loader, torch.nn.functional.cross_entropy, points=7, k=2, steps=10, seed=3)
    assert found.overlap == exact.overlap and torch.equal(found.losses, exact.losses) and len(found.t) == 7


@pytest.mark.parametrize("weights", [("net.safetensors",), ("net.safetensors",) * 3])
def test_compare_takes_two(folder, capsys, weights):
    assert run(command="compare", weights=weights) == cli.FAILED
    assert f"{len(weights)} x --weights, expected two" in capsys.readouterr().err
