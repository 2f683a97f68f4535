"""`resume=` of the one-line calls: networks, what makes it another run, the command line, and 100 kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp import cli
from fastsharp.api.resume import recorded
from fastsharp.errors import ArgumentTypeError, LogStoppedWarning, ResumeMismatchError
from fastsharp.operator import CallableOperator, CountingOperator
from fastsharp.store import Log
from tests.unchanged import check_message, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


def problem(scale: float = 1.0, shift: float = 0.0, width: int = 6) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A small network and three uneven batches; weights times `scale`, data plus `shift`."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    x, y = torch.randn(40, 8, generator=g) + shift, torch.arange(40) % 3
    return model, list(zip(x.split(16), y.split(16), strict=True))


def same(a: fastsharp.Eigenpairs, b: fastsharp.Eigenpairs) -> bool:
    """Bit for bit."""
    names = ("eigenvalues", "eigenvectors", "residuals", "error_bounds", "converged")
    return all(getattr(a, name).numpy().tobytes() == getattr(b, name).numpy().tobytes() for name in names)


def test_a_network_from_a_log_cut_anywhere(path: Path) -> None:
    model, batches = problem()
    want = fastsharp.lanczos(model, batches, k=2)
    with unchanged(model, *batches[0]):
        logged = fastsharp.lanczos(model, batches, k=2, resume=path)
    assert same(logged, want) and (logged.notes, logged.settings) == (want.notes, want.settings)
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 12):
        path.write_bytes(whole[:cut])
        result = fastsharp.lanczos(model, batches, k=2, resume=str(path))
        assert same(result, want) and path.read_bytes() == whole
        assert result.provenance == want.provenance and result.layout is not None
    again = fastsharp.lanczos(model, batches, k=2, resume=path)
    total = want.n_matvec + want.n_verify
    assert any(f"{total} of {total} products came from the log {path}" in note for note in again.notes)


def test_a_matrix_with_a_log_is_probed_as_without(path: Path) -> None:
    A = torch.diag(torch.arange(1.0, 81.0))
    for source in (A, (lambda v: A @ v, 80)):
        want, got = (fastsharp.lanczos(source, k=2, resume=p) for p in (None, path))
        assert same(got, want) and got.settings["probe_products"] == want.settings["probe_products"]
        path.unlink()


def _custom(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, label_smoothing=0.1)


run = partial(fastsharp.lanczos, backend="rop")  # "auto" would take another backend for another loss


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: run(*problem(scale=1.001), k=2, resume=p), ("weights_hash",)),
        (lambda p: run(*problem(shift=1e-6), k=2, resume=p), ("data_hash",)),
        (lambda p: run(*problem(width=7), k=2, resume=p), ("n was 75, is 87",)),
        (lambda p: run(problem()[0].double(), [(x.double(), y) for x, y in problem()[1]], k=2, resume=p), ("dtype",)),
        (lambda p: run(*problem(), params="0.*", k=2, resume=p), ("n was 75, is 54", "params")),
        (lambda p: run(*problem(), reduction="sum", k=2, resume=p), ("reduction was mean, is sum",)),
        (lambda p: run(*problem(), k=3, resume=p), ("k was 2, is 3",)),
        (lambda p: run(*problem(), k=2, which="SA", resume=p), ("which was LA, is SA",)),
        (lambda p: run(*problem(), k=2, seed=5, resume=p), ("seed was 0, is 5",)),
        (lambda p: run(*problem(), k=2, v0=torch.ones(75), resume=p), ("v0 was None, is tensor (75,)",)),
        (lambda p: fastsharp.lanczos(torch.eye(75), k=2, resume=p), ("operator was hessian, is DenseOperator",)),
        (lambda p: run(*problem(), _custom, k=2, resume=p), ("computed again", "the loss")),
    ],
    ids=["weights", "data", "size", "dtype", "params", "reduction", "k", "which", "seed", "v0", "matrix", "loss"],
)
def test_another_run_is_refused_by_name_and_leaves_the_log(path: Path, change: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    run(*problem(), k=2, resume=path)
    whole = path.read_bytes()
    with pytest.raises(ResumeMismatchError) as caught:
        change(path)
    check_message(caught.value, str(path), *words)
    assert path.read_bytes() == whole


def test_what_changes_no_product_may_change(path: Path) -> None:
    want = fastsharp.lanczos(*problem(), k=2, resume=path)
    got = fastsharp.lanczos(*problem(), k=2, resume=path, strict=True, preflight="off", memory="1GiB", progress=False)
    assert same(got, want)


def test_a_run_that_did_not_converge_goes_on_with_a_larger_max_iter(path: Path) -> None:
    with pytest.warns(fastsharp.errors.NotConvergedWarning):
        short = fastsharp.lanczos(*problem(), k=2, max_iter=5, resume=path)
    want = fastsharp.lanczos(*problem(), k=2, max_iter=60)
    got = fastsharp.lanczos(*problem(), k=2, max_iter=60, resume=path)
    assert same(got, want) and bool(got.converged.all()) and not bool(short.converged.all())
    assert any("max_iter was 5, is 60" in note for note in got.notes)


def test_the_log_names_the_backend_that_auto_takes_with_and_without_a_preflight(path: Path) -> None:
    model, batches = problem()
    unrecordable = torch.jit.trace(model, batches[0][0])
    want = fastsharp.lanczos(unrecordable, batches, k=1, resume=path, preflight="off")
    assert want.settings["backend"] == "autograd"
    assert same(fastsharp.lanczos(unrecordable, batches, k=1, resume=path), want)


def test_long_values_and_functions_have_stable_names(path: Path) -> None:
    """In the log: nothing longer than a line, nothing that differs between two processes."""
    operator = CallableOperator(lambda v: v, 3)
    arguments = {"names": [f"layer.{i}.weight" for i in range(1000)], "f": _custom, "object": object(), "v0": torch.ones(3)}
    with recorded(operator, path, "call", arguments):
        pass
    with Log(path) as log:
        found = log.read()
    assert found is not None
    run = found[0]["run"]
    assert run["f"] == "_custom" and run["object"] == "object" and len(run["names"]) < 100 and run["v0"].startswith("tensor (3,) ")
    with recorded(operator, path, "call", arguments):
        pass
    arguments["names"] = [*arguments["names"][:-1], "another"]
    with pytest.raises(ResumeMismatchError, match="names was"), recorded(operator, path, "call", arguments):
        pass


def test_other_room_for_the_basis_is_named_where_it_changed_the_vectors(path: Path) -> None:
    """Less free memory may mean restarts, and so other vectors; the same vectors go on, with a note."""
    operator = CallableOperator(lambda v: 2 * v, 3)
    with recorded(operator, path, "call", {}, basis_bytes=1000) as logged:
        logged @ torch.ones(3)
    with recorded(operator, path, "call", {}, basis_bytes=500) as logged:
        logged @ torch.ones(3)
        assert "since the log was begun: basis_bytes was 1000, is 500" in logged.notes
    with pytest.raises(ResumeMismatchError) as caught, recorded(operator, path, "call", {}, basis_bytes=500) as logged:
        logged @ torch.zeros(3)
    check_message(caught.value, "product 1", "basis_bytes was 1000, is 500")


def test_the_file_is_released_whatever_ends_the_block(path: Path) -> None:
    operator = CountingOperator(CallableOperator(lambda v: v, 3))
    with pytest.raises(ZeroDivisionError), recorded(operator, path, "call", {}) as logged:
        logged @ torch.ones(3)
        raise ZeroDivisionError
    with pytest.raises(ResumeMismatchError), recorded(operator, path, "another call", {}):
        pass
    with recorded(operator, None, "call", {}) as itself:
        assert itself is operator
    with Log(path) as log:
        assert [head["kind"] for head, _ in iter(log.read, None)] == ["run", "product"], "not marked as finished"


def test_what_is_no_path_is_refused() -> None:
    for wrong in (True, 3, b"run.log"):
        with pytest.raises(ArgumentTypeError) as caught:
            fastsharp.lanczos(torch.eye(80), resume=wrong)  # type: ignore[arg-type]
        check_message(caught.value, type(wrong).__name__)


def test_the_warning_of_a_full_disk_points_at_the_caller(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def full(fd: int, parts: Any, offset: int) -> int:
        if offset > 3000:
            raise OSError(28, "No space left on device")
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.warns(LogStoppedWarning) as seen:
        fastsharp.lanczos(torch.diag(torch.arange(1.0, 81.0)), k=2, resume=path)
    assert [w.filename for w in seen] == [__file__]


def test_the_command_line_continues_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    from fastsharp.models import demo_cnn

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_file(demo_cnn().state_dict(), "net.safetensors")
    command = ["lanczos", "fastsharp.models:demo_cnn", "--weights", "net.safetensors", "--data", "fashion_mnist_mini", "--samples", "20"]
    records = []
    for out in ("first", "second"):
        code = cli.main([*command, "-k", "1", "--tol", "0.1", "--out", out, "--resume", "run.log"])
        assert code == cli.OK
        records.append(json.loads((tmp_path / out / "result.json").read_text()))
    assert records[0]["eigenvalues"] == records[1]["eigenvalues"]
    assert "products came from the log run.log" in capsys.readouterr().out
    assert cli.main([*command, "-k", "2", "--resume", "run.log"]) == cli.FAILED
    assert "ResumeMismatchError" in capsys.readouterr().err


def killed(folder: Path, **rounds: int) -> dict[str, Any]:
    """What `tests.kills` found, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    asked = [str(word) for item in rounds.items() for word in item]
    command = [sys.executable, "-m", "tests.kills", str(folder), *asked]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.slow
