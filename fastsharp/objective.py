"""The finite-sum loss L(theta) over frozen data: weighted exactly, evaluated without a trace, and watched for changes."""

from __future__ import annotations

import hashlib
import platform
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastsharp.batches import Batches, Budget, tensors_of
from fastsharp.errors import (
    ArgumentTypeError,
    DeviceError,
    DisconnectedLossError,
    DtypeError,
    FastsharpError,
    InputError,
    ModelModeError,
    StaleOperatorError,
    listing,
)
from fastsharp.graph_check import examine
from fastsharp.guard import Modes, Watch, marks, same_values, untouched
from fastsharp.locate import non_finite_loss
from fastsharp.losses import Loss, Value
from fastsharp.parallel import refuse_shares, unwrapped
from fastsharp.params import Selection, Selector, again, select
from fastsharp.widening import CastsSeen, Doubling

_CHUNK = 1 << 20  # elements of a checksum taken at once
_SMALL = 1 << 16  # elements below which the checksums of zlib are faster
_ODD = 6_364_136_223_846_793_005  # any odd number with no pattern in its bits
_OF_DEVICE, _OF_DTYPE = re.compile("device|[Mm]eta "), re.compile("dtype|[Ss]calar type|Float|Double|Half")  # torch's words for a misfit
_DATA_SHARE = 2  # frozen data take at most 1/2 of the budget, kept graphs the rest


