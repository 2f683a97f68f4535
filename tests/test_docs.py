"""The documentation tells the truth: its code runs, its signatures are the code's, its links resolve, its tables are complete."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import fastsharp
from fastsharp import errors, results

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
README = (ROOT / "README.md").read_text()
COMMANDS = ("pip install -e . && fastsharp demo", 'pip install -e ".[test]" && pytest')


@dataclass(frozen=True)
class Block:
    """A fenced block: the language and what follows it on the fence, the text, and the line of the text's start."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page; a fence left open is an error."""
    found, opened = [], None
    lines = page.read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if opened is None:
                opened = i
            else:
                language, _, info = lines[opened][3:].partition(" ")
                found.append(Block(language, info, "\n".join(lines[opened + 1 : i]) + "\n", opened + 2))
                opened = None
    assert opened is None, f"{page.name}:{(opened or 0) + 1}: the fence is not closed"
    return found


def prose(page: Path) -> list[tuple[int, str]]:
    """Numbered lines of a page outside of fenced blocks."""
    inside, kept = False, []
    for i, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            kept.append((i, line))
    return kept


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- code -----------------------------------------------------------------------------------------------------------

RUN = [page for page in PAGES if any(b.language == "python" and not b.info for b in blocks(page))]
PRELUDE = next(b.text for b in blocks(ROOT / "docs" / "index.md") if b.language == "python")


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python blocks of a page run in one namespace, in an empty folder; pages under docs/ begin with the block of docs/index.md."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    if page in DOCS:
        exec(PRELUDE, namespace)
    for block in blocks(page):
        if block.language == "python" and not block.info:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_skipped_code_says_why(page: Path) -> None:
    """A python block runs, is a signature, or is `no-run: reason`; then it still has to parse."""
    for block in blocks(page):
        if block.language == "python":
            assert block.info in ("", "signature") or re.fullmatch(r"no-run: .{10,}", block.info), (
                f"{page.name}:{block.line}: {block.info!r}"
            )
            ast.parse(block.text)


# --- signatures and names ---------------------------------------------------------------------------------------------


def stated_signatures() -> list[tuple[str, str]]:
    """(dotted name, `def` statement) of every signature block of the reference."""
    found = []
    for page in DOCS:
        for block in blocks(page):
            if block.info == "signature":
                parts = re.split(r"^# (fastsharp[\w.]*)\n", block.text, flags=re.MULTILINE)[1:]
                found += list(zip(parts[::2], parts[1::2], strict=True))
    return found


def resolve(dotted: str) -> Any:
    """The object behind a dotted name, importing modules on the way."""
    target: Any = fastsharp
    path = "fastsharp"
    for part in dotted.split(".")[1:]:
        path += f".{part}"
        target = getattr(target, part) if hasattr(target, part) else importlib.import_module(path)
    return target


@pytest.mark.parametrize(("dotted", "text"), stated_signatures(), ids=lambda v: v if v.startswith("fastsharp") else "")
def test_signature_is_that_of_the_code(dotted: str, text: str) -> None:
    """Names, order, kinds and defaults of the parameters."""
    import torch

    namespace: dict[str, Any] = {"torch": torch}
    exec(text, namespace)
    stated = inspect.signature(next(v for k, v in namespace.items() if inspect.isfunction(v)))
    actual = inspect.signature(resolve(dotted))
    bare = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (stated, actual)]
    assert bare[0] == bare[1]


