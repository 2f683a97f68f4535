"""The command line: exit codes, messages without tracebacks, strict JSON, and weights that must fit exactly."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastsharp
from fastsharp import cli
from fastsharp.errors import Interrupted
from fastsharp.models import mlp

NET = """
from torch import nn
from fastsharp.models import mlp

def net():
    return mlp((784, 4, 10))

def with_modes():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 10))

def needs_argument(width):
    return mlp((784, width, 10))

def not_a_module():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a module of the user's, `nets_of_mine`, and weights for its `net`."""
    (tmp_path / "nets_of_mine.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets_of_mine", None)
    torch.manual_seed(0)
    save_file(mlp((784, 4, 10)).state_dict(), tmp_path / "net.safetensors")
    return tmp_path


def run(*extra: str, net: str = "nets_of_mine:net", weights: str = "net.safetensors", data: str = "synthetic") -> int:
    return cli.main(["lanczos", net, "--weights", weights, "--data", data, "--samples", "40", "-k", "2", *extra])


def strict(path: Path) -> dict:
    def refuse(token: str) -> None:
        raise AssertionError(f"{path.name} holds {token}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_demo_prints_a_table_and_writes_picture_and_record(folder, capsys):
    assert cli.main(["demo", "-k", "2", "--samples", "50"]) == cli.OK
    text = capsys.readouterr().out
    assert "converged" in text and "passed (fast)" in text and "true residuals" in text
    assert max(map(len, text.splitlines())) <= 80
    record = strict(folder / "fastsharp-demo" / "result.json")
    assert record["converged"] == [True, True] and record["schema_version"] == 2
    assert record["n_parameters"] == 29738 and record["settings"]["preflight"]["level"] == "fast"
    assert record["data"]["name"] and record["model"]["weights_sha256"]
    assert (folder / "fastsharp-demo" / "eigenvalues.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_holds_the_eigenvalues_of_the_same_call_in_python(folder):
    assert run("--out", "out", "--vectors", "--seed", "3") == cli.OK
    from safetensors.torch import load_file

    from fastsharp import data
    from fastsharp.models import load_weights

    model = mlp((784, 4, 10)).eval()
    load_weights(model, "net.safetensors")
    images = data.load("synthetic", samples=40, seed=3)
    result = fastsharp.lanczos(model, data.loader(images, batch_size=500), torch.nn.functional.cross_entropy, k=2, seed=3)
    record = strict(folder / "out" / "result.json")
    assert record["eigenvalues"] == result.eigenvalues.tolist()
    assert torch.equal(load_file(folder / "out" / "eigenvectors.safetensors")["eigenvectors"], result.eigenvectors)
    for file in ("result.json", "eigenvectors.safetensors"):
        assert torch.equal(fastsharp.load(folder / "out" / file).eigenvalues, result.eigenvalues)


def test_options_reach_the_solver(folder, capsys):
    assert run("--params", "1.*", "--which", "SA", "--loss", "mse", "--criterion", "value", "--out", "out") == cli.OK
    record = strict(folder / "out" / "result.json")
    assert record["n_parameters"] == 784 * 4 + 4
    assert record["settings"]["which"] == "SA" and record["settings"]["criterion"] == "value"


def test_matrix_and_backend_reach_the_solver(folder):
    assert run("--out", "hessian") == cli.OK
    assert run("--operator", "ggn", "--backend", "autograd", "--out", "ggn") == cli.OK
    hessian, ggn = (strict(folder / name / "result.json") for name in ("hessian", "ggn"))
    assert hessian["settings"]["operator"] == "hessian"
    assert ggn["settings"]["operator"] == "ggn" and ggn["settings"]["backend"] == "autograd"
    assert abs(hessian["eigenvalues"][0] - ggn["eigenvalues"][0]) > 1e-3 * ggn["eigenvalues"][0]  # a random net: two matrices


def test_matrices_and_backends_on_offer_are_those_of_the_library():
    from fastsharp.api.subject import OPERATORS
    from fastsharp.curvature.backends import BACKENDS

    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    offered = {a.dest: a.choices for a in commands.choices["lanczos"]._actions}
    assert set(offered["operator"]) == set(OPERATORS) and set(offered["backend"]) == set(BACKENDS)


@pytest.mark.parametrize(("bn", "dropout"), [("frozen-batch-stats", "fixed-masks"), ("eval", "eval")])
def test_modes_mean_what_they_say(folder, capsys, bn, dropout):
    import nets_of_mine

    save_file(nets_of_mine.with_modes().state_dict(), "modes.safetensors")
    assert run("--bn", bn, "--dropout", dropout, net="nets_of_mine:with_modes", weights="modes.safetensors") == cli.OK
    assert ("BatchNorm and Dropout to train()" in capsys.readouterr().out.replace("\n              ", " ")) == (bn != "eval")


def test_not_converged_is_exit_code_3_with_the_table_printed(folder, capsys):
    assert run("--max-iter", "2") == cli.NOT_CONVERGED
    captured = capsys.readouterr()
    assert "NO" in captured.out and "raise --max-iter or --tol" in captured.err


def test_ctrl_c_is_exit_code_130_with_the_pairs_so_far(folder, capsys, monkeypatch):
    partial = fastsharp.lanczos(torch.diag(torch.arange(1.0, 9.0)), k=2)

    def interrupted(*args, **options):
        raise Interrupted("lanczos: interrupted after 3 products", partial)

    monkeypatch.setattr(fastsharp, "lanczos", interrupted)
    assert run() == cli.CTRL_C
    captured = capsys.readouterr()
    assert "8.0" in captured.out and "interrupted after 3 products" in captured.err


@pytest.mark.parametrize("argv", [[], ["lanczos"], ["demo", "-k", "many"], ["no-such-command"]])
def test_usage_errors_are_exit_code_2(argv, capsys):
    assert cli.main(argv) == cli.USAGE
    assert "usage:" in capsys.readouterr().err


def spoiled(tmp: Path, change) -> str:
    state = mlp((784, 4, 10)).state_dict()
    change(state)
    save_file(state, tmp / "spoiled.safetensors")
    return "spoiled.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("1.bias"), "missing: 1.bias"),
        (lambda s: s.update(more=torch.zeros(2)), "unexpected: more"),
        (lambda s: s.update({"1.bias": torch.zeros(5)}), "1.bias (5,) for (4,)"),
        (lambda s: s.update({"1.bias": torch.zeros(4, dtype=torch.float64)}), "would lose precision: 1.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(folder, capsys, change, said):
    assert run(weights=spoiled(folder, change)) == cli.FAILED
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pickles_are_refused_with_a_safe_conversion(folder, capsys, suffix):
    torch.save(mlp((784, 4, 10)).state_dict(), "net" + suffix)
    assert run(weights="net" + suffix) == cli.FAILED
    error = capsys.readouterr().err
    command = next(line for line in error.splitlines() if "python -c" in line).strip()
    assert "weights_only=True" in command
    Path("net.safetensors").unlink()
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, timeout=120)
    assert run() == cli.OK


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"net": "nets_of_mine"}, "is not MODULE:FACTORY"),
        ({"net": "no_such_module:net"}, "cannot import no_such_module"),
        ({"net": "nets_of_mine:absent"}, "has no absent"),
        ({"net": "nets_of_mine:needs_argument"}, "without arguments"),
        ({"net": "nets_of_mine:not_a_module"}, "returned a int"),
        ({"weights": "absent.safetensors"}, "there is no file absent.safetensors"),
        ({"data": "imagenet"}, "there is no data set 'imagenet'"),
    ],
)
def test_errors_are_exit_code_1_with_one_message(folder, capsys, options, said):
    assert run(**options) == cli.FAILED
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.startswith("fastsharp: ")


def test_a_device_that_is_not_there_says_what_is(folder, capsys):
    assert run("--device", "cuda:97") == cli.FAILED
    assert "not usable here; found cpu" in capsys.readouterr().err


def test_a_damaged_weights_file_is_named(folder, capsys):
    Path("net.safetensors").write_bytes(Path("net.safetensors").read_bytes()[:100])
    assert run() == cli.FAILED
    assert "net.safetensors: not a readable safetensors file" in capsys.readouterr().err


def test_info_says_which_backend_is_live(capsys):
    assert cli.main(["info"]) == cli.OK
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert any(line.split()[:2] in (["backend_cpu", "cpu"], ["backend_cpu", "reference"]) for line in text.splitlines())


def test_the_module_runs_as_a_program(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(fastsharp.__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "fastsharp.cli", "lanczos", "nets_of_mine:net", "--weights", "net.safetensors", "--data", "nothing"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == cli.FAILED and "InputError" in done.stderr and "Traceback" not in done.stderr