class Objective:
    """L(theta) = sum_b scale_b loss_b(theta) / sum_b count_b over the batches of one frozen pass.

    model      any nn.Module; it is evaluated as it stands and never changed
    loader     a DataLoader, a Dataset, a list of batches or one batch
    loss_fn    `loss_fn(output, target)`, `batch_loss(fn)`, or None
    params     which parameters theta is: globs, names, a callable, None for all trainable ones
    reduction  "auto", "mean" (the example-weighted mean) or "sum" (the plain sum)
    bn, dropout, memory: see `fastsharp.lanczos`
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        loss_fn: Any = None,
        *,
        params: Selector = None,
        reduction: str = "auto",
        bn: str | None = None,
        dropout: str | None = None,
        memory: str | int = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module.")
        if loader is None:
            raise InputError("a model needs data: pass a DataLoader, a Dataset, a list of batches or one batch.")
        refuse_shares(model)
        model, self._wrappers = unwrapped(model)
        self.model = model
        self.selection: Selection = select(model, params)
        self.modes = Modes(model, bn, dropout)
        budget = Budget.of(memory, self.device).total
        self.batches = Batches(loader, self.device, budget // _DATA_SHARE)
        self._graph_budget = budget - (0 if self.batches.streamed else self.batches.nbytes)
        self._reserved = 0
        self.seed = seed
        self.records = 0  # how often the weights were recorded: operators that share this objective compare it
        self.loss = Loss(model, loss_fn, reduction)
        self.uses_attention = False
        self.kinks: tuple[str, ...] = ()  # operations of the first evaluation without a second derivative somewhere
        self._widened = False
        self.record_weights()
        self._check_buffers()
        self._widened = self.dtype == torch.float64 and self._runs_widened()
        self.loss.settle_reduction(self.batches.first(), self._once)
        self.batches.ordered = self.modes.by_batch() or not self.loss.additive

    @property
    def graph_budget(self) -> int:
        """Bytes left for kept graphs: the budget without the frozen data and what `reserve` took."""
        return max(0, self._graph_budget - self._reserved)

    def reserve(self, nbytes: int) -> None:
        """Set aside `nbytes` of the budget; a later call replaces an earlier one."""
        self._reserved = nbytes

    @property
    def device(self) -> torch.device:
        return self.selection.device

    @property
    def dtype(self) -> torch.dtype:
        return self.selection.dtype

    @property
    def reduction(self) -> str:
        """ "mean" or "sum", as given or found."""
        return self.loss.reduction

    def evaluate(self, index: Any, batch: Any) -> Value:
        """The loss of batch `index`, with its graph; call inside `quiet()`. Not finite: NonFiniteError that says where."""
        value = self.evaluate_unchecked(index, batch)
        if not value.loss.requires_grad:
            raise DisconnectedLossError(
                f"the loss has no path to any parameter of {type(self.model).__name__}: it was detached, or computed under no_grad.\n"
                "Remove .detach(), .item() or torch.no_grad() between the model and the loss."
            )
        if not bool(torch.isfinite(value.loss.detach())):
            raise non_finite_loss(self.model, index, batch, float(value.loss.detach()), lambda: self.evaluate_unchecked(index, batch))
        return value

    def evaluate_unchecked(self, key: Any, batch: Any, *, masks: bool = True) -> Value:
        """The loss of a batch whose frozen statistics and masks go by `key`."""
        with self.modes.applied(key, self.mask_seed(key), masks=masks):
            return self.loss(batch)

    @contextmanager
    def quiet(self, *, by_value: bool = False, forward: bool = True, tf32: bool = False) -> Iterator[None]:
        """Twice differentiable evaluation; everything of the caller's is restored on the way out. See `guard.untouched`."""
        with untouched(self.model, self.device, by_value=by_value, forward=forward, tf32=tf32), ExitStack() as stack:
            if self._widened:  # around backward passes too: checkpoints run the model again in them
                stack.enter_context(Doubling())
            yield

    def notes(self) -> list[str]:
        """What a result of this objective must say."""
        notes = self.selection.notes() + self.modes.notes() + list(self.loss.notes)
        if self._wrappers:
            notes.append(f"measured and named is the model inside {', '.join(self._wrappers)}")
        if self.reduction == "sum":
            notes.append("reduction 'sum': the matrix is that of the plain sum over examples, not of their mean")
        if self.loss.loss_fn is None:
            notes.append("loss: the model's own .loss, or cross-entropy")
        if self._widened:
            notes.append("casts to float32 inside the model or loss were left out: everything ran in float64")
        if self.batches.streamed:
            notes.append("the data exceed the memory budget and were read anew in every product")
        return notes

    def provenance(self) -> dict[str, Any]:
        """Versions, device, and hashes of data and weights."""
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(self.device),
            "dtype": str(self.dtype),
            "model": type(self.model).__name__,
            "params": self.selection.names,
            "frozen": self.selection.frozen,
            "n": self.selection.layout.n,
            "samples": self.batches.count,
            "data_hash": self.batches.digest(),
            "weights_hash": weights_hash(self.selection.params),
        }

    # --- weights: recorded at construction, compared at each product and, by value, around each run ---

    def record_weights(self) -> None:
        """Take the present weights and buffers as the point at which derivatives are taken."""
        if self.records:
            self.selection = again(self.model, self.selection)  # a parameter may have been replaced by another object
            self.modes.check()
            self.modes.clear()
        self.records += 1
        self._marks = self._present_marks()
        self._quick = Watch(self.model) if Watch.knows(self.model) else None
        self._sums = self._present_sums()

    def check_marks(self) -> None:
        """StaleOperatorError if a parameter or buffer was replaced or written, or a mode switched, since; no device work."""
        if self._quick is not None and self._quick.unchanged():
            self.batches.check_unchanged()
            return
        present = self._present_marks()
        if present != self._marks:
            changed = [name for name in self._marks if present.get(name) != self._marks[name]]
            raise stale(changed or [name for name in present if name not in self._marks])
        if self._quick is not None:
            self._quick = Watch(self.model)  # what differs is none of what decides
        self.batches.check_unchanged()

    def check_values(self) -> None:
        """check_marks, and a checksum that sees edits through `.data`, which leave no mark."""
        self.check_marks()
        present = self._present_sums()
        changed = [name for name, total in self._sums.items() if present[name] != total]
        if changed:
            raise stale(changed)

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _present_marks(self) -> dict[str, tuple[int, int]]:
        return marks(self._state()) | self.modes.flags()

    def _present_sums(self) -> dict[str, tuple[int, int]]:
        return {name: _bit_sums(t) for name, t in self._state()}

    def mask_seed(self, key: Any) -> int:
        """Seed of the dropout masks of the batch called `key`."""
        # 32 bits, since torch's CPU generator ignores the others; not hash(): that of a str differs between processes
        return zlib.crc32(repr((self.seed, key)).encode())

    def draw_seed(self, key: Any) -> int:
        """Seed of the labels that are drawn for the batch called `key`."""
        return self.mask_seed(("draw", key))

    def _once(self, batch: Any) -> Value:
        """One evaluation of the whole first batch, or of a part of it by the recorded statistics of the whole."""
        with self.quiet(), torch.no_grad():
            return self.evaluate_unchecked(0, batch, masks=False)  # the halves of a batch have no masks in common with it

    @contextmanager
    def _misfits_told(self) -> Iterator[None]:
        """Around the first evaluation: what torch says of devices and dtypes, with the names of what does not fit."""
        try:
            yield
        except RuntimeError as e:
            if isinstance(e, FastsharpError):
                raise
            text = str(e)
            for name, t in self._state():
                if t.device != self.device and _OF_DEVICE.search(text):
                    raise DeviceError(
                        f"{name!r} is on {t.device}, the chosen parameters are on {self.device}: {type(self.model).__name__} cannot be evaluated.\n"
                        "Load all its weights and move the whole model to one device."
                    ) from e
            held = [(repr(name), t) for name, t in self._state()] + [("the data", t) for t in tensors_of(self.batches.first())]
            for name, t in held:
                if (t.is_floating_point() or t.is_complex()) and t.dtype != self.dtype and _OF_DTYPE.search(text):
                    advice = "the batches with .to" if name == "the data" else "it with .to"
                    raise DtypeError(
                        f"{name}: {t.dtype}, but the chosen parameters are {self.dtype}, and torch does not mix them here ({_first_line(e)}).\n"
                        f"Convert {advice}({self.dtype}), or the whole model with model.float() or model.double()."
                    ) from e
            raise

    def _runs_widened(self) -> bool:
        """Whether this float64 model casts to float32 inside, and evaluates without those casts as well.

        Left in, they would cut products of transformers to 1e-7: seen as asymmetry, or not at all. Casts to half precision are
        meant as such and stay.
        """
        batch = self.batches.first()
        with self.quiet(), torch.no_grad(), CastsSeen() as casts:
            self.evaluate_unchecked(0, batch)
        if casts.found != {torch.float32}:
            return False
        with suppress(Exception), self.quiet(), torch.no_grad(), Doubling():  # code that insists on float32 keeps it
            return self.evaluate_unchecked(0, batch).loss.dtype == torch.float64
        return False

    def _check_buffers(self) -> None:
        """The forward pass must leave buffers alone, or each product would see another function."""
        before = marks(self.model.named_buffers())
        with self.quiet(by_value=True), _AttentionSeen() as seen:
            held = {name: b.detach().clone() for name, b in self.model.named_buffers()}
            with self._misfits_told():
                loss = self.evaluate_unchecked(0, self.batches.first()).loss
            self.kinks = examine(self.model, loss, self.selection.params)
            after = dict(self.model.named_buffers())
            changed = [
                name for name, mark in marks(after.items()).items() if mark != before.get(name) or not same_values(after[name], held[name])
            ]
        self.uses_attention = seen.found
        if changed:
            raise ModelModeError(
                f"the forward pass of {type(self.model).__name__} writes to its buffers: {', '.join(changed[:6])}.\n"
                "Its Hessian is not one matrix. Call model.eval() if that stops the updates."
            )


