"""Commands made of the one that started a process: printed, given to a shell, and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import command

# Prints its arguments, and on rank 0 the command that says the same with another step.
PROGRAM = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from utils import command
if os.environ.get("RANK", "0") == "0":
    next_one = command.again(sys.argv[1:], ("step_ckpt", "ckpt"), step=3)
    print(json.dumps([sys.argv[1:], os.environ.get("WORLD_SIZE"), next_one]))
"""
TYPED = ["--name", 'it\'s $a "name"', "--step=1", "--lr", "0.1,0.01", "--step-ckpt", "a b.pth"]
NEXT = ["--name", 'it\'s $a "name"', "--step", "3", "--lr", "0.1,0.01"]


def said(line: str) -> tuple[list[str], str | None, str]:
    arguments, world, following = json.loads(line)
    return [a for a in arguments if not a.startswith("--local")], world, following


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["-u"],
        ["-m", "torch.distributed.launch", "--master_port=29713", "--nproc_per_node=1"],
        [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node=2"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_shell_runs_the_next_command(tmp_path, launcher):
    """It does what the first did, launcher included, but for the flags that are to differ."""
    program = tmp_path / "a program.py"
    program.write_text(PROGRAM)
    first = subprocess.run(
        [sys.executable, *launcher, str(program), *TYPED], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    arguments, world, following = said(first.stdout)
    assert arguments == TYPED
    second = subprocess.run(following, shell=True, capture_output=True, text=True, check=True)
    assert said(second.stdout) == (NEXT, world, following)


def test_without_a_known_parent_torchrun_is_named(monkeypatch):
    """A batch system may set the variables itself."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    found = command.again(["--step", "0"], (), step=1)
    assert found == "torchrun --nproc_per_node=4 run.py --step 1"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], "--step 2"),
        (["--overlap"], "--overlap --step 2"),
        (["--step", "0", "--overlap", "--step=1"], "--step 2 --overlap"),
        (["--ckpt=x", "--mask-x", "--name=--step"], "--mask-x --name=--step --step 2"),
        (["--local_rank", "0", "--local-rank=0", "--step_ckpt", "--odd"], "--step 2"),
    ],
)
def test_flags_are_replaced_and_left_out(monkeypatch, typed, expected):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pytest", "another command"])
    full = command.again(typed, ("step_ckpt", "ckpt"), step=2)
    assert full.partition("run.py ")[2] == expected


def test_another_program_is_found_from_anywhere(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from utils import command; "
    code += "print(command.other('report.py', '--help'))"
    for folder in (tmp_path, ROOT):
        shown = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True,
                               text=True, check=True).stdout  # fmt: skip
        assert (str(ROOT) in shown) == (folder == tmp_path or str(ROOT) in sys.executable)
        done = subprocess.run(shown, shell=True, cwd=folder, capture_output=True, text=True)
        assert done.stdout.startswith("usage: python report.py ")
