"""What a run finds around it: a launcher that dies, an environment, result files, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import run
from tests.conftest import ROOT
from tests.reliability import child
from tests.reliability.harness import FLAGS, LIMIT, SETTING, checkpoint_path, descendants, rows
from tests.reliability.test_hostile import snapshot
from tests.reliability.test_identity import command, finished, small  # noqa: F401, fixtures

FULL = """
import resource, sys
from pathlib import Path
from utils.errors import UserError
from utils.logger import Logger
logger = Logger(Path(sys.argv[1]), resume_step=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    with logger:
        for step in range(200):
            logger.text("a", "x" * 5000, step)
            logger.flush()
except UserError as error:
    print(error)
"""


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("moment", ["at the start", "in training"])
def test_processes_end_with_their_launcher(toy, tmp_path, moment):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        child.__file__, "[]", *FLAGS, "--data_root", str(toy), "--batch_size", "2", "--epochs",
        "3000",
    ]  # fmt: skip
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out)
    deadline = time.monotonic() + LIMIT

    def ready() -> bool:
        if moment == "in training":
            return checkpoint_path(tmp_path).exists()
        return len(descendants(launcher.pid)) == 2

    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # past the first lines of the program
    processes = descendants(launcher.pid)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert len(processes) >= 2
    deadline = time.monotonic() + 60
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in processes if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.parametrize(
    "variables",
    ["WORLD_SIZE=abc", "WORLD_SIZE=0", "LOCAL_RANK=abc", "MASTER_PORT=abc", "WORLD_SIZE=9" * 9,
     "RANK=5 WORLD_SIZE=1", "RANK=5 WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2"],
)  # fmt: skip
def test_an_environment_that_no_launcher_makes(monkeypatch, capsys, variables):
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("=", 1))
    assert run.main([]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the environment has")


def test_result_files_are_tried_before_training(finished, toy, capsys):  # noqa: F811
    path = finished / "logs" / "results" / f"{SETTING}-agg.csv"
    path.write_text(path.read_text() + "\n")
    assert run.main(command(toy)) == 0  # a blank line is none
    path.write_text(path.read_text() + "rubbish\n")
    before = snapshot(finished)
    capsys.readouterr()
    assert run.main(command(toy, "--name", "other")) == 1
    assert f"{SETTING}-agg.csv" in capsys.readouterr().err
    assert snapshot(finished) == before
    assert rows(finished)


def test_a_full_disk_below_the_logs_is_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "logs"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.startswith("cannot write logs to")
    assert "Traceback" not in done.stderr