def test_100_kills_at_random_moments_lose_at_most_one_step(tmp_path: Path) -> None:
    """All hit a running process; the most lost is the step that was being taken; all 50 runs end with the same bits."""
    found = killed(tmp_path, lanczos=50)["lanczos"]
    assert found["kills"] == 100 and found["hit"] >= 90 and found["while_computing"] >= 50, found
    assert found["most_lost"] <= 1 and found["same"] == 50, found


def test_kills_of_estimates_lose_at_most_one_product(tmp_path: Path) -> None:
    """A dozen each; FASTSHARP_KILL_ROUNDS=50 for a hundred."""
    rounds = int(os.environ.get("FASTSHARP_KILL_ROUNDS", "6"))
    for name, found in killed(tmp_path, density=rounds, trace=rounds, spectrum=rounds).items():
        assert found["kills"] == 2 * rounds and found["hit"] >= 1.5 * rounds and found["while_computing"] >= rounds / 2, (name, found)
        assert found["most_lost"] <= 1 and found["same"] == rounds, (name, found)


def test_cheap_and_exact_products_share_a_log_and_are_told_apart(path: Path) -> None:
    """Cut anywhere: the same bits. Every record says of which of the two it is; the precision is part of what makes it this run."""
    g = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(100, 100, generator=g))[0]
    A = (Q * torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.rand(97, generator=g)])) @ Q.T
    A = (A + A.T) / 2

    def run(resume: Path | None, precision: str = "bf16") -> fastsharp.Eigenpairs:
        return fastsharp.lanczos(A, k=2, precision=precision, method="lanczos", resume=resume)

    want = run(None)
    assert same(run(path), want)
    with Log(path) as log:
        heads = [head for head, _ in iter(log.read, None) if head["kind"] == "product"]
    cheap = sum(head["rows"] for head in heads if head.get("precision") == "bf16")
    exact = sum(head["rows"] for head in heads if "precision" not in head)
    assert (cheap, exact) == (want.settings["cheap_products"], want.settings["exact_products"]) and cheap > 0 < exact
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 9):
        path.write_bytes(whole[:cut])
        assert same(run(path), want) and path.read_bytes() == whole
    with pytest.raises(ResumeMismatchError, match="precision was bf16, is not there"):
        run(path, "auto")
    assert path.read_bytes() == whole
