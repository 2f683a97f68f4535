"""One evaluation of a loss as a tape: the ATen calls below autograd through which it depends on the parameters.

What depends on what is asked of autograd itself, call by call: the evaluation runs with gradients on, and an input counts as
active where its value follows from the parameters and the tensor requires grad. So detach(), no_grad() and frozen parameters cut
the tape where they cut the graph. Calls that write are entered by what they compute (see `memory.Memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsharp.curvature.rop.memory import Memory, Unrecorded, Value
from fastsharp.curvature.rop.rule import Call
from fastsharp.curvature.rop.tree import mapped, tensors

__all__ = ["Tape", "Unrecorded", "record"]


class Tape:
    """The active calls of one evaluation.

    calls     in the order of their evaluation; tensors stand for values, see `fold.fold`
    params    the value of each parameter, as it appears in the calls
    outputs   the network's outputs on which the loss depends; in place of a view what it views
    loss      the value of the loss
    """

    def __init__(self, calls: list[Call], params: list[torch.Tensor], outputs: list[torch.Tensor], loss: torch.Tensor) -> None:
        self.calls = calls
        self.params = params
        self.outputs = outputs
        self.loss = loss


def record(fn: Callable[[], tuple[Any, torch.Tensor]], params: Sequence[torch.Tensor], *, modules: nn.Module | None = None) -> Tape:
    """Run fn() -> (outputs of the network, loss) once and return its tape. Call it inside `guard.untouched`.

    outputs   any nest of tensors, None where the Gauss-Newton matrix will not be asked for
    modules   whose names the calls carry for messages; it is also searched for what cannot be recorded
    Raises Unrecorded where the tape would not be the function that autograd differentiates: custom autograd.Functions, hooks on
    gradients, scripted modules, graphs from before, complex or sparse values, writes that autograd does not see.
    """
    _refuse(params, modules)
    memory = Memory(params)
    first = _sequence_number()
    with ExitStack() as stack:
        path = stack.enter_context(_paths(modules))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_Watch())
        stack.enter_context(_Recorder(memory, path))
        outputs, loss = fn()
    if loss.numel() != 1:
        raise Unrecorded(f"a loss of {loss.numel()} numbers")
    reached = _reached(loss, first)
    end = memory.read(loss)
    marked = [memory.read(t) for t in tensors(outputs)]
    tape, followed = _tape(memory, end, [_viewed(memory, v) for v in marked])
    if any(id(p) in reached and v not in followed for p, v in zip(params, memory.params, strict=True)):
        raise Unrecorded("a path to a parameter that is autograd's alone")
    return tape


def _viewed(memory: Memory, value: Value) -> Value:
    """The value of which this one is a view: a loss may view it in its own way, and views, linear, may count to either side."""
    for entry in reversed(memory.entries):
        if value in entry.outputs and _is_view(entry.func):
            value = next(v for v in entry.inputs if v.active)
    return value


def _is_view(func: Any) -> bool:
    if func is torch.ops.aten._unsafe_view.default:
        return True
    returned = func._schema.returns[0].alias_info
    return returned is not None and not returned.is_write


def _tape(memory: Memory, end: Value, marked: list[Value]) -> tuple[Tape, set[Value]]:
    """Calls on the path to the loss, with their tensors in place of values; and the active values on it."""
    if not end.active:
        raise Unrecorded("a loss that does not depend on the parameters")
    needed = {end}
    kept = []
    for entry in reversed(memory.entries):
        if needed.isdisjoint(entry.outputs):
            continue
        kept.append(entry)
        needed.update(v for v in entry.inputs if v.active)
    active = {id(v.tensor) for v in needed}

    def tensor(leaf: Any) -> Any:
        return leaf.tensor if isinstance(leaf, Value) else leaf

    calls = []
    for entry in reversed(kept):
        args, kwargs = mapped(tensor, (entry.args, entry.kwargs))
        calls.append(Call(entry.func, args, kwargs, [v.tensor for v in entry.outputs], lambda t: id(t) in active, entry.module))
    return Tape(calls, [v.tensor for v in memory.params], [v.tensor for v in marked if v in needed], end.tensor), needed


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enters each call in the memory, and runs it."""

    def __init__(self, memory: Memory, path: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._path = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._memory.call(func, args, kwargs or {}, self._path[-1])


class _Watch(TorchFunctionMode):
    """Refuses hooks that change gradients, and keeps recurrent layers off kernels without a second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook):
            raise Unrecorded("a hook on the gradient of a tensor")
        if func in _RECURRENT and torch.backends.mkldnn.enabled:
            torch._C._set_mkldnn_enabled(False)
            try:
                return func(*args, **(kwargs or {}))
            finally:
                torch._C._set_mkldnn_enabled(True)
        return func(*args, **(kwargs or {}))


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def _refuse(params: Sequence[torch.Tensor], modules: nn.Module | None) -> None:
    if any(p._backward_hooks for p in params):
        raise Unrecorded("a hook on the gradient of a parameter")
    held = torch.nn.modules.module
    if held._global_backward_hooks or held._global_backward_pre_hooks:
        raise Unrecorded("a backward hook on all modules")
    for name, m in modules.named_modules() if modules is not None else ():
        if isinstance(m, torch.jit.ScriptModule):
            raise Unrecorded(f"a scripted module ({name or 'the model itself'})")
        if m._backward_hooks or m._backward_pre_hooks:
            raise Unrecorded(f"a backward hook on a module ({name or 'the model itself'})")


@contextmanager
def _paths(modules: nn.Module | None) -> Iterator[list[str]]:
    """A stack whose top is the name of the module that runs. The hooks are global ones: the caller's modules are not touched."""
    names = {id(m): name for name, m in modules.named_modules()} if modules is not None else {}
    if modules is not None and any(type(m).__name__ == "OptimizedModule" for m in modules.modules()):
        names = {}  # torch warns of global hooks beside a compiled module
    path = [""]

    def enter(module: nn.Module, args: Any) -> None:
        path.append(names.get(id(module), path[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(path) > 1:
            path.pop()

    handles = []
    try:
        if names:
            handles += [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        yield path
    finally:
        for handle in handles:
            handle.remove()


def _sequence_number() -> int:
    """Autograd's count of nodes at present: what follows in this thread has this number or a higher one."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


def _reached(loss: torch.Tensor, first: int) -> set[int]:
    """Identities of the leaf tensors to which the graph leads; every node of it must be one that the tape saw being made."""
    leaves: set[int] = set()
    seen: set[Any] = {None}
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "_forward_cls"):
            raise Unrecorded(f"the custom autograd.Function {node._forward_cls.__name__}")
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        elif node._sequence_nr() < first:
            raise Unrecorded(f"a graph from before this evaluation ({node.name()})")
        elif _hooked(node):
            raise Unrecorded(f"a hook on a node of autograd's graph ({node.name()})")
        stack.extend(following for following, _ in node.next_functions)
    return leaves


def _hooked(node: Any) -> bool:
    """Whether somebody registered a hook on this node: torch shows its hooks to nobody but the next one who registers."""
    for register in (node.register_hook, node.register_prehook):
        handle = register(_passed)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return True
    return False


def _passed(*_: Any) -> None:
    """A hook that changes nothing."""
