"""Bars reach a terminal and nothing else: real terminals (ptys), real pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from tests.conftest import ROOT
from utils.progress import duration

PROGRAM = """
import sys
from utils.progress import bar, has_bar, has_lines
with open(sys.argv[1], "w") as said:
    print(has_bar(), has_lines(), file=said)
assert list(bar(range(3), desc="masks", total=3, unit="mask")) == [0, 1, 2]
with bar(desc="epoch", total=4, initial=1) as shown:
    shown.update(3)
    shown.set_postfix_str("12 min left")
    shown.refresh()
"""


def run_with(
    tmp_path, *, out: bool, err: bool, columns: int = 100, **environment: str
) -> tuple[str, bytes]:
    """What the program decided, and all it wrote; `out` and `err` say which is a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    read, write = os.pipe()
    said = tmp_path / "said"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, said], cwd=ROOT, env=os.environ | environment, check=True,
        stdout=slave if out else write, stderr=slave if err else write,
    )  # fmt: skip
    os.write(slave, b"end")
    os.write(write, b"end")
    written = os.read(master, 100_000) + os.read(read, 100_000)
    for descriptor in (master, slave, read, write):
        os.close(descriptor)
    return said.read_text().strip(), written.replace(b"end", b"")


@pytest.mark.parametrize(
    ("out", "err", "decided"),
    [
        (True, True, "True False"),
        (False, True, "True True"),  # run.py > log: the bar on the screen, lines in the file
        (True, False, "False True"),
        (False, False, "False True"),
    ],
)
def test_bar_or_lines(tmp_path, out, err, decided):
    said, written = run_with(tmp_path, out=out, err=err)
    assert said == decided
    if err:
        assert b"masks: " in written
        assert b"epoch: 100%" in written
        assert b"4/4" in written
        assert b"12 min left" in written
    else:
        assert written == b""


def test_a_terminal_without_a_size_gets_lines(tmp_path):
    """tqdm draws nothing there."""
    assert run_with(tmp_path, out=True, err=True, columns=0) == ("False True", b"")


def test_only_the_first_process_draws(tmp_path):
    first, drawn = run_with(tmp_path, out=True, err=True, RANK="0", WORLD_SIZE="2")
    assert (first, b"masks" in drawn) == ("True False", True)
    second, drawn = run_with(tmp_path, out=True, err=True, RANK="1", WORLD_SIZE="2")
    assert (second, drawn) == ("False True", b"")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"), (119.4, "119 s"), (119.6, "2 min"), (3569, "59 min"), (3590, "1 h 00 min"),
        (11_100, "3 h 05 min"), (47.5 * 3600, "47 h 30 min"), (100 * 3600, "4 d 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text
