"""Every exception and warning of fastsharp: FastsharpError at the root, the builtin that Python users expect beside it.

A message names the object (module, parameter, batch, file), the cause and one thing to do, in at most five lines.
`code` is stable across releases, so that scripts can branch on it without parsing text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsharp.results import Bracket, Eigenpairs, Estimate, Report


def listing(items: Sequence[str], most: int = 6) -> str:
    """The first few items, and how many more: how messages list names."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def stacklevel() -> int:
    """For `warnings.warn`: the level of the first frame outside of this package, the caller's own line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    return level


class FastsharpError(Exception):
    """Root of all errors; `code` is the stable identifier FSxxx, shown at the end of the message."""

    code = "FS000"

    def __str__(self) -> str:
        return f"{super().__str__()} [{self.code}]"


@contextmanager
def of_member(e: int) -> Iterator[None]:
    """Errors from in here say which member of an ensemble they belong to."""
    try:
        yield
    except FastsharpError as error:
        if not str(error).startswith("member "):
            error.args = (f"member {e}: {error.args[0]}", *error.args[1:])
        raise


# --- FS1xx: what the caller handed in -------------------------------------------------------------------------------


class InputError(FastsharpError, ValueError):
    """An argument has a value that cannot be meant."""

    code = "FS100"


class ArgumentTypeError(FastsharpError, TypeError):
    """An argument has a type that cannot be meant."""

    code = "FS101"


class ModelModeError(InputError):
    """BatchNorm or Dropout in train mode, or a forward pass that changes buffers: the Hessian is not one matrix."""

    code = "FS110"


class LoaderExhaustedError(InputError):
    """The data can be read only once and do not fit the memory budget."""

    code = "FS111"


class EmptyLoaderError(InputError):
    """The loader yields no batch, or only empty ones."""

    code = "FS112"


class BatchFormatError(InputError):
    """A batch has a form for which no call of the model is defined."""

    code = "FS113"


class OutputFormatError(InputError):
    """The model's output has a form to which no loss can be applied."""

    code = "FS114"


class ReductionUnknownError(InputError):
    """It cannot be told whether the loss is a sum or a mean over the examples."""

    code = "FS120"


class LabelError(InputError):
    """A label lies outside the classes of the output."""

    code = "FS121"


class LabelShapeError(InputError):
    """The shapes of output and target would be broadcast against each other."""

    code = "FS122"


class LossShapeError(InputError):
    """The loss is not a scalar."""

    code = "FS123"


class DisconnectedLossError(InputError):
    """The loss has no path to any of the chosen parameters."""

    code = "FS124"


class ParamError(InputError):
    """A parameter selection names something that is not there or cannot be differentiated."""

    code = "FS130"


class NoParametersError(InputError):
    """No trainable floating-point parameter is left."""

    code = "FS131"


class DtypeError(InputError):
    """Dtypes that do not fit together, or that cannot carry second derivatives."""

    code = "FS132"


class DeviceError(InputError):
    """Tensors on devices that do not fit together, or a device that is not there."""

    code = "FS133"


class ShapeError(InputError):
    """A tensor has the wrong shape or memory layout."""

    code = "FS134"


class PrecisionError(DtypeError):
    """Parameters in half precision, which cannot carry second derivatives."""

    code = "FS135"


class InferenceTensorError(ParamError):
    """A parameter was created under inference_mode and takes no gradient."""

    code = "FS136"


class SparseGradError(InputError):
    """An embedding with sparse=True: its gradient cannot be differentiated again."""

    code = "FS137"


class DistributedError(InputError):
    """The model is spread over several processes, and this one knows a part of it."""

    code = "FS138"


# --- FS2xx: the operator is not what it must be ---------------------------------------------------------------------


class OperatorError(FastsharpError, RuntimeError):
    """The matrix behind a product is not one fixed symmetric matrix."""

    code = "FS200"


class NondeterministicOperatorError(OperatorError):
    """Two products with the same vector differ, or two passes over the data see different samples."""

    code = "FS201"


class NotSymmetricError(OperatorError):
    """`u'Hv` and `v'Hu` differ beyond rounding."""

    code = "FS202"


class DoubleBackwardError(OperatorError):
    """A part of the model or loss has no second derivative, or a wrong one."""

    code = "FS203"


class NonFiniteError(OperatorError):
    """A NaN or Inf in data, loss, gradient or product."""

    code = "FS204"


class StaleOperatorError(OperatorError):
    """Parameters or buffers changed since the operator was built."""

    code = "FS205"


class EngineError(OperatorError):
    """The backend that was asked for cannot compute the products of this model, or computes other ones than autograd."""

    code = "FS206"


# --- FS3xx: the machine and its files -------------------------------------------------------------------------------


class KernelError(FastsharpError, RuntimeError):
    """A native kernel reported a failure, or a backend that was asked for is not built."""

    code = "FS300"


class BasisMemoryError(FastsharpError, MemoryError):
    """The smallest Krylov basis and the Ritz vectors exceed the memory that is left."""

    code = "FS301"


class DataNotFoundError(FastsharpError, FileNotFoundError):
    """A data set was found in none of the places looked in."""

    code = "FS310"


class DataFormatError(FastsharpError, ValueError):
    """A data file is damaged, has an unexpected content or a wrong hash."""

    code = "FS311"


class LogError(FastsharpError, RuntimeError):
    """The log of a run cannot be opened, is in use, or cannot be read."""

    code = "FS320"


class ResumeMismatchError(FastsharpError, ValueError):
    """The log that a run should continue belongs to another run."""

    code = "FS321"


class LoaderError(FastsharpError, RuntimeError):
    """The loader failed while a batch was read; its own exception is the cause."""

    code = "FS330"


class LoaderTimeoutError(LoaderError):
    """The workers of a loader gave no batch within its timeout."""

    code = "FS331"


# --- FS4xx: a run that ended early; all carry what was computed -----------------------------------------------------


class NotConvergedError(FastsharpError, RuntimeError):
    """`strict=True` and at least one pair missed its tolerance; `.partial` holds all pairs with their flags."""

    code = "FS400"

    def __init__(self, message: str, partial: Eigenpairs | Estimate) -> None:
        super().__init__(message)
        self.partial = partial


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `.partial` holds what was computed so far, or None before the first step.

    A KeyboardInterrupt, so that no `except Exception` swallows it.
    """

    code = "FS401"

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(f"{message} [{self.code}]")
        self.partial = partial


# --- warnings -------------------------------------------------------------------------------------------------------


class NotConvergedWarning(UserWarning):
    """At least one pair missed its tolerance; `.partial` holds all pairs with their flags."""

    def __init__(self, message: str, partial: Eigenpairs | Estimate | Bracket | Report) -> None:
        super().__init__(message)
        self.partial = partial


class UnusedParamWarning(UserWarning):
    """A chosen parameter has no gradient path; its rows of the Hessian are zero."""


class UnstableDataWarning(UserWarning):
    """A second draw from the loader yields other samples; the run goes on with the first draw, frozen."""


class LogStoppedWarning(UserWarning):
    """The log of a run stopped growing, such as on a full disk; the run itself goes on."""


def in_a_line(e: Exception) -> str:
    """An error's text as a reason."""
    return " ".join(str(e).split("\n"))
