"""Imports run downwards only: from the programs to the rooms below them, see docs/design.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Who may import whom. A room or file that is not named here imports nothing of the program.
ARROWS = {
    "run": {"engine", "utils"},
    "report": {"engine", "utils"},
    "predict": {"dataset", "engine", "modules", "utils"},
    "export": {"dataset", "engine", "modules", "utils"},
    "engine": {
        "argparser", "dataset", "methods", "metrics", "modules", "segmentation_module", "tasks",
        "train", "utils",
    },
    "argparser": {"dataset", "methods", "modules", "tasks", "utils"},
    "train": {"dataset", "methods", "metrics", "utils"},
    "methods": {"segmentation_module", "utils"},
    "segmentation_module": {"modules", "utils"},
    "modules": {"utils"},
    "dataset": {"tasks", "utils"},
    "tasks": {"utils"},
}  # fmt: skip
# What argparser reads may not import torch: `--help` answers at once.
OUTSIDE = {"torch.distributed": r"utils/distributed\.py|modules/norm\w*\.py",
           "torch.utils.tensorboard|tensorboard|wandb": r"utils/logger\.py"}  # fmt: skip
LOADERS = {"import_module", "set_forkserver_preload", "__import__"}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, of the program: not of its tests and benchmarks."""
    files = [*root.glob("*.py"), *root.glob("[a-z]*/*.py")]
    left_out = {"tests", "benchmarks", "demo", "compare"}
    names = {file.relative_to(root).with_suffix("").parts: file for file in files}
    return {
        ".".join(parts).removesuffix(".__init__"): file
        for parts, file in names.items()
        if parts[0] not in left_out
    }


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports: at its top, in functions, and by names in strings."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            strings = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            if name in LOADERS:
                yield from (value for value in strings if isinstance(value, str))


def target(name: str, modules: dict[str, Path]) -> str | None:
    """The module of the program that an imported name lies in; None for a library's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def wrong_arrows(root: Path) -> list[str]:
    """Every import that no arrow allows, and a cycle of imports if there is one."""
    modules = sources(root)
    wrong, graph = [], {}
    for name, file in modules.items():
        where = file.relative_to(root).as_posix()
        names = list(imported(file))
        found = {t for n in names if (t := target(n, modules)) and t != name}
        graph[name] = found
        room = name.split(".")[0]
        allowed = ARROWS.get(room, set()) | {room}
        wrong += [f"{where} imports {t}" for t in sorted(found) if t.split(".")[0] not in allowed]
        for libraries, places in OUTSIDE.items():
            outside = [n for n in names if re.match(rf"({libraries})(\.|$)", n)]
            if outside and not re.fullmatch(places, where):
                wrong.append(f"{where} imports {outside[0]}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"cycle: {' -> '.join(error.args[1])}")
    return wrong


def test_imports_run_downwards():
    assert wrong_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("utils/a.py", "from methods.table import METHODS"),
        ("utils/a.py", "def f():\n    import engine.fit"),
        ("utils/a.py", "import importlib\nimportlib.import_module('dataset.b')"),
        ("utils/a.py", "server.set_forkserver_preload(['run'])"),
        ("methods/table.py", "import argparser"),
        ("engine/fit.py", "import run"),
        ("engine/fit.py", "import torch.distributed as dist"),
        ("train.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("dataset/b.py", "def f():\n    from dataset.c import x"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, file: str, line: str):
    files = ("run.py", "argparser.py", "train.py", "methods/table.py", "engine/fit.py",
             "dataset/b.py", "dataset/c.py", "utils/a.py")  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("from dataset import b\n" if name == "dataset/c.py" else "")
    assert wrong_arrows(tmp_path) == []
    (tmp_path / file).write_text(line)
    assert len(wrong_arrows(tmp_path)) == 1


def test_reading_the_command_line_imports_no_torch():
    program = "import engine.plans, sys; engine.plans.parse([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
