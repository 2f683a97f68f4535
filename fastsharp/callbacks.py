"""Callbacks that call a Tracker every so many steps: a plain loop, Lightning, the Hugging Face Trainer; both frameworks on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsharp.errors import InputError

if TYPE_CHECKING:
    from fastsharp.training import Tracker


class PlainCallback:
    """Call it once after every optimiser step: every `tracker.every`-th call, from the first on, updates the tracker.

    Returns the Eigenpairs of an update, None otherwise.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.steps = 0

    def __call__(self, lr: float | None = None) -> Any:
        step, self.steps = self.steps, self.steps + 1
        return self.tracker.update(lr, step=step) if step % self.tracker.every == 0 else None


def LightningCallback(tracker: Tracker) -> Any:
    """A lightning.Callback: updates after the optimiser steps that `tracker.every` divides; logs lambda_max and lambda_max lr / 2.

    The learning rate is that of the first optimiser unless the tracker has one. Raises InputError where lightning is missing.
    """
    base = _framework("lightning.pytorch", "lightning").Callback

    class Callback(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self._last = -1

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            step = trainer.global_step
            if step == self._last or step % tracker.every:
                return  # with accumulated gradients several batches end at one step
            self._last = step
            lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
            tracker.update(None if tracker.lr is not None else lr, step=step)
            pl_module.log_dict(tracker.history[-1].metrics())

    return Callback()


def TrainerCallback(tracker: Tracker) -> Any:
    """A transformers.TrainerCallback: updates after the optimiser steps that `tracker.every` divides; the figures go into the state's log.

    Raises InputError where transformers is missing.
    """
    base = _framework("transformers", "transformers").TrainerCallback

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % tracker.every:
                return
            optimizer = kwargs.get("optimizer")
            lr = optimizer.param_groups[0]["lr"] if optimizer is not None and tracker.lr is None else None
            tracker.update(lr, step=state.global_step)
            state.log_history.append({"step": state.global_step, **tracker.history[-1].metrics()})

    return Callback()


def _framework(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"this callback needs {package}, which does not import ({e}).\nInstall it: pip install {package}") from e
