"""Disk, memory, open files and processes: a run takes no more the longer it lasts, and gives all
back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability import child
from tests.reliability.harness import Run, checkpoint_path, descendants, go, launch, read
from tests.reliability.test_resume import check_same, learn
from utils.signals import INTERRUPTED


def test_memory_and_files_do_not_grow(fresh, toy):
    folder = fresh("folder")
    done = learn(folder, toy, "RW", 1, "--epochs", 20, "--lr", 1e-4, "--num_workers", 1,
                 entry=child.main_with_gauges).wait()  # fmt: skip
    assert done.status == [0], done.output
    memory, files = zip(*json.loads((folder / "gauges.json").read_text()), strict=True)
    assert len(memory) == 20
    assert memory[19] <= 1.05 * memory[1]
    assert files[19] == files[1]
    written = [path.name for path in checkpoint_path(folder, 1).parent.glob("**/*.pth*")]
    assert sorted(written) == [".r_0.pth.lock", ".r_1.pth.lock", "r_0.pth", "r_1.pth"]


def seen_processes(running: Run) -> set[int]:
    """All that a run has started while it lived."""
    pid, seen = running.processes[0].pid, set()
    while running.processes[0].exitcode is None:
        seen |= descendants(pid)
        time.sleep(0.02)
    return seen


def gone(pids: set[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("end", ["normal", "error", "TERM", "KILL"])
def test_no_process_is_left(fresh, toy, tmp_path, end):
    """Data workers and their server end with the run, however it ends."""
    folder, data, faults = fresh("folder"), toy, []
    status = {"normal": 0, "error": 1, "TERM": INTERRUPTED, "KILL": -9}[end]
    if end == "error":
        data = Path(shutil.copytree(toy, tmp_path / "toy"))
        for image in (data / "PascalVOC12" / "JPEGImages").glob("*val*"):
            image.write_bytes(b"")
    elif end != "normal":
        faults = [{"at": "iteration", "count": 9, "signal": end}]
    running = learn(folder, data, "MIB", 1, "--num_workers", 2, "--epochs", 2, faults=faults)
    seen = seen_processes(running)
    assert running.wait().status == [status], running.output
    assert len(seen) >= 3
    assert gone(seen)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk(fresh, toy, disk, world):
    """Checkpoints, lists and logs on one disk, which fills up during the second epoch."""
    reference = fresh("reference")
    shutil.copytree(reference, disk, dirs_exist_ok=True)
    assert learn(reference, toy, "MIB", world).wait().status == [0] * world
    first = learn(disk, toy, "MIB", world, faults=[
        {"at": "iteration", "count": 10, "signal": "TERM"}]).wait()  # fmt: skip
    assert first.status == [INTERRUPTED] * world, first.output
    before = checkpoint_path(disk, 1).read_bytes()
    with (disk / "filler").open("wb") as filler:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write(bytes(free - 20_000))
    full = learn(disk, toy, "MIB", world, "--continue_ckpt").wait()
    assert full.status == [1] * world, full.output
    assert "Traceback" not in full.output
    errors = [line for line in full.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert "intact" in errors[0]
    assert checkpoint_path(disk, 1).read_bytes() == before
    (disk / "filler").unlink()
    done = learn(disk, toy, "MIB", world, "--continue_ckpt").wait()
    assert done.status == [0] * world, done.output
    check_same(disk, reference)


def test_weights_that_overflow_are_not_written(fresh, toy):
    """The last good checkpoint stays."""
    folder = fresh("folder")
    flags = ["--data_root", toy, "--step", 1, "--method", "FT", "--batch_size", 2]
    assert go(folder, *flags, "--epochs", 1).status == [0]
    before = checkpoint_path(folder, 1).read_bytes()
    failed = launch(folder, *flags, "--epochs", 2, "--lr", 1e30, "--restart").wait()
    assert failed.status == [1]
    assert "finite" in failed.output or "is nan" in failed.output
    assert checkpoint_path(folder, 1).read_bytes() == before
    assert read(folder, 1)["finished"]
