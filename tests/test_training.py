"""Tracker and its callbacks: values against dense Hessians through training, no trace in the user's model, history that survives errors."""

from __future__ import annotations

import gc
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp import data
from fastsharp.errors import ArgumentTypeError, FastsharpError, InputError, Interrupted, NonFiniteError
from fastsharp.training import LightningCallback, PlainCallback, Tracker, TrainerCallback
from tests.oracles.dense import dense_hessian, eigenvalues
from tests.unchanged import unchanged


@pytest.fixture
def task(one_thread: None) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)), torch.randn(96, 8), torch.arange(96) % 3


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, after: Any, lr: float = 0.2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("k", [1, 3])
def test_values_through_training_against_the_dense_hessian(task: Any, k: int) -> None:
    model, x, y = task
    tracker = Tracker(model, [(x, y)], k=k, every=10, lr=0.2)
    callback = PlainCallback(tracker)

    def after() -> None:
        if callback() is not None:
            exact = eigenvalues(dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), (x, y)))[:k]
            record = tracker.history[-1]
            for value, bound, true in zip(record.eigenvalues, record.error_bounds, exact.tolist(), strict=True):
                assert abs(value - true) <= bound
            assert record.sharpness_lr == record.eigenvalues[0] * 0.2 / 2

    train(model, x, y, 80, after)
    assert [r.step for r in tracker.history] == list(range(0, 80, 10))
    assert tracker.history[0].start == "cold" and any(r.start == "warm" for r in tracker.history)


def test_a_third_of_the_cold_products_on_a_small_cnn(one_thread: None) -> None:
    """Adam 3e-4 with batches of 64 on the embedded images, from step 200 on, every 20 steps. Cold: lanczos to the same tol, verified."""
    x, y = (torch.cat(parts) for parts in zip(*data.loader(data.load("fashion_mnist_mini"), batch_size=256), strict=True))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 6, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    measured = [(x[:500], y[:500])]
    tracker = Tracker(model, measured, memory="1GiB")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    g, step, cold = torch.Generator().manual_seed(0), 0, 0
    while step <= 600:
        for chosen in torch.randperm(len(y), generator=g).split(64):
            if step >= 200 and step % 20 == 0 and step <= 600:
                tracker.update(step=step)
                plain = fastsharp.lanczos(model, measured, k=1, tol=1e-2, criterion="value", memory="1GiB", preflight="off")
                cold += plain.n_matvec + plain.n_verify
                record = tracker.history[-1]
                assert abs(record.eigenvalues[0] - float(plain.eigenvalues[0])) <= record.error_bounds[0] + float(plain.error_bounds[0])
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            step += 1
    assert len(tracker.history) == 21
    assert 3 * sum(r.n_matvec for r in tracker.history) <= cold


def test_nothing_of_the_users_changes(task: Any) -> None:
    model, x, y = task
    F.cross_entropy(model(x), y).backward()
    tracker = Tracker(model, [(x, y)])
    for _ in range(2):
        with unchanged(model, x, y):
            tracker.update()


def test_no_leak_over_fifty_updates(task: Any) -> None:
    model, x, y = task
    tracker, counts = Tracker(model, [(x, y)], preflight="off"), []

    def after() -> None:
        tracker.update()
        if len(tracker.history) in (6, 50):
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))

    train(model, x, y, 50, after)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"k": 0}, InputError, "k is 0"),
        ({"k": 10_000}, InputError, "k = 10000"),
        ({"every": 0}, InputError, "every is 0"),
        ({"every": 2.0}, ArgumentTypeError, "every is 2.0"),
        ({"newcomers_every": 0}, InputError, "newcomers_every is 0"),
        ({"tol": 0.0}, InputError, "tol is 0"),
        ({"lr": "fast"}, ArgumentTypeError, "lr is 'fast'"),
        ({"lr": float("nan")}, InputError, "lr is nan"),
        ({"preflight": "slow"}, InputError, "preflight='slow'"),
    ],
)
def test_bad_arguments(task: Any, arguments: Any, error: type[Exception], match: str) -> None:
    model, x, y = task
    with pytest.raises(error, match=match):
        Tracker(model, [(x, y)], **arguments)


def test_not_a_model(task: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="model is a int"):
        Tracker(3, [])  # type: ignore[arg-type]


def test_the_learning_rate_may_be_a_number_a_function_or_an_optimizer(task: Any) -> None:
    model, x, y = task
    for lr in (0.1, lambda: 0.1, torch.optim.SGD(model.parameters(), lr=0.1)):
        tracker = Tracker(model, [(x, y)], lr=lr, preflight="off")
        value = float(tracker.update().eigenvalues[0])
        tracker.update(0.3)
        assert tracker.history[0].sharpness_lr == value * 0.1 / 2 and tracker.history[1].lr == 0.3
    tracker = Tracker(model, [(x, y)], preflight="off")
    tracker.update()
    assert tracker.history[0].sharpness_lr is None and "lambda_max_lr_over_2" not in tracker.history[0].metrics()