def public_names() -> list[str]:
    """What `fastsharp/__init__.py` re-exports as `X as X`."""
    tree = ast.parse((ROOT / "fastsharp" / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]


@pytest.mark.parametrize("name", public_names())
def test_public_name_is_in_the_reference(name: str) -> None:
    reference = "\n".join(page.read_text() for page in DOCS if page.parent.name == "reference")
    assert re.search(rf"(`|fastsharp\.){name}\b", reference), f"no word about fastsharp.{name} under docs/reference"


def test_every_argument_is_explained() -> None:
    text = (ROOT / "docs" / "reference" / "lanczos.md").read_text()
    missing = [name for name in inspect.signature(fastsharp.lanczos).parameters if f"| `{name}` |" not in text]
    assert not missing


def test_every_field_is_explained() -> None:
    text = (ROOT / "docs" / "reference" / "results.md").read_text()
    stated = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert stated == [f.name for f in fields(results.Eigenpairs)]


def test_every_data_set_is_listed() -> None:
    from fastsharp import data

    text = (ROOT / "docs" / "reference" / "data-and-models.md").read_text()
    assert set(data.names()) == set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_error_table_is_complete() -> None:
    """Code, class and first sentence of each error, sorted by code; each warning with its first sentence."""
    text = (ROOT / "docs" / "how-to" / "reading-errors.md").read_text()
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__]
    coded = sorted((c.code, c.__name__, says(c)) for c in classes if not issubclass(c, Warning))
    assert re.findall(r"^\| (FS\d+) \| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE) == coded
    warned = [(c.__name__, says(c)) for c in classes if issubclass(c, Warning)]
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE) == warned


def test_error_codes_are_unique() -> None:
    codes = [c.code for c in vars(errors).values() if inspect.isclass(c) and c.__module__ == errors.__name__ and "code" in vars(c)]
    assert len(codes) == len(set(codes))


def says(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


# --- command line ------------------------------------------------------------------------------------------------------


def test_command_line_page_is_complete() -> None:
    """The options of each command are those of its parser, no more and no fewer."""
    from fastsharp import cli

    text = (ROOT / "docs" / "how-to" / "command-line.md").read_text()
    sections = dict(zip(*[iter(re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:])] * 2, strict=True))
    actions = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for command, parser in actions[0].choices.items():
        assert f"`fastsharp {command}" in text
        options = {o for a in parser._actions for o in a.option_strings} - {"-h", "--help"}
        stated = set(re.findall(r"^\| `(--?[\w-]+)", sections.get(f"fastsharp {command}", ""), flags=re.MULTILINE))
        assert stated == options, command


def test_exit_codes_are_listed() -> None:
    from fastsharp import cli

    text = (ROOT / "docs" / "how-to" / "command-line.md").read_text()
    stated = [int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)]
    assert stated == [cli.OK, cli.FAILED, cli.USAGE, cli.NOT_CONVERGED, cli.CTRL_C]


# --- form --------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    headings = [line.lstrip("#").strip() for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    """Relative links lead to a file of the repository, and their fragment to a heading of it."""
    for line, text in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            path, _, fragment = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists() and file.is_relative_to(ROOT), f"{page.name}:{line}: {target}"
            assert not fragment or fragment in anchors(file), f"{page.name}:{line}: no heading #{fragment}"


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_page_is_reachable(page: Path) -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / t.partition("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s]+)\)", index.read_text())}
    assert page == index or page in linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_rectangular(page: Path) -> None:
    """A bar inside a cell has to be written `\\|`, also in code."""
    width = None
    for line, text in prose(page):
        if not text.startswith("|"):
            width = None
            continue
        bars = len(re.findall(r"(?<!\\)\|", text))
        assert width is None or bars == width, f"{page.name}:{line}: {bars} bars where the first row has {width}"
        width = bars


def test_readme_commands_stand_literally() -> None:
    lines = README.splitlines()
    assert all(lines.count(command) == 1 for command in COMMANDS)


def test_readme_first_code_block_stands_alone() -> None:
    """At most ten lines of code, and no prelude."""
    first = next(b for b in blocks(ROOT / "README.md") if b.language == "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 10


def test_assets_are_small() -> None:
    sizes = {p.name: p.stat().st_size for p in (ROOT / "docs" / "assets").glob("*")}
    assert all(size < 100_000 for size in sizes.values()), sizes


def test_changelog_has_the_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version and f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
