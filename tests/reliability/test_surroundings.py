"""What a run finds around it: a launcher that dies, an environment, result files, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

import run
from dataset.splits import training_indices
from dataset.voc import VOC
from engine import session
from engine.session import explain
from tasks import get_task
from tests.conftest import ROOT
from tests.reliability import child
from tests.reliability.harness import (
    FLAGS,
    LIMIT,
    SETTING,
    checkpoint_path,
    descendants,
    go,
    launch,
    rows,
)
from tests.reliability.test_hostile import no_hang, snapshot
from tests.reliability.test_identity import command, finished, small  # noqa: F401, fixtures
from utils.errors import UserError

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


QUICK = ["--batch_size", 4, "--epochs", 1]


def test_nobody_reads_what_is_printed(toy, tmp_path):
    done = go(tmp_path, "--data_root", toy, *QUICK, entry=child.main_unheard)
    assert done.status == [0], done.output
    assert "Traceback" not in done.output
    assert len(rows(tmp_path)) == 2


def test_a_working_directory_that_is_gone(toy, tmp_path):
    done = go(tmp_path, "--data_root", toy, *QUICK, entry=child.main_nowhere)
    assert done.status == [1]
    assert done.output.startswith("error: cannot write to")
    assert done.output.count("\n") == 1


def test_a_checkpoint_folder_that_is_a_link(finished, toy, capsys):  # noqa: F811
    elsewhere = finished / "elsewhere"
    shutil.move(finished / "checkpoints", elsewhere)
    (finished / "checkpoints").symlink_to(elsewhere)
    before = snapshot(elsewhere)
    assert run.main(command(toy)) == 0
    assert "is finished" in capsys.readouterr().out
    assert run.main(command(toy, "--lr", 0.5)) == 1
    assert snapshot(elsewhere) == before
    assert run.main(command(toy, "--lr", 0.5, "--restart")) == 0
    assert (finished / "checkpoints").is_symlink()
    assert snapshot(elsewhere) != before


@pytest.mark.parametrize("target", ["nowhere", "checkpoints"])
def test_a_link_that_leads_nowhere(toy, tmp_path, monkeypatch, capsys, small, target):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(tmp_path / target)
    assert run.main(command(toy)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: cannot ")


def test_two_runs_that_share_a_base_start_together(toy, tmp_path):
    """One learns step 0, the other is told; asked again, it goes on from there."""
    own = ["--data_root", toy, *QUICK, "--step", "all", "--base", "b"]
    waiting = {"at": "iteration", "count": 2, "signal": "WAIT"}
    first = launch(tmp_path, *own, "--method", "FT", "--name", "x", faults=[waiting])
    first.wait_for("fault at iteration")
    second = go(tmp_path, *own, "--method", "MIB", "--name", "y")
    assert second.status == [1]
    assert "error: step 0 of 'b'" in second.output
    assert "already running" in second.output
    first.kill()
    first.wait()
    done = go(tmp_path, *own, "--method", "MIB", "--name", "y")
    assert done.status == [0], done.output
    before = snapshot(tmp_path / "checkpoints")
    done = go(tmp_path, *own, "--method", "FT", "--name", "x")
    assert done.status == [0], done.output
    after = snapshot(tmp_path / "checkpoints")
    assert {path: after[path] for path in before} == before
    assert {path.stem for path in after} == {"b_0", "y_1", "x_1"}


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_split_list_that_never_ends(toy, tmp_path, kind):
    path = tmp_path / "data" / "voc" / "15-5-ov" / "train-0.npy"
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with no_hang(), pytest.raises(UserError, match="no file"):
        training_indices(VOC, toy, get_task("voc", "15-5"), 0, True, tmp_path)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("Too many open files. Communication with ..."), "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "a data worker was"),
        (EOFError(), "a data worker was killed"),
        (MemoryError(), "no memory left: lower --crop_size"),
        (MemoryError("Caught MemoryError in DataLoader worker process 0."), "no memory left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you ..."), "no memory left"),
        (RuntimeError("a slip of the program"), None),
    ],
)
def test_what_the_system_refuses_is_a_line(error, word):
    line = explain(error)
    assert line is None if word is None else word in line


def test_a_want_of_memory_is_a_line(monkeypatch, capsys):
    def greedy(plans, argv):
        np.empty(2**55)

    monkeypatch.setattr(session, "learn_all", greedy)
    assert run.main(["--no-pretrained"]) == 1
    assert capsys.readouterr().err.startswith("error: no memory left: lower --crop_size")


def test_a_result_file_linked_to_where_nothing_can_be_written(finished, toy, capsys):  # noqa: F811
    """It is told before the training, not after it."""
    (finished / "plain").write_text("a file")
    result = finished / "logs" / "results" / f"{SETTING}.csv"
    result.unlink()
    result.symlink_to("../../plain/shared.csv")
    before = snapshot(finished)
    assert run.main(command(toy, "--name", "n")) == 1
    assert "plain" in capsys.readouterr().err
    assert snapshot(finished) == before