def test_errors_keep_the_history(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN weights, an interrupt, and a parameter of another shape; after the first two the tracker goes on."""
    model, x, y = task
    tracker = Tracker(model, [(x, y)])
    tracker.update()
    kept, good = tracker.history, model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        tracker.update()
    assert tracker.history == kept
    with torch.no_grad():
        model[0].weight.copy_(good)
    with monkeypatch.context() as m:
        m.setattr(fastsharp.Hessian, "_apply", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(Interrupted):
            tracker.update()
    assert tracker.history == kept
    tracker.update()
    assert len(tracker.history) == 2
    model[2] = nn.Linear(12, 4)
    with pytest.raises(FastsharpError):
        tracker.update()
    assert len(tracker.history) == 2


def test_a_generator_is_read_once_and_frozen(task: Any) -> None:
    model, x, y = task
    tracker = Tracker(model, ((a, b) for a, b in zip(x.split(32), y.split(32), strict=True)))
    first = tracker.update()
    assert float(tracker.update().eigenvalues[0]) == pytest.approx(float(first.eigenvalues[0]), rel=1e-2)


def test_plot(task: Any, tmp_path: Any) -> None:
    model, x, y = task
    tracker = Tracker(model, [(x, y)], lr=0.1)
    with pytest.raises(InputError, match="no record"):
        tracker.plot()
    tracker.update()
    tracker.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# --- callbacks: their logic through stand-ins, then the frameworks themselves ----------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, cls: str) -> None:
    monkeypatch.setattr("fastsharp.callbacks.importlib.import_module", lambda module: types.SimpleNamespace(**{cls: object}))


def test_lightning_callback_logic(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update per step that `every` divides, once though several batches end there, with the optimiser's rate."""
    model, x, y = task
    stand_in(monkeypatch, "lightning.pytorch", "Callback")
    tracker = Tracker(model, [(x, y)], every=2, preflight="off")
    callback, logged = LightningCallback(tracker), []
    module = types.SimpleNamespace(log_dict=logged.append)
    trainer = types.SimpleNamespace(global_step=0, optimizers=[torch.optim.SGD(model.parameters(), lr=0.5)])
    for trainer.global_step in (1, 2, 2, 3, 4):
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert [r.step for r in tracker.history] == [2, 4]
    assert logged[0] == {"lambda_max": tracker.history[0].eigenvalues[0], "lambda_max_lr_over_2": tracker.history[0].eigenvalues[0] / 4}


def test_trainer_callback_logic(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = task
    stand_in(monkeypatch, "transformers", "TrainerCallback")
    tracker = Tracker(model, [(x, y)], every=2, preflight="off")
    callback, state = TrainerCallback(tracker), types.SimpleNamespace(global_step=0, log_history=[])
    for state.global_step in range(1, 5):
        callback.on_step_end(None, state, None, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    assert [r.step for r in tracker.history] == [entry["step"] for entry in state.log_history] == [2, 4]
    assert tracker.history[0].lr == 0.5


@pytest.mark.parametrize(("make", "package"), [(LightningCallback, "lightning"), (TrainerCallback, "transformers")])
def test_a_missing_framework_is_named(task: Any, monkeypatch: pytest.MonkeyPatch, make: Any, package: str) -> None:
    model, x, y = task

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("fastsharp.callbacks.importlib.import_module", missing)
    with pytest.raises(InputError, match=f"pip install {package}"):
        make(Tracker(model, [(x, y)]))


@pytest.mark.filterwarnings("ignore")
def test_lightning_itself(task: Any, tmp_path: Any) -> None:
    L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed", exc_type=ImportError)
    model, x, y = task

    class Module(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tracker = Tracker(model, [(x, y)], every=5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    L.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[LightningCallback(tracker)],
    ).fit(Module(), loader)
    assert [r.step for r in tracker.history] == [5, 10] and tracker.history[0].lr == 0.1


@pytest.mark.filterwarnings("ignore")
def test_trainer_itself(task: Any, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate", exc_type=ImportError)
    inner, x, y = task

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": F.cross_entropy(self.inner(x), labels)}

    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    tracker = Tracker(inner, [(x, y)], every=5)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=12, use_cpu=True, report_to=[], disable_tqdm=True)
    transformers.Trainer(model=Model(), args=arguments, train_dataset=rows, callbacks=[TrainerCallback(tracker)]).train()
    assert [r.step for r in tracker.history] == [5, 10] and tracker.history[0].lr is not None


def test_operator_and_backend_are_those_of_lanczos(task: Any) -> None:
    model, x, y = task
    tracker = Tracker(model, [(x, y)], operator="ggn", backend="autograd", tol=1e-4)
    with unchanged(model, x, y):
        pairs = tracker.update()
    G = fastsharp.GGN(model, [(x, y)])
    top = float(torch.linalg.eigvalsh(G.apply(torch.eye(G.n)))[-1])
    assert tracker.history[0].eigenvalues[0] == pytest.approx(top, rel=1e-3)
    assert (pairs.settings["operator"], pairs.settings["backend"]) == ("ggn", "autograd")
    assert top != pytest.approx(float(fastsharp.lanczos(model, [(x, y)], k=1, tol=1e-4, progress=False).eigenvalues[0]), rel=1e-3)
    with pytest.raises(InputError, match="operator='fischer' is none of"):
        Tracker(model, [(x, y)], operator="fischer")
    with pytest.raises(InputError, match="backend='jax' is none of"):
        Tracker(model, [(x, y)], backend="jax")
