"""Functions fit on a screen, files in a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_arrows import sources

LONGEST_FUNCTION, LONGEST_FILE, LONGEST_PROGRAM = 40, 400, 300  # lines; the program is run.py


def too_long(path: Path, most: int) -> Iterator[str]:
    """A file of more than `most` lines, and its functions that are too long, from def to end."""
    text = path.read_text()
    if (lines := text.count("\n")) > most:
        yield f"{path.name} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{node.name} in {path.name} has {lines} lines"


def test_no_function_and_no_file_is_too_long():
    files = sources(ROOT).values()
    assert [found for file in files for found in too_long(file, LONGEST_FILE)] == []
    assert list(too_long(ROOT / "run.py", LONGEST_PROGRAM)) == []


@pytest.mark.parametrize(("lines", "found"), [(39, []), (40, ["f in x.py has 41 lines"])])
def test_a_long_function_is_found(tmp_path, lines: int, found: list[str]):
    (tmp_path / "x.py").write_text("class A:\n    def f(self):\n" + "        pass\n" * lines)
    assert list(too_long(tmp_path / "x.py", 100)) == found
    assert len(list(too_long(tmp_path / "x.py", 10))) == len(found) + 1
