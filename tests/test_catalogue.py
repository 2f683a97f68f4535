"""The catalogue of bad input is complete: every row has a test of its name, and the page for users says what the tests check."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsharp import errors

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reference" / "bad-input.md"
ROWS = [f"{group}{i}" for group, last in (("A", 21), ("B", 27), ("C", 7), ("D", 7)) for i in range(1, last + 1)]
FILES = sorted(TESTS.glob("test_bad_input_*.py"))
CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__}
MEASURED_ELSEWHERE = {"B21"}  # in processes of its own, under `unchanged`


@functools.cache
def parsed(path: Path) -> tuple[str, ast.Module]:
    source = path.read_text(encoding="utf-8")
    return source, ast.parse(source)


def functions() -> Iterator[tuple[ast.FunctionDef, str, bool]]:
    """(test, its source, whether the fixture `row` is around it) of every test in the files of the catalogue."""
    for path in FILES:
        source, tree = parsed(path)
        marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0])]
        everywhere = any("'row'" in mark for mark in marks)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marked = any(isinstance(d, ast.Name) and d.id == "a_row" for d in node.decorator_list)
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                yield node, "\n".join(lines), everywhere or marked


def rows_of(name: str) -> list[str]:
    """The rows in a test's name: test_A12_A13_nan -> A12, A13."""
    found = re.match(r"test_((?:[A-D]\d+_)+)", name)
    return found.group(1).rstrip("_").split("_") if found else []


def named_after(row: str) -> list[tuple[ast.FunctionDef, str, bool]]:
    return [f for f in functions() if row in rows_of(f[0].name)]


def classes_in(node: ast.FunctionDef) -> set[str]:
    """Errors and warnings that a test expects: first arguments of `refuses`, `raises`, `warns`."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and re.search(r"(^|\.)(refuses|raises|warns)$", ast.unparse(n.func))]
    return {ast.unparse(c.args[0]).rpartition(".")[2] for c in calls if c.args} & CLASSES


def page_rows() -> dict[str, tuple[str, str]]:
    """{row: (input, what comes of it)} as the page states them."""
    cells = re.findall(r"^\| ([A-D]\d+) \| (.+?) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {row: (given, outcome) for row, given, outcome in cells}


@pytest.mark.parametrize("row", ROWS)
def test_P13_every_row_has_a_test_inside_the_one_fixture(row: str) -> None:
    found = named_after(row)
    assert found, f"no test is named after {row}"
    assert row in MEASURED_ELSEWHERE or any(wrapped for _, _, wrapped in found), f"{row}: no test of it uses the fixture `row`"


@pytest.mark.parametrize("row", ROWS)
def test_P13_the_page_names_the_errors_that_the_tests_expect(row: str) -> None:
    _, outcome = page_rows()[row]
    stated = set(re.findall(r"`(\w+(?:Error|Warning))`", outcome))
    expected = set().union(*(classes_in(node) for node, _, _ in named_after(row)))
    if row in MEASURED_ELSEWHERE:  # what the process expects stands in a string; the docstring names it
        expected |= {word for word in CLASSES if any(re.search(rf"\b{word}\b", source) for _, source, _ in named_after(row))}
    assert stated == expected, f"{row}: the page says {sorted(stated)}, the tests {sorted(expected)}"


def test_P13_the_page_has_every_row_once_and_in_order() -> None:
    stated = re.findall(r"^\| ([A-D]\d+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert stated == ROWS


def test_no_test_is_named_after_a_row_that_is_none() -> None:
    assert {row for node, _, _ in functions() for row in rows_of(node.name)} <= set(ROWS)


def test_a_missing_test_and_a_wrong_page_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.FILES", [f for f in FILES if "loader" not in f.name])
    with pytest.raises(AssertionError, match="A20"):
        test_P13_every_row_has_a_test_inside_the_one_fixture("A20")
    monkeypatch.undo()
    monkeypatch.setattr(f"{__name__}.page_rows", lambda: dict.fromkeys(ROWS, ("", "the right number")))
    with pytest.raises(AssertionError, match="A20"):
        test_P13_the_page_names_the_errors_that_the_tests_expect("A20")