class _AttentionSeen(TorchFunctionMode):
    """Notices attention, called by itself or by nn.MultiheadAttention."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward):
            self.found = True
        return func(*args, **(kwargs or {}))


def weights_hash(params: Iterable[torch.Tensor]) -> str:
    """Hash of the parameters' bytes in their order; one flat vector of them gives the same."""
    digest = hashlib.blake2b(digest_size=16)
    for p in params:
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(e: BaseException) -> str:
    return str(e).strip().split("\n")[0][:160]


def stale(changed: list[str]) -> StaleOperatorError:
    return StaleOperatorError(
        f"changed since the operator was built: {listing(changed, 4)}.\n"
        "An operator is the Hessian at the weights of its construction. Call operator.refresh(), or build a new one."
    )


def _bit_sums(t: torch.Tensor) -> tuple[int, int]:
    """Two integers from the bits of a tensor, plain and by position: exact, so any single change or permutation shows."""
    if t.numel() == 0 or t.is_meta:
        return (0, 0)
    flat = t.detach().contiguous().reshape(-1)
    if flat.device.type == "cpu" and flat.numel() <= _SMALL:  # sums by torch cost 70 us, of any tensor
        data = flat.view(torch.uint8).numpy().data
        return zlib.crc32(data), zlib.adler32(data)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    placed = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):  # type: ignore[no-untyped-call]
        position = torch.arange(1, chunk.numel() + 1, device=bits.device)
        placed = placed * _ODD + (chunk.long() * position).sum()  # wraps modulo 2^64
    return int(bits.sum(dtype=torch.int64)), int(placed)
