"""Standard streams that are closed, unread or of a narrow encoding."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import os, sys
from utils.streams import make_steady
make_steady()
make_steady()
print("x" * 100_000 + "é", flush=True)
print("y" * 100_000, flush=True)
file = open(sys.argv[1], "w")
assert file.fileno() > 2
os.write(1, b"of a library")
file.write("whole")
file.close()
print("heard", file=sys.stderr)
"""


@pytest.mark.parametrize("shell", ["| head -c 1", ">&-", ">&- <&-", "> /dev/full", "> out"])
def test_a_program_goes_on(tmp_path, shell):
    path = tmp_path / "file"
    line = f'"{sys.executable}" -c \'{PROGRAM}\' "{path}" {shell}'
    done = subprocess.run(
        line.replace("> out", f"> {tmp_path / 'out'}"), shell=True, cwd=ROOT, text=True,
        capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == "heard\n"
    assert path.read_text() == "whole"
    if shell == "> out":
        assert r"x\xe9" in (tmp_path / "out").read_text()
