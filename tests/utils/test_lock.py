"""The lock of a run: who holds it, and when it is free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.errors import UserError
from utils.lock import run_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from utils.lock import run_lock
with run_lock(Path(sys.argv[1]), "it"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_forked_child_does_not_hold_the_lock_of_a_killed_process(tmp_path):
    path = tmp_path / "folder" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        held = f"it is already running .process {holder.pid} on {socket.gethostname()}.: wait for"
        for _ in range(2):  # the first refusal must not wipe out who holds it
            with pytest.raises(UserError, match=held), run_lock(path, "it"):
                pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # the child lives on
        with run_lock(path, "it"):
            assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "lock", Path("/proc/lock")):
        with pytest.raises(UserError, match=f"cannot make {path}: .*choose another working"):  # noqa: SIM117
            with run_lock(path, "it"):
                pass
