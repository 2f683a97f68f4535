"""Every error has one code, one sentence on what it means, and a place where it is raised."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastsharp
from fastsharp import errors
from fastsharp.errors import FastsharpError, Interrupted, NotConvergedError

PACKAGE = Path(errors.__file__).parent
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
ERRORS = [c for c in CLASSES if not issubclass(c, Warning)]
ABSTRACT = {"FastsharpError", "OperatorError"}  # roots to catch by, never raised themselves


def named(*nodes: ast.AST) -> set[str]:
    """Names of everything called inside these nodes."""
    calls = [node.func for root in nodes for node in ast.walk(root) if isinstance(node, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, (ast.Name, ast.Attribute))}


def used() -> set[str]:
    """Names that the package raises, builds for a raise elsewhere, or hands to warnings.warn."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise):
                found |= named(node)
            elif isinstance(node, ast.Return) and node.value is not None:
                found |= named(node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warn":
                found |= {a.id for a in node.args if isinstance(a, ast.Name)} | named(*node.args)
    return found


@pytest.mark.parametrize("cls", ERRORS, ids=lambda c: c.__name__)
def test_a_code_of_its_own_and_a_docstring(cls):
    assert re.fullmatch(r"FS\d{3}", cls.__dict__["code"])
    assert [c for c in ERRORS if c.code == cls.code] == [cls]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_sentence_and_a_use(cls):
    doc = cls.__dict__["__doc__"]
    assert doc and doc.split("\n")[0].endswith(".") and len(doc.split()) > 4
    assert cls.__name__ in ABSTRACT or cls.__name__ in used()


@pytest.mark.parametrize("cls", ERRORS, ids=lambda c: c.__name__)
def test_the_builtin_that_a_python_user_expects(cls):
    assert issubclass(cls, FastsharpError) or cls is Interrupted
    builtins = {
        "1": (ValueError, TypeError),
        "2": (RuntimeError,),
        "3": (RuntimeError, FileNotFoundError, MemoryError, ValueError),
        "4": (RuntimeError, KeyboardInterrupt),
    }
    assert cls is FastsharpError or issubclass(cls, builtins[cls.code[2]])


@pytest.mark.parametrize("cls", ERRORS, ids=lambda c: c.__name__)
def test_the_code_ends_the_message(cls):
    error = cls("something", None) if cls in (NotConvergedError, Interrupted) else cls("something")
    assert str(error) == f"something [{cls.code}]"


def test_ctrl_c_is_swallowed_by_no_except_exception():
    assert not issubclass(Interrupted, Exception) and issubclass(Interrupted, KeyboardInterrupt)


def test_warnings_point_at_the_callers_own_line() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
    batch = (torch.randn(50, 30), torch.arange(50) % 3)
    with pytest.warns() as seen:
        fastsharp.lanczos(model, batch, k=5, max_iter=6)
        fastsharp.lanczos(torch.diag(torch.arange(1.0, 101.0)), k=5, max_iter=6)
    kinds = [w.category for w in seen]
    assert kinds == [errors.UnusedParamWarning, errors.NotConvergedWarning, errors.NotConvergedWarning]
    assert {w.filename for w in seen} == {__file__}
